package admin

import (
	"log/slog"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// ownUser is a listener on a unix socket that hangs up on other users than the daemon's own, which is root.
type ownUser struct {
	net.Listener
	log *slog.Logger
}

// Accept implements net.Listener.
func (l ownUser) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, err := peerOf(c)
		if err == nil && peer.Uid == uint32(os.Geteuid()) {
			return c, nil
		}
		if err != nil {
			l.log.Warn("a client of the admin socket is sent away: who it is cannot be told", "error", err)
		} else {
			l.log.Warn("a client of the admin socket is sent away", "uid", peer.Uid, "pid", peer.Pid)
		}
		_ = c.Close()
	}
}

// peerOf asks the kernel who was at the other end when it connected.
func peerOf(c net.Conn) (*unix.Ucred, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, os.ErrInvalid
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	return cred, os.NewSyscallError("getsockopt SO_PEERCRED", cerr)
}
