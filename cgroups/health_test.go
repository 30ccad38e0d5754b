package cgroups

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCheckOfAHierarchy(t *testing.T) {
	for _, tc := range []struct {
		name string
		fs   unix.Statfs_t
		want string
	}{
		{"v1", unix.Statfs_t{Type: unix.CGROUP_SUPER_MAGIC}, ""},
		{"v2", unix.Statfs_t{Type: unix.CGROUP2_SUPER_MAGIC}, ""},
		{"unmounted", unix.Statfs_t{Type: unix.TMPFS_MAGIC}, "no cgroup file system"},
		{"read-only", unix.Statfs_t{Type: unix.CGROUP2_SUPER_MAGIC, Flags: unix.ST_RDONLY}, "read-only"},
	} {
		err := judge("/sys/fs/cgroup/x", tc.fs)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "/sys/fs/cgroup/x")) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}
