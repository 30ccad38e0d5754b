package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// NamespaceSet says which namespaces of a pod to make, and what to set in them.
type NamespaceSet struct {
	// Net, IPC and UTS are the files to pin the namespaces at, in directories that exist. An empty one is not made: the
	// pod uses the host's.
	Net, IPC, UTS string
	// Hostname is set in the UTS namespace that is made.
	Hostname string
	// User is the user namespace that the others are made in, and so belong to. Nil is the one of this process.
	User *UserNamespace
	// Sysctls are set inside the namespaces that are made, by their dotted names or those with slashes.
	Sysctls map[string]string
}

type namespace struct {
	path string
	file string // below /proc/thread-self/ns
	flag int
}

func (s NamespaceSet) namespaces() []namespace {
	var all []namespace
	for _, n := range []namespace{{s.Net, "net", unix.CLONE_NEWNET}, {s.IPC, "ipc", unix.CLONE_NEWIPC}, {s.UTS, "uts", unix.CLONE_NEWUTS}} {
		if n.path != "" {
			all = append(all, n)
		}
	}
	return all
}

// Pin makes the namespaces, with the loopback interface up, and pins them. On error nothing is left. The error is of the
// class errdefs.ErrAlreadyExists when there is a file at one of the paths, and errdefs.ErrInvalidArgument when the set
// asks for a setting of a namespace that is not made, which would be the host's.
func Pin(s NamespaceSet) error {
	all := s.namespaces()
	if err := s.check(); err != nil {
		return err
	}
	if len(all) == 0 && s.User == nil {
		return nil
	}
	sysctls, err := parseSysctls(s.Sysctls, s.Net != "", s.IPC != "", s.UTS != "")
	if err != nil {
		return err
	}
	return thread.Throwaway(func() error {
		flags := 0
		for _, n := range all {
			flags |= n.flag
		}
		if s.User != nil {
			return s.User.pin(flags, all, s, sysctls)
		}
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("make namespaces: %w", err)
		}
		if err := s.setUp(); err != nil {
			return err
		}
		if err := writeSysctls(sysctls); err != nil {
			return err
		}
		return pinAll(all, "/proc/thread-self/ns/")
	})
}

// pinAll pins the namespaces that are files in dir, or none of them.
func pinAll(all []namespace, dir string) error {
	for i, n := range all {
		if err := n.pin(dir + n.file); err != nil {
			var undo []error
			for _, done := range all[:i] {
				undo = append(undo, Unpin(done.path))
			}
			return errors.Join(fmt.Errorf("pin %s namespace at %s: %w", n.file, n.path, err), errors.Join(undo...))
		}
	}
	return nil
}

func (s NamespaceSet) check() error {
	for _, n := range s.namespaces() {
		if !filepath.IsAbs(n.path) {
			return fmt.Errorf("pin %s namespace at %q: not absolute: %w", n.file, n.path, errdefs.ErrInvalidArgument)
		}
	}
	if s.User != nil {
		if err := s.User.check(); err != nil {
			return err
		}
	}
	switch {
	case s.Hostname == "":
	case s.UTS == "":
		return fmt.Errorf("hostname %q without a UTS namespace: %w", s.Hostname, errdefs.ErrInvalidArgument)
	case len(s.Hostname) > maxHostname || hasControl(s.Hostname):
		return fmt.Errorf("hostname %q: %w", s.Hostname, errdefs.ErrInvalidArgument)
	}
	return nil
}

const maxHostname = 64 // __NEW_UTS_LEN

func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// setUp runs on the thread that is in the new namespaces.
func (s NamespaceSet) setUp() error {
	if s.Hostname != "" {
		if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
			return fmt.Errorf("set hostname %q: %w", s.Hostname, err)
		}
	}
	if s.Net != "" {
		return loopbackUp()
	}
	return nil
}

// loopbackUp does what the loopback plugin does, in the network namespace of this thread. The kernel adds 127.0.0.1 and
// ::1 by itself.
func loopbackUp() error {
	const first = 1 // the index of lo in every namespace
	if err := netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: first}}); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}

// pin mounts a namespace on a new file. The kernel is given descriptors, not paths, so that neither source
// nor target can be swapped on the way.
func (n namespace) pin(file string) error {
	target, err := unix.Open(n.path, unix.O_RDONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return err
	}
	defer unix.Close(target) //nolint:errcheck // nothing was written
	if err := n.mount(file, target); err != nil {
		return errors.Join(err, os.Remove(n.path))
	}
	return nil
}

func (n namespace) mount(file string, target int) error {
	ns, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(ns) //nolint:errcheck // opened for reading
	if !isNamespace(func(fs *unix.Statfs_t) error { return unix.Fstatfs(ns, fs) }) {
		return errors.New("/proc is not what it should be") // something is mounted over it (CVE-2025-52881)
	}
	tree, err := unix.OpenTree(ns, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree) //nolint:errcheck // a mount that was not moved goes with it
	if err := unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// Unpin releases namespaces that [Pin] pinned. It returns nil for paths that do not exist, and refuses what is not a
// pin.
//
// The pin may have copies: in mount namespaces that were made since, and, where the directory is on a shared mount, in
// its peers. Unmounting reaches those that still receive events, and the removal of the file all others: the kernel
// detaches every mount on a file that is removed.
func Unpin(paths ...string) error {
	var errs []error
	for _, path := range paths {
		if path == "" {
			continue
		}
		if err := unpin(path); err != nil {
			errs = append(errs, fmt.Errorf("unpin %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

func unpin(path string) error {
	for {
		st, err := os.Lstat(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if Pinned(path) {
			if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				return fmt.Errorf("unmount: %w", err)
			}
			continue // mounts can be stacked
		}
		if !st.Mode().IsRegular() || st.Size() != 0 {
			return fmt.Errorf("not a namespace: %w", errdefs.ErrFailedPrecondition)
		}
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
}

// Pinned says whether a namespace is mounted at path. After a reboot it is not, even where the file is still there.
func Pinned(path string) bool {
	st, err := os.Lstat(path)
	if err != nil || st.Mode()&os.ModeSymlink != 0 {
		return false
	}
	return isNamespace(func(fs *unix.Statfs_t) error { return unix.Statfs(path, fs) })
}

// Identity tells network namespaces apart, for as long as the node runs: the kernel's cookie of the one that is pinned at
// path, which no other ever gets, or before Linux 5.14 the number of its file, which no other has while it lives.
func Identity(path string) (id string, err error) {
	err = InNamespaces([]string{path}, func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s) //nolint:errcheck // nothing was sent
		if cookie, err := unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err == nil {
			id = "cookie " + strconv.FormatUint(cookie, 10)
			return nil
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return err
		}
		id = "file " + strconv.FormatUint(st.Ino, 10)
		return nil
	})
	return id, err
}

func isNamespace(stat func(*unix.Statfs_t) error) bool {
	var fs unix.Statfs_t
	return stat(&fs) == nil && fs.Type == unix.NSFS_MAGIC
}
