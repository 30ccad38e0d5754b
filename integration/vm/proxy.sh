#!/usr/bin/env bash
# Runs, in the machine of run.sh, what tests of the proxy and the network need of a kernel that this machine may not have: IPVS and its
# sets, an older nf_tables, and none, br_netfilter as a module. bin/NAME.test are the tests of proxy/NAME, bin/network.test of network.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$PWD/bin

echo "=== RUN   no nf_tables"
modprobe=$(cat /proc/sys/kernel/modprobe)
echo /bin/false > /proc/sys/kernel/modprobe
printf 'apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n' > /disk/proxy.conf
if out=$("$bin/berth" proxy --config /disk/proxy.conf --init-only 2>&1) || ! grep -q 'needs Linux 5.13 or newer with nf_tables' <<< "$out"; then
  printf '%s\n--- FAIL: no nf_tables\n' "$out"
  exit 1
fi
printf '%s\n--- PASS: no nf_tables\n' "$out"
echo "$modprobe" > /proc/sys/kernel/modprobe

# Blacklisted, as an operator does it, on a host whose iptables is legacy: a proxy without a mode goes on with that.
echo "=== RUN   nf_tables blacklisted"
echo 'install nf_tables /bin/false' > /etc/modprobe.d/berth-test.conf
mkdir /disk/legacy
for name in iptables ip6tables; do
  for kind in '' -save -restore; do ln -s "$(command -v $name-legacy$kind)" "/disk/legacy/$name$kind"; done
done
if ! out=$(PATH=/disk/legacy:$PATH "$bin/berth" proxy --init-only 2>&1) || grep -q '^nf_tables ' /proc/modules ||
  ! grep -q 'needs Linux 5.13 or newer with nf_tables' <<< "$out" || ! grep -q 'no mode is configured: it is iptables' <<< "$out"; then
  printf '%s\n--- FAIL: nf_tables blacklisted\n' "$out"
  exit 1
fi
printf '%s\n--- PASS: nf_tables blacklisted\n' "$out"
(cd proxy/iptables && "$bin/iptables.test" -test.v -test.timeout 50m -test.run '^(TestPackets|TestServicesAreCounted|TestRestartChangesNothing)$/^legacy$') | tee /disk/legacy.log
grep -q -- '--- PASS: TestPackets/legacy' /disk/legacy.log # it is skipped where the kernel does not do it
rm /etc/modprobe.d/berth-test.conf

[ ! -e /proc/sys/net/bridge ] # berth loads br_netfilter
(cd network && "$bin/network.test" -test.v -test.run '^TestServiceOfAPodOnTheSameBridge$') | tee /disk/network.log
grep -q -- '--- PASS: TestServiceOfAPodOnTheSameBridge' /disk/network.log # it is skipped without bin/cni
modprobe -a ip_vs ip_vs_rr ip_set ip_set_hash_ipport ip_set_bitmap_port dummy
(cd proxy/ipvs && "$bin/ipvs.test" -test.v)
(cd proxy/nft && "$bin/nft.test" -test.v -test.timeout 50m -test.run "$1")
