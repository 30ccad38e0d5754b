#!/usr/bin/env bash
# Runs a command as root in a virtual machine with Debian's stock kernel: cgroup v2 with every controller, AppArmor or
# SELinux, all modules. What this machine's kernel lacks is tested there.
#
#   run.sh [-s] [-e] [-m MIB] [-t SECONDS] [-o DIR] [-n TAP] [-c PIPE] COMMAND [ARG...]    exit status and output are the command's
#     -s  systemd is process 1 there, and the command a unit of it with Delegate=yes; else process 1 is a shell
#     -e  SELinux instead of AppArmor, permissive, with Debian's policy; not together with -s
#     -m  memory (default 4096)
#     -t  how long it may take (default 3600)
#     -o  a directory of this machine that the command may write to, under the same path
#     -n  a tap device of this machine, at whose other end is eth0 there, which is down and has no address; without: no network
#     -c  two pipes, PIPE.in and PIPE.out, that are made here and at whose other end is /dev/ttyS3 there: see console.sh
#
# The machine's root is this machine's file system, read-only below an overlay in memory, so programs and tests are there
# under their paths; /tmp and /run are its own. TMPDIR is on a new disk with ext4: state of a node belongs there, since a
# tmpfs of this kernel can be no lower layer of an idmapped root file system. The disk goes with the machine.
#
# qemu emulates the processor (no KVM needed): it boots in about 15 s (with -s 30 s), runs some 20 times slower than native
# on 2 processors.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
memory=4096 limit=3600 systemd='' selinux='' share='' tap='' pipe=''
while getopts sem:t:o:n:c: option; do
  case $option in
    s) systemd=y ;;
    e) selinux=y ;;
    m) memory=$OPTARG ;;
    t) limit=$OPTARG ;;
    o) share=$(mkdir -p "$OPTARG" && cd "$OPTARG" && pwd) ;;
    n) tap=$OPTARG ;;
    c) pipe=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] && [ -z "$systemd" -o -z "$selinux" ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; }

cache=${BERTH_CACHE:-${XDG_CACHE_HOME:-${HOME:?set HOME or BERTH_CACHE}/.cache}/berth}/vm
mkdir -p "$cache"
kernel=$(flock "$cache/lock" "$here/kernel.sh" "$cache")
release=$(ls "$kernel/lib/modules")
[ -z "$selinux" ] || selinux=$(flock "$cache/lock" "$here/selinux.sh" "$cache")

run=$(mktemp -d "${TMPDIR:-/tmp}/berth-vm.XXXXXX")
trap 'rm -rf "$run"' EXIT
share=${share:-$run/share}
mkdir -p "$share" "$run/settings" "$run/initrd"/{bin,modules}

# The command, and what init has to know, are read through a directory that qemu shares.
printf 'export HOME=/root TERM=dumb TMPDIR=/disk PATH=%q\ncd %q\nexec %s\n' "$PATH" "$PWD" "$(printf '%q ' "$@")" > "$run/settings/command"
printf 'kernel=%q release=%q share=%q systemd=%q selinux=%q\n' "$kernel" "$release" "$share" "$systemd" "$selinux" > "$run/settings/env"
cp "$here/guest.sh" "$here/guest.service" "$run/settings/"

cp "$(command -v busybox)" "$run/initrd/bin/busybox"
cp "$here/init.sh" "$run/initrd/init"
n=10 # modules are loaded in this order
for name in virtio_pci virtio_blk virtio_net 9pnet_virtio 9p overlay ext4 crc32c_generic; do
  while read -r verb file _; do
    [ "$verb" = insmod ] && [ ! -e "$run/seen-${file##*/}" ] || continue
    touch "$run/seen-${file##*/}"
    cp "$file" "$run/initrd/modules/$((n++))-${file##*/}"
  done < <(modprobe -d "$kernel" -S "$release" -D "$name" 2> /dev/null)
done
(cd "$run/initrd" && find . | cpio -o -H newc 2> /dev/null | gzip -1) > "$run/initrd.gz"

truncate -s 16G "$run/disk"
mkfs.ext4 -q -F -E lazy_itable_init=1,lazy_journal_init=1 "$run/disk"

devices=()
if [ -n "$pipe" ]; then
  rm -f "$pipe.in" "$pipe.out"
  mkfifo -m 600 "$pipe.in" "$pipe.out"
  devices+=(-serial "pipe:$pipe")
fi
if [ -n "$tap" ]; then
  mac=52:54:00:$(md5sum <<< "$tap" | sed 's/\(..\)\(..\)\(..\).*/\1:\2:\3/') # machines on one bridge need different ones
  devices+=(-netdev "tap,id=net,ifname=$tap,script=no,downscript=no" -device "virtio-net-pci,netdev=net,romfile=,mac=$mac")
fi
shared='security_model=none,multidevs=remap'
status=0
timeout "$limit" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -m "$memory" -smp 2 -display none -no-reboot -nodefaults \
  -kernel "$kernel/boot/vmlinuz-$release" -initrd "$run/initrd.gz" -append "console=ttyS0 quiet panic=-1${selinux:+ security=selinux selinux=1 enforcing=0}" \
  -serial "file:$run/console" -serial stdio -serial "file:$run/status" \
  "${devices[@]}" -drive "file=$run/disk,format=raw,if=virtio,cache=unsafe" \
  -virtfs "local,path=/,mount_tag=root,readonly=on,$shared" \
  -virtfs "local,path=$share,mount_tag=share,$shared" \
  -virtfs "local,path=$run/settings,mount_tag=settings,readonly=on,$shared" < /dev/null || status=$?
if [ "$status" = 124 ]; then
  echo "vm: not done within $limit s (option -t)" >&2
  exit 124
fi
code=$(tr -dc 0-9 < "$run/status" 2> /dev/null || true)
if [ "$status" != 0 ] || [ -z "$code" ]; then
  echo "vm: the machine stopped before the command had ended (qemu: exit code $status); the end of its console:" >&2
  tail -n 15 "$run/console" >&2
  exit 125
fi
exit "$code"
