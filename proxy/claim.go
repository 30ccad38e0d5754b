package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Claim is that a proxy has the network namespace of the process for itself: two would each mend what the other does. It is a socket
// without a file, which belongs to the namespace, and which the kernel takes away with the process, however that ends.
type Claim struct{ net.Listener }

const (
	claimed = "@berth-proxy"
	// handover is how long a proxy waits for the one before it, which ends.
	handover   = 10 * time.Second
	claimEvery = 200 * time.Millisecond
)

// ErrClaimed is that another proxy has the namespace.
var ErrClaimed = errors.New("another berth proxy runs in this network namespace")

// Take claims the namespace, and waits some seconds for another proxy that may be ending. An error that is not ErrClaimed says
// nothing of others.
func Take(ctx context.Context, log *slog.Logger) (*Claim, error) {
	return take(ctx, claimed, handover, log)
}

// Running is the proxy that has the namespace, in words; empty if there is none.
func Running() string { return holder(claimed) }

func take(ctx context.Context, name string, wait time.Duration, log *slog.Logger) (*Claim, error) {
	for begin, said := time.Now(), false; ; said = true {
		l, err := (&net.ListenConfig{}).Listen(ctx, "unix", name)
		if err == nil {
			c := &Claim{l}
			go c.answer()
			return c, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("claim the network namespace: %w", err)
		}
		who := holder(name)
		if who != "" && time.Since(begin) >= wait {
			return nil, fmt.Errorf("%w (%s): stop that one first", ErrClaimed, who)
		}
		if who == "" && time.Since(begin) >= wait {
			return nil, errors.New("claim the network namespace: the name " + name + " is taken, and not by root")
		}
		if !said {
			log.Info("another berth proxy runs in this network namespace: it is waited for", "holder", who, "for", wait.String())
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(claimEvery):
		}
	}
}

// answer has those who ask who it is see that: the kernel tells them.
func (c *Claim) answer() {
	for {
		conn, err := c.Accept()
		if err != nil {
			return
		}
		_ = conn.Close()
	}
}

// holder asks the kernel who listens. Whoever is not root is no proxy.
func holder(name string) string {
	conn, err := net.DialTimeout("unix", name, time.Second)
	if err != nil {
		return ""
	}
	defer conn.Close()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return ""
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil || err != nil || cred.Uid != 0 {
		return ""
	}
	if cred.Pid == 0 {
		return "in a pod, or another pid namespace"
	}
	return fmt.Sprintf("pid %d", cred.Pid)
}
