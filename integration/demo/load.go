package main

import (
	"context"
	"time"
)

// load makes one request after another until it is stopped or one fails.
type load struct {
	cancel context.CancelFunc
	ended  chan struct{}
	done   int
	err    error
}

func startLoad(ctx context.Context, url string) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			// The last request is let finish: cut off by the end of the load it would look like one that failed.
			if _, err := fetch(context.WithoutCancel(ctx), url); err != nil {
				l.err = err
				return
			}
			l.done++
		}
	}()
	return l
}

// stop ends the load and tells how many requests were answered, and the failure that ended it before.
func (l *load) stop() (int, error) {
	l.cancel()
	<-l.ended
	return l.done, l.err
}
