package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A standard stream that nobody wants is the host's /dev/null until here. A container must not get it: root in it can
// open it again through /proc/self/fd and change mode, owner and attributes of the host's file, with no capability
// beyond the default ones. libcontainer gives init the container's own in its place, unless a volume is at /dev, and an
// exec never.

// replaceHostNull puts what open returns for a stream in the place of each that is /dev/null.
func replaceHostNull(files []*os.File, open func(stream int) (*os.File, error)) error {
	for i, f := range files {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		if !isNull(st) {
			continue
		}
		own, err := open(i)
		if err != nil {
			return err
		}
		_ = f.Close()
		files[i] = own
	}
	return nil
}

func isNull(st unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// ownNull opens the container's own /dev/null. One that the container has replaced is not opened at all.
func ownNull(c *libcontainer.Container, stream int) (*os.File, error) {
	state, err := c.State()
	if err != nil {
		return nil, err
	}
	root, err := unix.Open("/proc/"+strconv.Itoa(state.InitProcessPid)+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("root of the container: %w", err)
	}
	defer unix.Close(root)
	// Asked after the root was opened, so that the pid was still init's then and not a later process's.
	if status, err := c.Status(); err != nil || status == libcontainer.Stopped {
		return nil, errors.Join(errors.New("container does not run"), err)
	}
	fd, err := unix.Openat2(root, "dev/null", &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return emptyInput(stream)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || !isNull(st) {
		return emptyInput(stream)
	}
	f, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(fd), os.O_RDWR, 0)
	if err != nil {
		return emptyInput(stream)
	}
	return f, nil
}

// emptyInput is what a container without a /dev/null reads: the end of a pipe that nobody writes to.
func emptyInput(stream int) (*os.File, error) {
	if stream != 0 {
		return nil, fmt.Errorf("the container has no /dev/null for descriptor %d", stream)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	return r, w.Close()
}

// hasDevVolume says whether the request mounts something in the place of the container's own /dev: then libcontainer
// sets up no devices, and replaces no stream.
func hasDevVolume(spec *specs.Spec) bool {
	for _, m := range spec.Mounts {
		if m.Type == "bind" && path.Clean(m.Destination) == "/dev" {
			return true
		}
	}
	return false
}
