#!/usr/bin/env bash
# Prints the directory of Debian's current kernel package, unpacked below the directory given; installs what the machine
# needs of this one, saying what and why.
set -euo pipefail
cache=$1

want=(
  "qemu-system-x86 is the machine"
  "kmod knows which modules a module needs"
  "cpio packs the first file system of the machine"
  "busybox-static is the program in it"
  "e2fsprogs makes the ext4 of its disk"
  "systemd is its process 1 with -s"
  "dbus is how the systemd cgroup driver asks it for units"
  "sudo critest runs apparmor_parser with it"
  "apparmor loads profiles of containers, with apparmor_parser"
  "selinux-policy-default is the policy of SELinux with -e"
  "policycoreutils builds and loads it"
)
need=()
for line in "${want[@]}"; do
  package=${line%% *}
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)" = installed ] || need+=("$line")
done
export DEBIAN_FRONTEND=noninteractive
if [ ${#need[@]} -gt 0 ]; then
  printf 'vm: install %s\n' "${need[@]}" >&2
  apt-get update -qq < /dev/null >&2
  apt-get install -y -qq --no-install-recommends "${need[@]%% *}" < /dev/null > /dev/null
fi

shopt -s nullglob
have=("$cache"/linux-image-*)
if [ ${#have[@]} -gt 0 ]; then
  printf '%s\n' "${have[-1]}"
  exit
fi
image() { apt-cache depends linux-image-amd64 2> /dev/null | awk '/Depends: linux-image-[0-9]/ { print $2; exit }'; }
package=$(image)
[ -n "$package" ] || { apt-get update -qq < /dev/null >&2; package=$(image); }
echo "vm: download $package" >&2
work=$(mktemp -d "$cache/new.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # apt's own user reads it
(cd "$work" && apt-get download -qq "$package" < /dev/null >&2)
mkdir "$work/kernel"
dpkg-deb -x "$work"/linux-image-*.deb "$work/kernel"
depmod -b "$work/kernel" "$(ls "$work/kernel/lib/modules")"
mv "$work/kernel" "$cache/$package"
printf '%s\n' "$cache/$package"
