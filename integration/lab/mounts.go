package lab

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is a line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
type mount struct {
	root, point, fstype, source, super string
}

func mountTable() ([]mount, error) { return mountsOf("self") }

func mountsOf(pid string) ([]mount, error) {
	text, err := os.ReadFile("/proc/" + pid + "/mountinfo")
	if err != nil {
		return nil, err
	}
	var mounts []mount
	for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		before, after, ok := strings.Cut(line, " - ")
		head, tail := strings.Fields(before), strings.Fields(after)
		if !ok || len(head) < 6 || len(tail) < 3 {
			return nil, fmt.Errorf("mountinfo of %s: unexpected line %q", pid, line)
		}
		mounts = append(mounts, mount{unescape(head[3]), unescape(head[4]), tail[0], unescape(tail[1]), unescape(tail[2])})
	}
	return mounts, nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// unmountBelow takes away every mount below dir, newest first. It looks until it has found none three times: while mounts
// come and go, the table can be read without one that is there all the time (no snapshot is promised of it).
func unmountBelow(dir string) error {
	for clean := 0; clean < 3; clean++ {
		mounts, err := mountTable()
		if err != nil {
			return err
		}
		var errs []error
		for i := len(mounts) - 1; i >= 0; i-- {
			m := mounts[i]
			if !strings.HasPrefix(m.point, dir+"/") {
				continue
			}
			switch err := unix.Unmount(m.point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err {
			case nil:
				clean = -1
			case unix.EINVAL, unix.ENOENT: // gone with another
			default:
				errs = append(errs, fmt.Errorf("unmount %s: %w", m.point, err))
			}
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
	}
	return nil
}
