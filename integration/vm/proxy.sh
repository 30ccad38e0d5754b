#!/usr/bin/env bash
# Runs, in the machine of run.sh, what the proxy's tests need of a kernel that this machine may not have: IPVS and its sets, an older
# nf_tables, and none. bin/ipvs.test and bin/nft.test are the tests of proxy/ipvs and proxy/nft.
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

modprobe -a ip_vs ip_vs_rr ip_set ip_set_hash_ipport ip_set_bitmap_port dummy
(cd proxy/ipvs && "$bin/ipvs.test" -test.v)
(cd proxy/nft && "$bin/nft.test" -test.v -test.timeout 50m -test.run "$1")
