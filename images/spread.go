package images

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// fsTopDir is FS_TOPDIR_FL of linux/fs.h, which the package unix has not.
const fsTopDir = 0x20000

// spreadOut tells ext4 that directories which are made in this one have nothing to do with each other, so that each gets
// a block group of its own. Without it a layer is made where another was removed a moment ago, and ext4, which gives no
// inode out again for up to five minutes, looks at each of those for each new file: 0.8 ms instead of 0.04 ms, measured
// with 8,000 files. Other file systems do not know the flag.
func spreadOut(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err == nil && flags&fsTopDir == 0 {
		err = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|fsTopDir))
	}
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("flags of %s: %w", dir, err)
	}
	return nil
}
