package cadvisor

import (
	"net"
	"os"
	"sync"
)

// Own has a listener on a unix socket remove the socket when it closes only while that still is its own: containerd, once
// it is started, takes its path whoever listens there.
func Own(l net.Listener) net.Listener {
	u, ok := l.(*net.UnixListener)
	if !ok {
		return l
	}
	u.SetUnlinkOnClose(false)
	info, _ := os.Lstat(u.Addr().String()) // nil: gone already, so that there is nothing to remove
	return &owned{UnixListener: u, info: info}
}

type owned struct {
	*net.UnixListener
	info os.FileInfo
	once sync.Once
}

// Close implements net.Listener.
func (o *owned) Close() error {
	o.once.Do(func() {
		path := o.Addr().String()
		if now, err := os.Lstat(path); err == nil && o.info != nil && os.SameFile(now, o.info) {
			_ = os.Remove(path) // whoever listens there next replaces it
		}
	})
	return o.UnixListener.Close()
}
