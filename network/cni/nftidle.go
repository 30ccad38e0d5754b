package cni

import (
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Connections to nf_tables are kept for a while: the kernel does not close one before it has freed what was deleted by then,
// also by others, which takes it some 20 ms.
var idleNFT struct {
	sync.Mutex
	all []*idle // the one that was used last is the last
}

// idle is a connection that nobody uses.
type idle struct {
	conn *nftConn
	end  *time.Timer // closes it
}

const (
	idleTime = 10 * time.Second // after which a connection is closed; its namespace lives as long
	idleMost = 8                // of all namespaces
)

// keep keeps a connection until it is used again or closed.
func keep(c *nftConn) {
	idleNFT.Lock()
	defer idleNFT.Unlock()
	i := &idle{conn: c}
	i.end = time.AfterFunc(idleTime, func() {
		if take(func(other *idle) bool { return other == i }) != nil {
			c.sock.Close()
		}
	})
	if idleNFT.all = append(idleNFT.all, i); len(idleNFT.all) > idleMost {
		oldest := idleNFT.all[0]
		idleNFT.all = idleNFT.all[1:]
		oldest.end.Stop()
		go oldest.conn.sock.Close()
	}
}

// take takes over a connection that is kept, nil if there is none.
func take(wanted func(*idle) bool) *nftConn {
	idleNFT.Lock()
	defer idleNFT.Unlock()
	for n, i := range slices.Backward(idleNFT.all) {
		if wanted(i) {
			idleNFT.all = slices.Delete(idleNFT.all, n, n+1)
			i.end.Stop()
			return i.conn
		}
	}
	return nil
}

// netnsNumber is the number of this thread's network namespace, which no other has while it lives.
func netnsNumber() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}
