package pods

import (
	"context"
	"time"

	"github.com/berth-run/berth/internal/step"
)

// What a pod that has ended still holds, since a step could not be undone, is tried again in the background: whoever asked
// for it may never ask again.

const (
	retryFirst = 5 * time.Second // twice as long each time
	retryLast  = 5 * time.Minute
	// letGoAfter is how long a pod stays for its network's sake. The network is released without it then: its plugin may
	// have been uninstalled.
	letGoAfter = time.Minute
)

// retry is guarded by the pod's mu.
type retry struct {
	waiting *Waiting
	rounds  int // of the background
	running bool
}

// tryAgain notes that something could not be released. Those who ask for it more often than it is tried in the background do
// not put that off, nor fill the log.
func (p *pod) tryAgain(cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return
	}
	now, was := time.Now(), p.again.waiting
	w := Waiting{For: cause.Error(), Since: now, Tries: 1}
	if was != nil {
		w = Waiting{For: w.For, Since: was.Since, Tries: was.Tries + 1, Next: was.Next}
	}
	if now.After(w.Next) {
		w.Next = now.Add(retryAfter(p.again.rounds))
		p.again.rounds++
		p.m.log.Warn("what a pod holds cannot be released yet; it is tried again", "pod", name(p.rec.Config.M), "id", p.rec.ID,
			"since", w.Since, "tries", w.Tries, "next", w.Next, "error", cause)
	}
	p.again.waiting = &w
	p.publish()
	if !p.again.running {
		p.again.running = true
		// Nobody waits for its end: a plugin that hangs must not hold up the daemon's, and the next one begins anew.
		go p.keepTrying()
	}
}

// retryAfter is how long to wait after that many rounds.
func retryAfter(rounds int) time.Duration {
	return min(retryFirst<<min(rounds, 10), retryLast)
}

// released notes that all of it is.
func (p *pod) released() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.again.waiting; w != nil {
		p.again.waiting, p.again.rounds = nil, 0
		p.publish()
		p.m.log.Info("what a pod held is released", "pod", name(p.rec.Config.M), "id", p.rec.ID, "since", w.Since, "tries", w.Tries+1)
	}
}

func (p *pod) keepTrying() {
	for {
		p.mu.Lock()
		w := p.again.waiting
		if w == nil || p.gone {
			p.again.running = false
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		select {
		case <-p.m.closing:
			return
		case <-time.After(time.Until(w.Next)):
			p.retryNow()
		}
	}
}

// retryNow does what is due, unless somebody else has done it meanwhile.
func (p *pod) retryNow() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*step.DefaultTimeout)
	defer cancel()
	if p.lock.Lock(ctx) != nil {
		return // somebody is at it
	}
	defer p.lock.Unlock()
	if p.view.Load().Waiting == nil {
		return
	}
	switch rec := p.record(); rec.Phase {
	case removing:
		_ = p.remove(ctx) // stop has noted the error
	case stopped:
		_ = p.stop(ctx, "Retry", rec.Reason)
	default:
		p.released() // it holds what it uses
	}
}

// longEnough tells whether the pod has waited for its network as long as it has to.
func (p *pod) longEnough() bool {
	w := p.view.Load().Waiting
	return w != nil && time.Since(w.Since) >= letGoAfter
}
