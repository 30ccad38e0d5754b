#!/bin/busybox sh
# Process 1 of the machine until it has its root: loads modules, mounts, and hands over to guest.sh or systemd.
set -e
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /low /up /new
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod "$module"; done

plan9() { mount -t 9p -o "$1,trans=virtio,version=9p2000.L,msize=512000" "$2" "$3"; }
plan9 ro,cache=loose root /low # nothing changes it while the machine runs, except what the command does not look at
mount -t tmpfs -o size=50% up /up
mkdir /up/upper /up/work
mount -t overlay -o lowerdir=/low,upperdir=/up/upper,workdir=/up/work root /new
for dir in proc sys dev; do mount --move /$dir /new/$dir; done
for dir in tmp run; do mount -t tmpfs $dir /new/$dir; done

mkdir -p /new/run/vm /new/disk /new/dev/pts /new/dev/shm
plan9 ro settings /new/run/vm
. /new/run/vm/env
mkdir -p "/new$share" "/new/lib/modules/$release"
plan9 rw share "/new$share"
mount --bind "/new$kernel/lib/modules/$release" "/new/lib/modules/$release"
mount -t ext4 /new/dev/vda /new/disk
mount -t devpts -o gid=5,mode=620 devpts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t securityfs securityfs /new/sys/kernel/security
mount -t bpf bpf /new/sys/fs/bpf
umount /new/sys/fs/cgroup 2> /dev/null || true
mount -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup2 /new/sys/fs/cgroup

if [ -n "$systemd" ]; then
  cp /new/run/vm/guest.service /new/etc/systemd/system/
  rm -f /new/etc/fstab # disks of the other machine
  exec switch_root /new /lib/systemd/systemd --unit=guest.service --log-target=console --log-level=warning
fi
exec switch_root /new /bin/bash /run/vm/guest.sh
