package socket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Only has this process be the only one with a name, in the network namespace that the calling thread is in, until it is closed
// or the process ends, however it does: the name is that of an abstract socket, which is in no file system. The error of the
// second is [ErrInUse], and names the first one's pid. Whoever has no say on the network (no CAP_NET_ADMIN), and has the name
// to keep others from it, does not: it is passed over.
func Only(ctx context.Context, name string) (*Name, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", "@"+name)
	if err == nil {
		only := &Name{l.(*net.UnixListener)}
		go func() { // whoever connects asks the kernel who listens
			for {
				c, err := only.l.Accept()
				if err != nil {
					return
				}
				_ = c.Close() // nothing was said
			}
		}()
		return only, nil
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return nil, err
	}
	holder, err := listens(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("%w: it cannot be told which: %w", ErrInUse, err)
	}
	if !holder.counts() {
		return &Name{}, nil
	}
	return nil, heldError(holder.Pid)
}

// Name is one that this process has.
type Name struct {
	l *net.UnixListener // nil where another keeps it from us
}

// Close gives the name back, which others may have then: programs that have its File keep it until they end.
func (n *Name) Close() error {
	if n.l == nil {
		return nil
	}
	return n.l.Close()
}

// File is the name, to be handed to programs that this process starts ([exec.Cmd].ExtraFiles). They have it then, too, until they
// end, also if this process is killed. It is nil where another keeps the name from us.
func (n *Name) File() (*os.File, error) {
	if n.l == nil {
		return nil, nil
	}
	return n.l.File()
}

// Holder is who has a name in the network namespace of the calling thread, in words; "" where nobody has it who counts.
func Holder(ctx context.Context, name string) string {
	p, err := listens(ctx, name)
	if err != nil || !p.counts() {
		return ""
	}
	return heldError(p.Pid).Error()
}

// heldError is ErrInUse with the pid of who it is.
type heldError int32

func (e heldError) Error() string {
	if e == 0 {
		return "a process of another pid namespace"
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", int32(e))); errors.Is(err, fs.ErrNotExist) {
		return fmt.Sprintf("a program that process %d has started, which has ended itself", int32(e))
	}
	return fmt.Sprintf("process %d", int32(e))
}

func (e heldError) Is(target error) bool { return target == ErrInUse }

// peer is who listens on a socket.
type peer struct{ *unix.Ucred }

func listens(ctx context.Context, name string) (p peer, err error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", "@"+name)
	if err != nil {
		return p, err // it may just have ended
	}
	defer c.Close() //nolint:errcheck // nothing was said
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return p, err
	}
	cerr := raw.Control(func(fd uintptr) { p.Ucred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return p, errors.Join(cerr, err)
}

// counts says whether a process may change the network. Of one that cannot be looked at that is taken for granted.
func (p peer) counts() bool {
	if p.Uid != 0 {
		return false
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(int(p.Pid)) + "/status")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(status)) {
		if name, mask, _ := strings.Cut(line, ":"); name == "CapEff" {
			set, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
			return err != nil || set&(1<<unix.CAP_NET_ADMIN) != 0
		}
	}
	return true
}
