package cni

import (
	"os"

	"golang.org/x/sys/unix"
)

// setSysctl sets a setting below /proc/sys/net in the network namespace of this thread. It does not read it back, as the reference
// project's function does: each namespace has files of those names, and to find this one's the kernel goes through them all.
func setSysctl(name, value string) error {
	path := "/proc/sys/net/" + name
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd) //nolint:errcheck // the kernel takes a setting when it is written
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}
