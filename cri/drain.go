package cri

import (
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
)

const (
	// graceful is how long calls under way may go on once the server is told to stop. The kubelet repeats what is cut off.
	graceful = 10 * time.Second
	// taken is how long their callers may take to read the last answers, and what is left of streams. There are some who
	// never read.
	taken = 500 * time.Millisecond
)

// drain stops a server: it takes no new calls, and returns when those under way have ended, or were cut off after grace.
func drain(g *grpc.Server, under *underWay, grace time.Duration, log *slog.Logger) {
	stopped := make(chan struct{})
	go func() { g.GracefulStop(); close(stopped) }()
	late := time.NewTimer(grace)
	defer late.Stop()
	select {
	case <-stopped:
		return
	case <-under.none():
		late.Reset(taken)
		select {
		case <-stopped:
			return
		case <-late.C:
		}
	case <-late.C:
		log.Warn("calls did not end in time and are cut off", "after", grace)
	}
	g.Stop() // ends the contexts of the calls, then waits for them
	<-stopped
}

// underWay counts calls. Streams are none of them: an endless one is told to end, and a list is soon asked for again.
type underWay struct {
	mu   sync.Mutex
	n    int
	zero chan struct{} // closed when there is none; nil while nobody waits for that
}

// begin counts a call until end is called.
func (u *underWay) begin() (end func()) {
	u.add(1)
	return func() { u.add(-1) }
}

func (u *underWay) add(n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.n += n
	if u.n == 0 && u.zero != nil {
		close(u.zero)
		u.zero = nil
	}
}

// none returns a channel that is closed as soon as there is no call.
func (u *underWay) none() <-chan struct{} {
	zero := make(chan struct{})
	u.mu.Lock()
	u.zero = zero
	u.mu.Unlock()
	u.add(0)
	return zero
}
