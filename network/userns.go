package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/cyphar/filepath-securejoin/pathrs-lite/procfs"
	"golang.org/x/sys/unix"
)

// UserNamespace is a user namespace to be made and pinned.
type UserNamespace struct {
	// Path is the file to pin it at, in a directory that exists.
	Path string
	// UIDs and GIDs are what it maps, from id 0 on.
	UIDs, GIDs IDs
	// Holder is a program that lives in the namespaces until they are pinned: no thread of a process that has several can
	// enter another user namespace. It is started with HolderEnv in its environment, has to be open to be executed by
	// every user. It is told and tells what holderAnswer says.
	Holder string
}

// IDs says which ids of the host the first Length ids of a user namespace are.
type IDs struct{ Host, Length uint32 }

// HolderEnv in the environment of a program tells it to be a holder.
const HolderEnv = "_BERTH_HOLDER=1"

// What a holder is told and tells. Its first argument is the flags of the other namespaces, which it makes as root of the user
// namespace: what is made with them, the root of the mqueue file system, belongs to their maker. For each of the others,
// PATH=VALUE, it writes VALUE to PATH below the procfs that is its descriptor 3: as root of the user namespace, which is whom
// the settings belong to, and who is asked which of its groups may ping. Then it writes eight bytes to descriptor 1: the number
// of the setting that failed, from 0 (2^32-1: the making of the namespaces), and the errno, as 32-bit numbers of this machine;
// both zero when none did. Then it waits for the end of its standard input.
const holderAnswer = 8

func (u *UserNamespace) check() error {
	if !filepath.IsAbs(u.Path) {
		return fmt.Errorf("pin user namespace at %q: not absolute: %w", u.Path, errdefs.ErrInvalidArgument)
	}
	for _, r := range []struct {
		kind string
		IDs
	}{{"uids", u.UIDs}, {"gids", u.GIDs}} {
		if r.Length == 0 || uint64(r.Host)+uint64(r.Length) > math.MaxUint32 {
			return fmt.Errorf("user namespace: %s from %d, %d of them: %w", r.kind, r.Host, r.Length, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// pin makes the user namespace with the others in it, sets them up and pins all. It runs on a thread that is thrown away.
func (u *UserNamespace) pin(flags int, all []namespace, set NamespaceSet, sysctls []sysctl) error {
	proc, err := procfs.OpenUnsafeProcRoot()
	if err != nil {
		return fmt.Errorf("open procfs: %w", err)
	}
	defer proc.Close() //nolint:errcheck // opened for reading
	h, err := u.hold(flags, proc, sysctls)
	if err != nil {
		return err
	}
	defer h.end()
	// First, since one that has answered lives until it is let go: its namespaces are there as long.
	if err := h.answer(sysctls); err != nil {
		return err
	}
	dir := "/proc/" + strconv.Itoa(h.process.Pid) + "/ns/"
	for _, n := range all {
		if err := enter(dir+n.file, n.flag); err != nil {
			return err
		}
	}
	if err := set.setUp(); err != nil {
		return err
	}
	return pinAll(append([]namespace{{path: u.Path, file: "user"}}, all...), dir)
}

// holder is a process in new namespaces. It ends with its standard input, and so with this process.
type holder struct {
	process *os.Process
	in, out *os.File
}

func (u *UserNamespace) hold(flags int, proc *procfs.Handle, sysctls []sysctl) (_ *holder, err error) {
	root, err := procRoot(proc)
	if err != nil {
		return nil, fmt.Errorf("open procfs: %w", err)
	}
	defer root.Close() //nolint:errcheck // opened for reading
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer inR.Close() //nolint:errcheck // a copy
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, inW.Close())
	}
	defer outW.Close() //nolint:errcheck // a copy
	args := []string{"berth-holder", strconv.Itoa(flags)}
	for _, s := range sysctls {
		args = append(args, "sys/"+s.path+"="+s.value)
	}
	ids := func(r IDs) []syscall.SysProcIDMap {
		return []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(r.Host), Size: int(r.Length)}}
	}
	process, err := os.StartProcess(u.Holder, args, &os.ProcAttr{
		Dir: "/", Env: []string{HolderEnv}, Files: []*os.File{inR, outW, os.Stderr, root},
		Sys: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWUSER, Setsid: true,
			UidMappings: ids(u.UIDs), GidMappings: ids(u.GIDs), GidMappingsEnableSetgroups: true,
			Credential: &syscall.Credential{Uid: 0, Gid: 0},
		},
	})
	if err != nil {
		_, _ = inW.Close(), outR.Close()
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS) {
			err = fmt.Errorf("%w (is the sysctl user.max_user_namespaces, or that of another namespace, too low?)", err)
		}
		return nil, fmt.Errorf("make user namespace: %w", err)
	}
	return &holder{process, inW, outR}, nil
}

// procRoot is a descriptor of the procfs itself: through it nothing is seen that is mounted over the host's.
func procRoot(proc *procfs.Handle) (*os.File, error) {
	sys, err := proc.OpenRoot("sys")
	if err != nil {
		return nil, err
	}
	defer sys.Close() //nolint:errcheck // a path only
	// ".." of a directory of a mount of its own stays in it.
	fd, err := unix.Openat2(int(sys.Fd()), "..", &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_XDEV})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "proc"), nil
}

// answer waits until the holder has set the sysctls.
func (h *holder) answer(sysctls []sysctl) error {
	var b [holderAnswer]byte
	if _, err := io.ReadFull(h.out, b[:]); err != nil {
		return fmt.Errorf("the holder of the namespaces ended at once: %w", err)
	}
	i, errno := binary.NativeEndian.Uint32(b[:]), unix.Errno(binary.NativeEndian.Uint32(b[4:]))
	if errno == 0 {
		return nil
	}
	if int64(i) >= int64(len(sysctls)) {
		if errors.Is(errno, unix.ENOSPC) || errors.Is(errno, unix.EUSERS) {
			return fmt.Errorf("make namespaces: %w (is a sysctl user.max_*_namespaces too low?)", errno)
		}
		return fmt.Errorf("make namespaces: %w", errno)
	}
	return sysctls[i].failed(errno)
}

// end lets the holder end, and waits for that.
func (h *holder) end() {
	_, _ = h.in.Close(), h.out.Close()
	_ = h.process.Kill()
	_, _ = h.process.Wait()
}
