package pods

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

func TestDetachableMounts(t *testing.T) {
	for name, c := range map[string]struct {
		table string // ID PARENT POINT TYPE
		want  string
	}{
		"pods and volumes": {`
			1 0 / ext4
			2 1 /proc proc
			3 2 /proc/sys/fs/binfmt_misc autofs
			4 1 /run tmpfs
			5 4 /run/user/0 tmpfs
			6 4 /run/berth/pods/a/shm tmpfs
			7 4 /run/berth/containers/b/rootfs overlay
			8 1 /var/lib/kubelet/pods/c/volumes/v tmpfs
			9 1 /dev devtmpfs
			10 9 /dev/shm tmpfs
			11 1 /sys sysfs
			12 11 /sys/fs/cgroup cgroup2`,
			"/var/lib/kubelet/pods/c/volumes/v /run/berth/containers/b/rootfs /run/berth/pods/a/shm /run/user/0"},
		"what is below goes with it": {"1 0 / ext4\n2 1 /data nfs\n3 2 /data/a/b ext4", "/data"},
		"stacked, the upper first":   {"1 0 / ext4\n2 1 /a tmpfs\n3 2 /a tmpfs\n4 1 /b tmpfs\n5 1 /b tmpfs", "/b /b /a"},
		"the way to the run directory and to cgroups stays": {
			"1 0 / ext4\n2 1 /run tmpfs\n3 2 /run/berth tmpfs\n4 3 /run/berth/x tmpfs\n5 1 /odd tmpfs\n6 5 /odd/cpu cgroup\n7 5 /odd/other tmpfs\n8 1 /runner tmpfs",
			"/runner /odd/other /run/berth/x"},
		"a namespace whose root is not the host's": {"7 3 / ext4\n8 7 /a tmpfs", "/a"},
	} {
		var all []*mountinfo.Info
		for line := range strings.Lines(c.table) {
			if f := strings.Fields(line); len(f) == 4 {
				all = append(all, &mountinfo.Info{ID: atoi(t, f[0]), Parent: atoi(t, f[1]), Mountpoint: f[2], FSType: f[3]})
			}
		}
		var got []string
		for _, m := range detachable(all, "/run/berth") {
			got = append(got, m.Mountpoint)
		}
		if is := strings.Join(got, " "); is != c.want {
			t.Errorf("%s: %s, want %s", name, is, c.want)
		}
	}
}

func atoi(t *testing.T, s string) (n int) {
	t.Helper()
	for _, d := range s {
		n = 10*n + int(d-'0')
	}
	return n
}

// The node's mounts stay as they are, also those that are shared with every copy.
func TestLeanMountsAreWithoutPodsAndVolumes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	base := t.TempDir()
	mount := func(dir string, propagation uintptr) {
		t.Helper()
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("lean", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		if err := unix.Mount("", dir, "", propagation, ""); err != nil {
			t.Fatal(err)
		}
	}
	run, volume := filepath.Join(base, "run"), filepath.Join(base, "volume")
	mount(run, unix.MS_SHARED)
	mount(run+"/pods/a/shm", unix.MS_SHARED)
	mount(volume, unix.MS_SHARED)
	mount(volume+"/below", unix.MS_PRIVATE)
	here := func() (list []string) {
		all, err := mountinfo.GetMounts(mountinfo.PrefixFilter(base))
		if err != nil {
			t.Error(err)
		}
		for _, m := range all {
			list = append(list, strings.TrimPrefix(m.Mountpoint, base))
		}
		slices.Sort(list)
		return list
	}
	before := here()

	l, err := newLeanMounts(run)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if after := here(); !slices.Equal(before, after) || len(after) != 4 {
		t.Errorf("the node has %q, and had %q", after, before)
	}
	err = thread.Throwaway(func() error {
		if err := l.enter(); err != nil {
			return err
		}
		if in := here(); !slices.Equal(in, []string{"/run"}) {
			t.Errorf("in it are %q", in)
		}
		var fs unix.Statfs_t
		if err := unix.Statfs("/proc/self", &fs); err != nil || fs.Type != unix.PROC_SUPER_MAGIC {
			t.Errorf("/proc: %v, %#x", err, fs.Type)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	mount(run+"/pods/b/shm", unix.MS_SHARED)
	err = thread.Throwaway(func() error {
		if err := l.enter(); err != nil {
			return err
		}
		if in := here(); !slices.Equal(in, []string{"/run"}) {
			t.Errorf("after another mount %q are in it", in)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
