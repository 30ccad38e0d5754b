package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/health"
	"github.com/berth-run/berth/proxy/loopback"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
	"github.com/berth-run/berth/proxy/watch"
)

// Source is where changes come from: a watch.Watcher.
type Source interface {
	Wake() <-chan struct{}
	Take() *watch.Batch
}

// Conntrack removes connections that changes have made stale: a conntrack.Cleaner. It is told before the kernel is, and after.
type Conntrack interface {
	Will(*model.Delta)
	WillAll(*model.State)
	Done()
}

// Options are the parts of a proxy. All have to be there but Look, Programmed and Loopback.
type Options struct {
	Model *model.Model
	// Look is locked while the Model changes, for those who look at it from elsewhere; it may be nil.
	Look       sync.Locker
	Source     Source
	Programmer program.Programmer
	Conntrack  Conntrack
	Health     *health.Health
	Metrics    *health.Metrics
	NodePorts  *health.NodePorts
	Loopback   *loopback.Ports // nil: node ports are not served at loopback addresses
	Events     *health.Events
	// Period is how often what is not told of is looked at: addresses of the node, ports that were taken. It bounds how long
	// after a failure the kernel is tried again, too.
	Period time.Duration
	// Programmed is called once, when the kernel has all.
	Programmed func()
	Log        *slog.Logger

	remind time.Duration // for tests; remindEvery if it is 0
}

const (
	// verifyEvery is how often all is compared with the kernel although nothing says that it should differ, as in kube-proxy.
	verifyEvery = time.Hour
	// remindEvery is how often what is wrong with objects is told again, so much of it at most: an API server keeps an Event for an
	// hour, unless it is told of it once more.
	remindEvery = 50 * time.Minute
	maxReminded = 64
	// retryFirst is how long after a failure the kernel is tried again; it doubles up to the period.
	retryFirst = time.Second
	// nodeWithin is how long a node may run before its kubelet has made the Node.
	nodeWithin = 5 * time.Second
)

// runner is the state of Run.
type runner struct {
	Options
	begun  bool          // the kernel was told of everything once
	failed string        // what was said of the last failure; empty while all is well
	delay  time.Duration // until the next try
	retry  <-chan time.Time
	alone  <-chan time.Time // there has been no Node of the name for long
	told   bool             // that was told
	tidy   sync.WaitGroup   // what gives memory of the first load back
}

// Run programs until the context ends. What is in the kernel then stays.
func Run(ctx context.Context, o Options) {
	r := &runner{Options: o, delay: retryFirst}
	defer r.tidy.Wait()
	defer r.NodePorts.Close()
	defer r.Loopback.Close()
	if o.remind == 0 {
		o.remind = remindEvery
	}
	period, all, remind := time.NewTicker(o.Period), time.NewTicker(verifyEvery), time.NewTicker(o.remind)
	defer period.Stop()
	defer all.Stop()
	defer remind.Stop()
	for {
		var changed <-chan string // nothing is mended before it is known what there should be
		if r.begun {
			changed = o.Programmer.Changed()
		}
		select {
		case <-ctx.Done():
			return
		case <-o.Source.Wake():
			if b := o.Source.Take(); b != nil {
				r.take(b)
			}
		case by := <-changed:
			r.Log.Warn("another program has changed the proxy's tables, which are mended", "program", by)
			r.verify()
		case <-r.alone:
			r.alone, r.told = nil, true
			node, _ := r.Model.Node()
			r.Log.Warn("no Node has this name: the node's zone, addresses and pod CIDRs are unknown, and endpoints count as other nodes'; say --hostname-override, or hostnameOverride, as the kubelet does", "node", node)
		case <-r.retry:
			r.retry = nil
			r.verify()
		case <-all.C:
			if r.begun {
				r.verify()
			}
		case <-remind.C:
			all := r.Model.Problems()
			for _, p := range all[:min(len(all), maxReminded)] {
				r.warn(p)
			}
		case <-period.C:
			r.NodePorts.Retry()
			r.Loopback.Retry()
		}
	}
}

// take programs what has changed.
func (r *runner) take(b *watch.Batch) {
	begin, done := time.Now(), r.Health.Begin()
	r.Metrics.Taken()
	if node, ok := b.Node(); ok {
		r.Health.SetNode(node)
	}
	d := r.commit(b)
	if r.Model.HasNode() {
		r.alone, r.told = nil, false
	} else if r.alone == nil && !r.told {
		r.alone = time.After(nodeWithin)
	}
	r.tell(d.Problems)
	var report program.Report
	var err error
	switch full := !r.begun; {
	case full:
		r.begun = true
		r.Conntrack.WillAll(r.Model.State())
		report, err = r.Programmer.Sync(r.Model.State())
		r.finish(full, begin, b, report, err)
		r.tidy.Go(debug.FreeOSMemory) // a load needs several times what is kept, and nothing like it comes again
	case !d.Empty():
		r.Conntrack.Will(&d)
		report, err = r.Programmer.Apply(&d)
		r.finish(full, begin, b, report, err)
	}
	if r.failed == "" {
		done(true)
	} else {
		done(false)
	}
	r.NodePorts.Apply(&d)
	r.Loopback.Apply(&d)
	r.Metrics.Counts(r.Model.State().Counts())
}

// commit has the model know what has changed.
func (r *runner) commit(b *watch.Batch) model.Delta {
	if r.Look != nil {
		r.Look.Lock()
		defer r.Look.Unlock()
	}
	b.Apply(r.Model)
	return r.Model.Commit()
}

// verify compares all with the kernel.
func (r *runner) verify() {
	begin, done := time.Now(), r.Health.Begin()
	report, err := r.Programmer.Verify()
	r.finish(true, begin, nil, report, err)
	done(err == nil)
}

// finish counts what was done, and sees to another try of what was not.
func (r *runner) finish(full bool, begin time.Time, b *watch.Batch, report program.Report, err error) {
	took := time.Since(begin)
	if err != nil {
		r.Metrics.Failed()
		if r.failed != err.Error() {
			r.failed = err.Error()
			r.Log.Error("Services could not be programmed, it is tried again", "error", err)
		}
		r.retry = time.After(r.delay)
		r.delay = min(2*r.delay, max(r.Period, retryFirst))
		return
	}
	var triggers []time.Time
	switch {
	case b == nil:
	case b.First:
		c := r.Model.State().Counts()
		r.Log.Info("Services are programmed", "services", c.Services, "ports", c.Ports, "endpoints", c.Endpoints,
			"changed", report.Elements, "took", took.Round(time.Millisecond).String())
	default: // what happened before the proxy was there is not its delay
		triggers = b.Triggers()
	}
	if r.failed != "" {
		r.Log.Info("Services are programmed again")
	}
	r.failed, r.retry, r.delay = "", nil, retryFirst
	r.Conntrack.Done()
	if r.Programmed != nil {
		r.Programmed()
		r.Programmed = nil
	}
	r.Metrics.Synced(full, took, triggers, report.Transactions, report.Elements)
}

// tell has those who can mend an object see what is wrong with it.
func (r *runner) tell(problems []model.Problem) {
	for _, p := range problems {
		r.Metrics.Problem(p.Kind)
		r.Log.Debug("a part of an object is left out", "problem", p.String())
		r.warn(p)
	}
}

func (r *runner) warn(p model.Problem) {
	r.Events.Warn(health.Reference(p.Kind, p.Object), "PartLeftOut", "Program", p.String())
}

// Queued is for watch.Options: it counts what comes in.
func (o *Options) Queued(kind watch.Kind) {
	o.Health.Queued()
	switch kind {
	case watch.Service:
		o.Metrics.ServiceQueued()
	case watch.EndpointSlice:
		o.Metrics.SliceQueued()
	}
}

// LoopbackFailed is for loopback.Options: it counts, and tells whose node port cannot be listened at.
func (o *Options) LoopbackFailed(service types.NamespacedName, at netip.AddrPort, err error) {
	o.Metrics.LoopbackFailed(at.Addr())
	o.Events.Warn(health.Reference("Service", service), "FailedToListenOnLoopback", "Listen",
		fmt.Sprintf("node %s cannot listen at %s for the node port: %v", o.Events.Node, at, err))
}

// PortFailed is for health.NodePorts: it tells whose port cannot be listened at.
func (o *Options) PortFailed(service types.NamespacedName, port uint16, err error) {
	o.Events.Warn(health.Reference("Service", service), "FailedToStartServiceHealthcheck", "Listen",
		fmt.Sprintf("node %s cannot listen at health check node port %d: %v", o.Events.Node, port, err))
}
