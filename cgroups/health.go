package cgroups

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Check says whether cgroups can be made: every hierarchy that berth uses is mounted, and can be written to.
func Check() error {
	l, err := host()
	if err != nil {
		return err
	}
	for _, root := range l.roots {
		var fs unix.Statfs_t
		if err := unix.Statfs(root, &fs); err != nil {
			return fmt.Errorf("%s: %w", root, err)
		}
		if err := judge(root, fs); err != nil {
			return err
		}
	}
	return nil
}

func judge(root string, fs unix.Statfs_t) error {
	switch {
	case fs.Type != unix.CGROUP_SUPER_MAGIC && fs.Type != unix.CGROUP2_SUPER_MAGIC:
		return fmt.Errorf("%s: no cgroup file system is mounted there", root)
	case fs.Flags&unix.ST_RDONLY != 0:
		return fmt.Errorf("%s: is mounted read-only", root)
	}
	return nil
}
