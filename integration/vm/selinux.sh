#!/usr/bin/env bash
# Prints a directory that becomes /etc/selinux of the machine: Debian's policy with the types of container.cil, made once below
# the directory given. This machine's own policy stays as it is.
set -euo pipefail
module=$(cd "$(dirname "$0")" && pwd)/container.cil
key=$(cat "$module" <(dpkg-query -W selinux-policy-default) | sha256sum | cut -c1-16)
policy=$1/selinux-$key
if [ ! -e "$policy" ]; then
  echo 'vm: build the SELinux policy' >&2
  work=$(mktemp -d "$1/new.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/root/etc" "$work/root/var/lib"
  cp -a /etc/selinux "$work/root/etc/"
  cp -a /var/lib/selinux "$work/root/var/lib/"
  semodule -p "$work/root" -s default -n -i "$module" > /dev/null 2>&1
  rm -rf "$1"/selinux-*
  mv "$work/root/etc/selinux" "$policy"
fi
printf '%s\n' "$policy"
