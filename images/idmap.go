package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// Userns is a user namespace that an image is mounted for: what belongs to user 0 in its layers belongs to the namespace's
// user 0 in the mount. The layers themselves stay as they are, for all pods.
type Userns struct {
	// Path is a file of the namespace, pinned or below /proc.
	Path string
	// UIDs and GIDs are what it maps, from id 0 on.
	UIDs, GIDs IDs
}

// IDs says which ids of the host the first Length ids of a user namespace are.
type IDs struct{ Host, Length uint32 }

func (r IDs) host(id uint32) (uint32, error) {
	if id >= r.Length {
		return 0, fmt.Errorf("id %d is beyond the %d ids of the user namespace: %w", id, r.Length, errdefs.ErrFailedPrecondition)
	}
	return r.Host + id, nil
}

// CanMap says why the layers of this store cannot be mounted for a user namespace, or nil: kernel (5.19) and file system
// have to be able to. It mounts nothing at target, an empty directory.
func (s *Store) CanMap(userns, target string) error {
	mnt, err := overlay{lowers: []string{s.path(emptyDir), s.path(voidDir)}, userns: userns}.make(target)
	if err != nil {
		return err
	}
	return unix.Close(mnt)
}

// giveTo gives a directory of the host to the user that owns it inside the namespace.
func (u *Userns) giveTo(dir *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	uid, err := u.UIDs.host(st.Uid)
	if err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	gid, err := u.GIDs.host(st.Gid)
	if err != nil {
		return fmt.Errorf("group: %w", err)
	}
	return os.NewSyscallError("fchown", unix.Fchown(int(dir.Fd()), int(uid), int(gid)))
}

// overlayName is where, below its staging directory, mount(2) makes an overlay. The layers beside it have numbers.
const overlayName = "overlay"

// mapLayers makes an id-mapped mount of each layer, below a file system that it mounts at stage. It returns where they are.
// To overlayfs a layer has to be mounted somewhere (before Linux 6.15), which is why all this happens in mounts that only
// this thread sees, see [inPrivateMounts].
func mapLayers(layers []string, userns, stage string) ([]string, error) {
	ns, err := os.Open(userns)
	if err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	defer ns.Close()
	if err := unix.Mount("stage", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700,size=1m"); err != nil {
		return nil, fmt.Errorf("mount staging directory: %w", err)
	}
	if err := os.Mkdir(filepath.Join(stage, overlayName), 0o700); err != nil {
		return nil, err
	}
	mapped := make([]string, len(layers))
	for i, layer := range layers {
		mapped[i] = filepath.Join(stage, strconv.Itoa(i))
		if err := os.Mkdir(mapped[i], 0o700); err != nil {
			return nil, err
		}
		if err := mapLayer(layer, int(ns.Fd()), mapped[i]); err != nil {
			return nil, fmt.Errorf("layer %s: %w", layer, err)
		}
	}
	return mapped, nil
}

func mapLayer(layer string, userns int, at string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, layer, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return os.NewSyscallError("open_tree", err)
	}
	defer unix.Close(tree)
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns)})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("mount_setattr: %w: kernel or file system cannot map ids", err)
	}
	if err != nil {
		return os.NewSyscallError("mount_setattr", err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return os.NewSyscallError("move_mount", err)
	}
	return nil
}

// inPrivateMounts runs f on a thread with a mount namespace of its own, both of which end with it: what f mounts nobody
// else sees, and a daemon that is killed leaves none of it. Unmounting by others goes through, so that nothing is kept
// busy by the copy.
func inPrivateMounts(f func() error) error {
	return thread.Throwaway(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		return f()
	})
}
