package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
)

// overlay is an overlay mount to be made: lower directories top first; upper and work, or neither for a read-only one.
type overlay struct {
	lowers      []string
	upper, work string
	// userns is the file of a user namespace that the lower directories' owners are to be seen from, or "".
	userns string
	// context is the SELinux context of everything in it, or "".
	context string
}

// A MountOption is what a mount has beside what the image says.
type MountOption func(*overlay)

// Context gives everything in a mount an SELinux context, whatever its layers have; nothing is labelled if it is empty.
func Context(context string) MountOption { return func(o *overlay) { o.context = context } }

// errNoLowerPlus says that the kernel is older than lowerdir+ (6.7).
var errNoLowerPlus = errors.New("no lowerdir+")

// maxFsString bounds a value given to fsconfig.
const maxFsString = 255

// mount makes the mount and puts it at target.
func (o overlay) mount(target string) error {
	mnt, err := o.make(target)
	if err != nil {
		return err
	}
	defer unix.Close(mnt)
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

// make makes the mount, at no place yet. What needs a place meanwhile has it at target, a directory, where only the thread
// that needs it sees it.
func (o overlay) make(target string) (mnt int, err error) {
	if o.userns == "" {
		return o.detached(target)
	}
	err = inPrivateMounts(func() (err error) {
		if o.lowers, err = mapLayers(o.lowers, o.userns, target); err != nil {
			return err
		}
		mnt, err = o.detached(filepath.Join(target, overlayName))
		return err
	})
	return mnt, err
}

// detached makes the mount of layers that are ready. old is where mount(2) puts it on old kernels.
func (o overlay) detached(old string) (int, error) {
	// Paths by descriptor: their own length does not count, neither to fsconfig nor to mount(2) with its one page.
	var dirs []*os.File
	defer func() {
		for _, d := range dirs {
			d.Close()
		}
	}()
	short := func(path string) (string, error) {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", &os.PathError{Op: "open", Path: path, Err: err}
		}
		dirs = append(dirs, os.NewFile(uintptr(fd), path))
		return fmt.Sprintf("/proc/self/fd/%d", fd), nil
	}
	mnt, err := o.mountNew(func(path string) (string, error) {
		if len(path) <= maxFsString {
			return path, nil
		}
		return short(path)
	})
	if errors.Is(err, errNoLowerPlus) {
		return o.mountOld(old, short)
	}
	return mnt, err
}

// mountNew uses the mount API of 5.2, which has a call per option instead of one page for all.
func (o overlay) mountNew(name func(string) (string, error)) (int, error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return -1, errNoLowerPlus
	}
	if err != nil {
		return -1, fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fs)
	set := func(key, value string) error {
		value, err := name(value)
		if err != nil {
			return err
		}
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return fsError(fs, fmt.Errorf("%s=%s: %w", key, value, err))
		}
		return nil
	}
	if err := unix.FsconfigSetString(fs, "source", "berth"); err != nil {
		return -1, fsError(fs, fmt.Errorf("source: %w", err))
	}
	for i, dir := range o.lowers {
		if err := set("lowerdir+", dir); err != nil {
			if i == 0 && errors.Is(err, unix.EINVAL) {
				return -1, fmt.Errorf("%w: %w", errNoLowerPlus, err)
			}
			return -1, err
		}
	}
	if o.context != "" {
		if err := unix.FsconfigSetString(fs, "context", o.context); err != nil {
			return -1, fsError(fs, fmt.Errorf("context=%s: %w", o.context, err))
		}
	}
	attrs := unix.MOUNT_ATTR_RDONLY
	if o.upper != "" {
		attrs = 0
		if err := set("upperdir", o.upper); err != nil {
			return -1, err
		}
		if err := set("workdir", o.work); err != nil {
			return -1, err
		}
		// Without it each unmount, of each container, flushes the whole file system that holds the images. Nothing is
		// lost by it: what a container wrote there does not outlive a reboot. A kernel before 5.10 does not know it.
		if err := unix.FsconfigSetFlag(fs, "volatile"); err != nil && !errors.Is(err, unix.EINVAL) {
			return -1, fsError(fs, fmt.Errorf("volatile: %w", err))
		}
	}
	for key, value := range o.features() {
		if err := unix.FsconfigSetString(fs, key, value); err != nil && !errors.Is(err, unix.EINVAL) {
			return -1, fsError(fs, fmt.Errorf("%s: %w", key, err))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		// Before 6.5 the kernel only collects the options, and refuses lowerdir+ here. If it is something else that it
		// does not like, mount(2) gets the same answer.
		if errors.Is(err, unix.EINVAL) {
			return -1, fmt.Errorf("%w: %w", errNoLowerPlus, err)
		}
		return -1, fsError(fs, fmt.Errorf("create overlay: %w", err))
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return -1, fsError(fs, fmt.Errorf("fsmount: %w", err))
	}
	return mnt, nil
}

// features switches off what a layer's or a kernel's defaults could switch on: berth's layers have neither index,
// redirects nor metadata-only copies, and following such would trust attributes.
func (o overlay) features() map[string]string {
	f := map[string]string{"redirect_dir": "nofollow", "metacopy": "off"}
	if o.upper != "" {
		f["index"] = "off"
	}
	return f
}

// mountOld uses mount(2), whose options share one page, and takes the mount from where that has put it.
func (o overlay) mountOld(at string, short func(string) (string, error)) (int, error) {
	var names []string
	for _, dir := range o.lowers {
		name, err := short(dir)
		if err != nil {
			return -1, err
		}
		names = append(names, name)
	}
	options := []string{"lowerdir=" + strings.Join(names, ":")}
	flags := uintptr(unix.MS_RDONLY)
	if o.upper != "" {
		flags = 0
		upper, err := short(o.upper)
		if err != nil {
			return -1, err
		}
		work, err := short(o.work)
		if err != nil {
			return -1, err
		}
		options = append(options, "upperdir="+upper, "workdir="+work)
	}
	for key, value := range o.features() {
		options = append(options, key+"="+value)
	}
	// /proc/self/fd is the calling thread's process's, but the thread must not be one that left the file table.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	data := label.FormatMountLabel(strings.Join(options, ","), o.context)
	err := unix.EINVAL
	if o.upper != "" {
		err, _ = unix.Mount("berth", at, "overlay", flags, data+",volatile").(unix.Errno) // as in mountNew
	}
	if err == unix.EINVAL {
		err, _ = unix.Mount("berth", at, "overlay", flags, data).(unix.Errno)
	}
	if err != 0 {
		return -1, fmt.Errorf("mount overlay of %d layers at %s: %w", len(o.lowers), at, err)
	}
	mnt, terr := unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if uerr := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); terr == nil && uerr != nil {
		_ = unix.Close(mnt)
		terr = uerr
	}
	if terr != nil {
		return -1, fmt.Errorf("take overlay from %s: %w", at, terr)
	}
	return mnt, nil
}

// fsError adds what the kernel says about a failure, which is more than a number.
func fsError(fs int, err error) error {
	buf := make([]byte, 1024)
	for range 8 {
		n, rerr := unix.Read(fs, buf)
		if rerr != nil || n <= 0 {
			break
		}
		if text := strings.TrimSpace(string(buf[:n])); strings.HasPrefix(text, "e ") {
			return fmt.Errorf("%w (kernel: %s)", err, strings.TrimPrefix(text, "e "))
		}
	}
	return err
}

// isMountPoint says whether something is mounted at a path.
func isMountPoint(path string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st); err != nil {
		return false, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, nil // before 5.8: the caller mounts once more, and Unmount takes all away
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// unmount takes away whatever is mounted at target, one on the other. What is still in use goes out of sight at once
// and away with its last user.
func unmount(target string) error {
	for range 64 {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			return nil
		case err != nil:
			return &os.PathError{Op: "unmount", Path: target, Err: err}
		}
	}
	return fmt.Errorf("unmount %s: too many mounts", target)
}
