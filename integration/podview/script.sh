# What a program sees of its container. One fact a line, the kind of fact first. Busybox is enough.
export LC_ALL=C
exec 2>/dev/null
until [ -e /dev/shm/up ]; do sleep 0.1; done # the container's program makes it: until then it may be the runtime's init
as() { sed "s|^|$1 |"; }
for p in 1 self; do
  tail -n +2 /proc/$p/limits | tr -s ' ' | sed 's/ $//' | as "limit-of-$p"
  grep -E '^(Uid|Gid|Groups|Umask|Cap[A-Z][a-z]*|NoNewPrivs|Seccomp|SigBlk|SigIgn|SigCgt|Speculation_Store_Bypass|THP_enabled):' /proc/$p/status | tr -s '\t ' ' ' | sed 's/ $//' | as "status-of-$p"
  echo "oom_score_adj-of-$p $(cat /proc/$p/oom_score_adj)"
  tr '\0' '\n' < /proc/$p/environ | sort | as "environment-of-$p"
  echo "directory-of-$p $(readlink /proc/$p/cwd)"
done
for fd in $(ls /proc/1/fd); do echo "descriptor $fd $(readlink /proc/1/fd/$fd)"; done
awk '{ i = 7; p = ""; while ($i != "-") { split($i, a, ":"); p = p "," a[1]; i++ }
  print "mount", $5, $6, (p == "" ? "private" : substr(p, 2)), $(i+1), $(i+2), $(i+3) }' /proc/self/mountinfo
sed 's/^[0-9]*:/cgroup-path /' /proc/self/cgroup
cd /sys/fs/cgroup
for f in memory/memory.limit_in_bytes memory/memory.soft_limit_in_bytes memory/memory.memsw.limit_in_bytes memory/memory.swappiness \
  memory/memory.use_hierarchy cpu/cpu.shares cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us cpuset/cpuset.mems pids/pids.max blkio/blkio.weight \
  devices/devices.list memory.max memory.low memory.min memory.high memory.swap.max memory.oom.group cpu.max cpu.weight pids.max io.weight \
  cgroup.controllers cgroup.type; do
  [ -e $f ] && { cat $f || echo unreadable; } | as "cgroup $f"
done
for f in net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range net/ipv6/conf/all/disable_ipv6 net/core/somaxconn \
  kernel/shmmax kernel/shmall kernel/shm_rmid_forced kernel/msgmax kernel/domainname fs/mqueue/msg_max; do
  echo "sysctl $f $(cat /proc/sys/$f | tr -s '\t' ' ')"
done
for d in $(ls /dev); do
  ls -lnd /dev/$d | awk -v d=$d '{ if ($1 ~ /^[bc]/) n = " " $5 $6; if ($1 ~ /^l/) n = " " $NF; print "device", d, $1, $3, $4 n }'
done
for f in /proc/acpi /proc/asound /proc/bus /proc/fs /proc/interrupts /proc/irq /proc/kcore /proc/kallsyms /proc/keys /proc/latency_stats /proc/sched_debug /proc/scsi \
  /proc/sysrq-trigger /proc/timer_list /proc/timer_stats /sys/firmware /sys/devices/virtual/powercap /sys/kernel/security /sys/fs/cgroup /run /tmp /var/run; do
  if [ ! -e $f ]; then s=absent
  elif [ -d $f ]; then s=directory; [ "$(ls -A $f | wc -l)" = 0 ] && s='empty directory'
  elif [ $f = /proc/kcore ] || [ $f = /proc/sysrq-trigger ]; then s="file $(stat -c '%t:%T' $f)" # reading them waits, or fails
  elif [ "$(head -c 1 $f | wc -c)" = 0 ]; then s='empty file'
  else s=file; fi
  echo "path $f $s"
done
try() { what=$1; shift; "$@" > /dev/null && echo "may $what" || echo "may-not $what"; }
try unshare-user unshare -U true
try unshare-mount unshare -m true
try mount mount -t tmpfs podview /mnt
try make-device mknod /tmp/podview c 1 3
try set-hostname hostname "$(hostname)"
try chroot chroot / /bin/true
try raise-priority nice -n -5 true
try kernel-log sh -c '[ -n "$(dmesg | head -n 1)" ]'
try write-root touch /podview
try write-sysctl sh -c 'cat /proc/sys/net/core/somaxconn > /proc/sys/net/core/somaxconn'
try write-cgroup sh -c 'for d in /sys/fs/cgroup /sys/fs/cgroup/memory; do mkdir $d/podview && rmdir $d/podview && exit; done; false'
try ping ping -c 1 127.0.0.1
try low-port timeout 20 sh -c 'nc -l -p 80 & sleep 0.3; kill $!'
ls /sys/class/net | as interface
for f in /etc/hosts /etc/hostname /etc/resolv.conf; do grep -E 'localhost|view|nameserver|search|options' $f | tr -s '\t' ' ' | as "file $f"; ls -ln $f | awk '{ print "owner", $NF, $1, $3, $4 }'; done
echo "hostname $(hostname)"
echo "groups $(id -G)"
