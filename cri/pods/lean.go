package pods

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/internal/thread"
)

// leanMounts is a mount namespace without the mounts of pods and without volumes. Shims are in it, and the helper that
// creates a container in a copy: libcontainer has the kernel copy all mounts of its own namespace for each container, reads
// them, and takes them down again, and of the node's each pod has several. What a container needs beside comes as descriptors
// of detached mounts, see [build.trees].
//
// It sees nothing that is mounted on the node later, and keeps nothing busy that is unmounted there: it has no volume.
// It ends with the daemon and the last shim in it; each daemon makes one.
type leanMounts struct{ ns *os.File }

func newLeanMounts(run string) (*leanMounts, error) {
	run, err := filepath.EvalSymlinks(run)
	if err != nil {
		return nil, err
	}
	l := &leanMounts{}
	err = thread.Throwaway(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		if err := detachOthers(run); err != nil {
			return err
		}
		l.ns, err = os.Open("/proc/thread-self/ns/mnt")
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := thread.Throwaway(l.enter); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *leanMounts) close() {
	if l != nil {
		_ = l.ns.Close()
	}
}

// enter moves this thread, which has to be thrown away, into the namespace. Nil stays where it is.
func (l *leanMounts) enter() error {
	if l == nil {
		return nil
	}
	return shim.EnterMounts(l.ns)
}

// detachOthers takes all mounts but the essential ones out of the namespace of this thread. It looks again as long as it
// finds some, since mounts can be stacked; what cannot be reached stays.
func detachOthers(run string) error {
	for progress := true; progress; {
		all, err := mountinfo.GetMounts(nil)
		if err != nil {
			return err
		}
		progress = false
		for _, m := range detachable(all, run) {
			if unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
				progress = true
			}
		}
	}
	return nil
}

// detachable are the mounts that are not needed and whose parent is, last first; each goes with all that is below it. So none
// is looked up through one that is not needed, such as one of a server that does not answer.
func detachable(all []*mountinfo.Info, run string) []*mountinfo.Info {
	byID := map[int]*mountinfo.Info{}
	for _, m := range all {
		byID[m.ID] = m
	}
	kept := map[int]bool{}
	for _, m := range all {
		if !essential(m, run) {
			continue
		}
		for ; m != nil && !kept[m.ID]; m = byID[m.Parent] {
			kept[m.ID] = true
		}
	}
	var list []*mountinfo.Info
	for _, m := range slices.Backward(all) {
		if !kept[m.ID] && kept[m.Parent] {
			list = append(list, m)
		}
	}
	return list
}

// essential tells whether the creation of containers needs a mount: those of the kernel, those that lead to the run
// directory, and what sockets of systemd are on.
func essential(m *mountinfo.Info, run string) bool {
	return isBelow(m.Mountpoint, "/proc") || isBelow(m.Mountpoint, "/sys") || isBelow(m.Mountpoint, "/dev") ||
		strings.HasPrefix(m.FSType, "cgroup") || m.Mountpoint == "/run" || isBelow(run, m.Mountpoint)
}

// isBelow tells whether a clean path is dir or below it.
func isBelow(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// trees fills in what mounts of the node the creation of a container needs that the lean namespace is without, and returns
// them as descriptors, in the order of the request: the pod's own, the container's own, and the volumes. A copy of a shared
// mount is its peer, so that what is mounted there later is seen as if it were the node's own.
//
// With hooks, which are the node's programs and see what the node sees, or with more volumes than a message has room for, it
// is the node's mount namespace itself that the container is created in.
func (b *build) trees(req *shim.CreateRequest) (trees []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(trees)
			trees = nil
		}
	}()
	for i, m := range b.out.Spec.Mounts {
		if isBind(m) && filepath.IsAbs(m.Source) && !isBelow(m.Source, b.pod.dir()) && !isBelow(m.Source, b.dir()) {
			req.Sources = append(req.Sources, i)
		}
	}
	req.Trees = []string{b.pod.dir(), b.dir()}
	if b.out.Spec.Hooks != nil || len(req.Trees)+len(req.Sources) > shim.MaxMounts {
		req.HostMounts, req.Trees, req.Sources = true, nil, nil
		host, err := os.Open("/proc/self/ns/mnt")
		return append(trees, host), err
	}
	for _, dir := range req.Trees {
		tree, err := openTree(dir)
		if err != nil {
			return trees, err
		}
		trees = append(trees, tree)
	}
	for _, i := range req.Sources {
		m := b.out.Spec.Mounts[i]
		tree, err := openTree(m.Source)
		if err != nil {
			return trees, fmt.Errorf("mount of %s at %s: %w", strconv.Quote(m.Source), strconv.Quote(m.Destination), err)
		}
		trees = append(trees, tree)
	}
	return trees, nil
}

// isBind tells whether libcontainer takes a mount for a bind mount.
func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// openTree is a copy of what is at path with all mounts below, mounted nowhere.
func openTree(path string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
