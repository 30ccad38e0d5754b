package iptables

import (
	"sync/atomic"
	"time"

	"github.com/berth-run/berth/proxy/model"
)

// watcher sees that the tables were flushed, as firewalld does it: the kernel tells nobody, so a chain that has no other purpose
// is looked for.
type watcher struct {
	changed chan string
	planted [model.Families]atomic.Bool // the chain was there once
	stop    chan struct{}
	done    chan struct{}
}

func watch(p *Programmer) *watcher {
	w := &watcher{changed: make(chan string, 1), stop: make(chan struct{}), done: make(chan struct{})}
	go w.run(p)
	return w
}

func (w *watcher) run(p *Programmer) {
	defer close(w.done)
	tick := time.NewTicker(p.Period)
	defer tick.Stop()
	for {
		select {
		case <-w.stop:
			return
		case <-tick.C:
		}
		for f := range model.Family(model.Families) {
			if w.planted[f].Load() && p.flushed(f) {
				select {
				case w.changed <- "":
				default:
				}
			}
		}
	}
}

func (w *watcher) close() {
	close(w.stop)
	<-w.done
}

// A flush takes one table after the other: it is waited for so long until all have lost the chain.
const (
	flushTimeout = 5 * time.Second
	flushPoll    = 100 * time.Millisecond
)

// flushed says whether a family's tables have lost the chain. A program that cannot say it says no: the kernel is asked again.
func (p *Programmer) flushed(f model.Family) bool {
	lost := func(t table) (lost bool) {
		_ = p.enter(func() error {
			there, err := p.programs(f).canaryThere(t)
			lost = !there && err == nil
			return nil
		})
		return lost
	}
	for end := time.Now().Add(flushTimeout); lost(mangle); time.Sleep(flushPoll) {
		if lost(nat) && lost(filter) || time.Now().After(end) {
			return true
		}
	}
	return false // it is there, or has been mended meanwhile
}
