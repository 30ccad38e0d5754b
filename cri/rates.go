package cri

import (
	"sync"
	"time"
)

// rateWindow is how long apart two readings of CPU time must be for a rate: closer together, it says more about the moment
// of asking than about the load.
const rateWindow = time.Second

// rates derives CPU rates from the readings that are asked for anyway. Each is that of the last window, whoever asks in
// between; the first is that of the life so far.
type rates struct {
	mu  sync.Mutex
	all map[string]*rate
}

type rate struct {
	at        time.Time // of the reading that the next window begins with
	used      uint64
	nanoCores uint64
}

// nanoCores notes that the container or pod of that id had used that much CPU time at a time, and says how much it uses per
// second.
func (r *rates) nanoCores(id string, born, at time.Time, used uint64) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := r.all[id]
	if last == nil || used < last.used { // its cgroup is a new one, or not all of it can be read any more
		if r.all == nil {
			r.all = map[string]*rate{}
		}
		last = &rate{at: at, used: used}
		r.all[id] = last
		if window := at.Sub(born); window > 0 {
			last.nanoCores = perSecond(used, window)
		}
		return last.nanoCores
	}
	if window := at.Sub(last.at); window >= rateWindow {
		last.nanoCores = perSecond(used-last.used, window)
		last.at, last.used = at, used
	}
	return last.nanoCores
}

func perSecond(nanos uint64, window time.Duration) uint64 {
	return uint64(float64(nanos) / float64(window) * float64(time.Second))
}

// keep forgets all but the ids that exist, once there are many others.
func (r *rates) keep(exist int, does func(id string) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) <= 2*exist+64 {
		return
	}
	for id := range r.all {
		if !does(id) {
			delete(r.all, id)
		}
	}
}
