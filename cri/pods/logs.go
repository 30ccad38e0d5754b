package pods

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// openLog opens a container's log for appending. Nothing below the log directory is followed, nor the directory itself,
// which is one pod's: who can write there, or beside it, must not make the daemon write elsewhere (CVE-2026-95839). What
// leads to it, /var/log among it, may be a link.
func openLog(dir, name string) (*os.File, error) {
	if !filepath.IsLocal(name) {
		return nil, fmt.Errorf("%q leaves the log directory: %w", name, errdefs.ErrInvalidArgument)
	}
	dir = filepath.Clean(dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(at)
	how := unix.OpenHow{Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	parts := strings.Split(filepath.Clean(name), "/")
	for i := 1; i < len(parts); i++ {
		sub := strings.Join(parts[:i], "/")
		how.Flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
		parent := at
		if i > 1 {
			if parent, err = unix.Openat2(at, strings.Join(parts[:i-1], "/"), &how); err != nil {
				return nil, &os.PathError{Op: "open", Path: filepath.Join(dir, sub), Err: err}
			}
		}
		err = unix.Mkdirat(parent, parts[i-1], 0o755)
		if parent != at {
			_ = unix.Close(parent)
		}
		if err != nil && err != unix.EEXIST {
			return nil, &os.PathError{Op: "mkdir", Path: filepath.Join(dir, sub), Err: err}
		}
	}
	// Not blocking, for a fifo in its place would hold us for ever.
	how.Flags = unix.O_CREAT | unix.O_APPEND | unix.O_WRONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	how.Mode = 0o640
	fd, err := unix.Openat2(at, filepath.Clean(name), &how)
	switch err {
	case nil:
	case unix.ELOOP, unix.EXDEV, unix.ENXIO, unix.EISDIR: // a link, a way out, a fifo, a directory
		return nil, fmt.Errorf("open %s: %w: %w", filepath.Join(dir, name), err, errdefs.ErrInvalidArgument)
	default:
		return nil, &os.PathError{Op: "open", Path: filepath.Join(dir, name), Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("%s is not a regular file: %w", filepath.Join(dir, name), errors.Join(err, errdefs.ErrInvalidArgument))
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir, name)), nil
}

// ReopenLog has a running container's log go on in a new file, the old one having been renamed.
func (m *Manager) ReopenLog(ctx context.Context, id string) error {
	c, err := m.container(id)
	if err != nil {
		return err
	}
	if v := c.view.Load(); v.State != cri.ContainerState_CONTAINER_RUNNING {
		return failedPrecondition("container %s is %s, not running", c.rec.ID, stateName(v.State))
	}
	if c.rec.LogPath == "" {
		return failedPrecondition("container %s has no log", c.rec.ID)
	}
	f, err := openLog(c.pod.config().GetLogDirectory(), c.rec.Config.M.GetLogPath())
	if err != nil {
		return err
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, shimAnswers)
	defer cancel()
	return ofShim(c.pod.shim().ReopenLog(ctx, c.rec.ID, f))
}
