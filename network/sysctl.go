package network

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/cyphar/filepath-securejoin/pathrs-lite/procfs"
	"golang.org/x/sys/unix"
)

// sysctl is one that belongs to a namespace.
type sysctl struct {
	path  string // below /proc/sys
	value string
}

// ipcSysctls are those of the IPC namespace, besides fs/mqueue/*. See ipc_namespaces(7).
var ipcSysctls = []string{
	"kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/sem",
	"kernel/shmall", "kernel/shmmax", "kernel/shmmni", "kernel/shm_rmid_forced",
}

// parseSysctls refuses what does not belong to a namespace that is made, since that would change the host
// (CVE-2022-0532, GHSA-w2j5-3rcx-vx7x), and what would not be one value (CVE-2022-0811).
func parseSysctls(set map[string]string, net, ipc, uts bool) ([]sysctl, error) {
	all := make([]sysctl, 0, len(set))
	for _, name := range slices.Sorted(maps.Keys(set)) {
		value := set[name]
		path, ok := sysctlPath(name)
		if !ok {
			return nil, fmt.Errorf("sysctl %q: not a name: %w", name, errdefs.ErrInvalidArgument)
		}
		var made bool
		switch {
		case strings.HasPrefix(path, "net/"):
			made = net
		case strings.HasPrefix(path, "fs/mqueue/"), slices.Contains(ipcSysctls, path):
			made = ipc
		case path == "kernel/domainname":
			made = uts
		default:
			return nil, fmt.Errorf("sysctl %q: does not belong to a namespace of the pod: %w", name, errdefs.ErrInvalidArgument)
		}
		if !made {
			return nil, fmt.Errorf("sysctl %q: the pod uses the host's namespace: %w", name, errdefs.ErrInvalidArgument)
		}
		if value == "" || hasControlExceptTab(value) {
			return nil, fmt.Errorf("sysctl %q: value %q: %w", name, value, errdefs.ErrInvalidArgument)
		}
		all = append(all, sysctl{path, value})
	}
	return all, nil
}

func hasControlExceptTab(s string) bool {
	return hasControl(strings.ReplaceAll(s, "\t", ""))
}

// sysctlPath reads a name as sysctl(8) does: the separator that comes first separates, and the other one stands for it
// within a name, as in net.ipv4.conf.eth0/100.forwarding.
func sysctlPath(name string) (string, bool) {
	i := strings.IndexAny(name, "./")
	if i < 0 {
		return "", false
	}
	if name[i] == '.' {
		name = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." || hasControl(part) || strings.Contains(part, " ") {
			return "", false
		}
	}
	return name, true
}

// writeSysctls sets them in the namespaces of this thread: the kernel looks at those of the task that opens the file. A
// procfs of our own has nothing mounted over it (CVE-2025-52881).
func writeSysctls(all []sysctl) error {
	if len(all) == 0 {
		return nil
	}
	proc, err := procfs.OpenUnsafeProcRoot()
	if err != nil {
		return fmt.Errorf("open procfs: %w", err)
	}
	defer proc.Close() //nolint:errcheck // opened for reading
	for _, s := range all {
		if err := s.write(proc); err != nil {
			return s.failed(err)
		}
	}
	return nil
}

// failed says what could not be set, and whether no kernel would have done so.
func (s sysctl) failed(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("sysctl %s = %q: %w", s.path, s.value, err)
}

func (s sysctl) write(proc *procfs.Handle) error {
	handle, err := proc.OpenRoot("sys/" + s.path)
	if err != nil {
		return err
	}
	defer handle.Close() //nolint:errcheck // a path only
	file, err := pathrs.Reopen(handle, unix.O_WRONLY|unix.O_CLOEXEC)
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // the kernel takes a sysctl when it is written
	_, err = file.WriteString(s.value)
	return err
}
