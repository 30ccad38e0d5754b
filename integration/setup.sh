#!/usr/bin/env bash
# Installs the Debian packages that building and testing need and that are missing, with a line each of what and why.
# setup.sh browser: those of tests with a browser, which few need and which are large.
set -euo pipefail

want=(
  "gcc compiles berth-shim, whose container start must run C code before Go's threads exist"
  "libc6-dev the C library that berth-shim is linked with, statically"
  "libseccomp-dev seccomp profiles of containers"
  "pkg-config tells the Go compiler where libseccomp is"
  "iptables the bridge and portmap CNI plugins run it for NAT of pods and host ports"
  "nftables tests read the firewall rules back with nft"
  "iproute2 the README's commands look at links and addresses with ip"
  "e2fsprogs tests make disks whose power is cut, with mkfs.ext4"
  "xfsprogs tests look at reflinks, on a disk made with mkfs.xfs"
  "btrfs-progs the same with mkfs.btrfs"
  "util-linux tests use flock, ipcmk and nsenter"
)

[ "${1:-}" != browser ] || want=(
  "chromium a test opens a page in it, as a user of the cluster would"
  "fonts-dejavu-core letters on that page"
)

need=()
for line in "${want[@]}"; do
  package=${line%% *}
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || need+=("$line")
done
[ ${#need[@]} -gt 0 ] || exit 0

if ! command -v apt-get > /dev/null; then
  echo "setup: this is no Debian machine; install what gives: $(printf '%s\n' "${need[@]%% *}" | paste -sd ' ')" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "setup: run as root: apt-get install $(printf '%s\n' "${need[@]%% *}" | paste -sd ' ')" >&2
  exit 1
fi
for line in "${need[@]}"; do
  read -r package why <<< "$line"
  echo "setup: install $package: $why"
done
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq < /dev/null
apt-get install -y -qq --no-install-recommends "${need[@]%% *}" < /dev/null > /dev/null
