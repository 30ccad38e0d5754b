package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/adaptation/builtin"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"github.com/containerd/ttrpc"
)

// RequestTimeout is what a plugin may take to answer one request. The library's own two seconds are too short for one that
// takes in the state of a busy node, and who is dropped then misses what happens meanwhile.
const RequestTimeout = 10 * time.Second

// registrationTimeout is what it may take to register after it has connected.
const registrationTimeout = 5 * time.Second

// Options of [Open].
type Options struct {
	Socket  string // that plugins connect to; "" is no NRI at all
	Plugins string // directory of plugins that are started with the daemon; "" is none
	Config  string // directory of their configuration
	Version string // of the runtime, as plugins are told
	// RequestTimeout is that of plugins, if not zero.
	RequestTimeout time.Duration
	// InjectCDI adds devices of the Container Device Interface to a specification. Nil: plugins cannot ask for any.
	InjectCDI CDIInjector
	Log       *slog.Logger
}

// State is the runtime behind the interface, as plugins see it.
type State interface {
	// Known returns the pods and containers that plugins have been told of, or would have been.
	Known() ([]*api.PodSandbox, []*api.Container)
	// Update changes the resources of a container, at a plugin's wish.
	Update(ctx context.Context, id string, r *api.LinuxResources) error
	// Evict ends a container, at a plugin's wish.
	Evict(ctx context.Context, id, reason string) error
}

// Runtime is the daemon's end of NRI. A nil Runtime is one without plugins.
type Runtime struct {
	o       Options
	log     *slog.Logger
	state   State
	library *adaptation.Adaptation
	place   *place
	plugins atomic.Int32
	begin   sync.RWMutex // held by Start: plugins that it starts come between two events, too

	ctx    context.Context // of what plugins have asked for and nobody waits for
	stop   context.CancelFunc
	mu     sync.Mutex
	closed bool
	later  int // of that, how many are under way
	work   sync.WaitGroup
}

// maxLater bounds what plugins may have under way that nobody waits for.
const maxLater = 256

// Open prepares the interface; nothing is started or listened on before [Runtime.Start]. Without a socket it returns nil.
func Open(o Options) (*Runtime, error) {
	if o.Socket == "" {
		return nil, nil
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.RequestTimeout == 0 {
		o.RequestTimeout = RequestTimeout
	}
	r := &Runtime{o: o, log: o.Log}
	said.Store(slog.New(slog.DiscardHandler)) // it is an error to the library that we are built without WebAssembly
	defer said.Store(o.Log)
	p, err := newPlace(o.Socket)
	if err != nil {
		return nil, err
	}
	r.place = p
	adaptation.SetPluginRequestTimeout(o.RequestTimeout)
	adaptation.SetPluginRegistrationTimeout(registrationTimeout)
	r.library, err = adaptation.New("berth", o.Version, r.synchronize, r.unsolicited,
		adaptation.WithSocketPath(p.libraryPath()),
		adaptation.WithPluginPath(o.Plugins), adaptation.WithPluginConfigPath(o.Config),
		adaptation.WithMetrics(counter{&r.plugins}),
		adaptation.WithTTRPCOptions(
			[]ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(answered)},
			[]ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(r.asked)},
		),
		adaptation.WithBuiltinPlugins(&builtin.BuiltinPlugin{
			Base: "berth", Index: "00", Handlers: builtin.BuiltinHandlers{ValidateContainerAdjustment: r.validate},
		}))
	if err != nil {
		return nil, fmt.Errorf("nri: %w", err)
	}
	r.ctx, r.stop = context.WithCancel(context.Background())
	return r, nil
}

// Start starts the plugins that are installed, tells them what is there, and listens for others.
func (r *Runtime) Start(state State) error {
	if r == nil {
		return nil
	}
	r.begin.Lock()
	defer r.begin.Unlock()
	r.state = state
	if err := r.place.prepare(); err != nil {
		return err
	}
	if err := r.library.Start(); err != nil {
		r.library.Stop()
		return errors.Join(fmt.Errorf("nri: %w", err), r.place.remove())
	}
	if err := r.place.publish(); err != nil {
		r.library.Stop()
		return errors.Join(err, r.place.remove())
	}
	return nil
}

// Close ends the plugins that Start has started, takes the socket away and waits for what plugins have asked for.
func (r *Runtime) Close() error {
	if r == nil {
		return nil
	}
	r.library.Stop()
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.stop()
	r.work.Wait()
	return r.place.remove()
}

// Enter begins something that plugins may be told of. Until leave is called no plugin is on its way in: it either has been
// there before, as plugins says, or will be given all that is there once it can come.
func (r *Runtime) Enter() (leave func(), plugins bool) {
	if r == nil {
		return func() {}, false
	}
	r.begin.RLock()
	block := r.library.BlockPluginSync()
	return func() {
		block.Unblock()
		r.begin.RUnlock()
	}, r.Active()
}

// Active says whether there are plugins. It can change at any time but between [Runtime.Enter] and its end.
func (r *Runtime) Active() bool { return r != nil && r.plugins.Load() > 1 } // one is our own, which validates

// synchronize tells a plugin what is there. No event is under way meanwhile, see Enter.
func (r *Runtime) synchronize(ctx context.Context, tell adaptation.SyncCB) error {
	return r.guard("synchronize", func() error {
		pods, containers := r.state.Known()
		updates, err := tell(ctx, pods, containers)
		if err != nil {
			return err
		}
		// Not here: an update may have to wait for a call that waits for this to end.
		return r.background(func(ctx context.Context) { r.apply(ctx, updates) })
	})
}

// background does what a plugin has asked for without letting anybody wait.
func (r *Runtime) background(do func(context.Context)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return errors.New("nri: the runtime is shutting down")
	case r.later >= maxLater:
		return fmt.Errorf("nri: %d wishes of plugins are under way, no more are taken", r.later)
	}
	r.later++
	r.work.Go(func() {
		defer func() {
			r.mu.Lock()
			r.later--
			r.mu.Unlock()
		}()
		do(r.ctx)
	})
	return nil
}

// unsolicited is a plugin that wants containers changed out of the blue. It returns those which could not be.
func (r *Runtime) unsolicited(ctx context.Context, updates []*api.ContainerUpdate) (failed []*api.ContainerUpdate, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.o.RequestTimeout)
	defer cancel()
	err = r.guard("UpdateContainers", func() error {
		failed = r.apply(ctx, updates)
		return nil
	})
	return failed, err
}

// apply makes the updates one after the other and returns those that failed although they must not.
func (r *Runtime) apply(ctx context.Context, updates []*api.ContainerUpdate) (failed []*api.ContainerUpdate) {
	for _, u := range updates {
		if u.GetContainerId() == "" || u.GetLinux().GetResources() == nil {
			continue
		}
		err := checkResources(u.Linux.Resources)
		if err == nil {
			err = r.state.Update(ctx, u.ContainerId, u.Linux.Resources)
		}
		if err != nil {
			r.log.Warn("a container is not updated as an NRI plugin has asked", "id", u.ContainerId, "error", err)
			if !u.IgnoreFailure {
				failed = append(failed, u)
			}
		}
	}
	return failed
}

// guard turns a panic into an error, and its stack into a line of the log: the library dereferences what plugins send.
func (r *Runtime) guard(what string, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			r.log.Error("panic over what an NRI plugin has sent", "event", what, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = fmt.Errorf("%s: panic: %v", what, p)
		}
	}()
	return f()
}

// counter keeps the number of plugins, of all that the library counts.
type counter struct{ n *atomic.Int32 }

func (c counter) UpdatePluginCount(n int)                        { c.n.Store(int32(n)) }
func (counter) RecordPluginInvocation(_, _ string, _ error)      {}
func (counter) RecordPluginLatency(_, _ string, _ time.Duration) {}
func (counter) RecordPluginAdjustments(_, _ string, _ *adaptation.ContainerAdjustment, _, _ int) {
}

// said is where the library's lines go: it has one logger for the whole process, which must not change while it runs.
var said atomic.Pointer[slog.Logger]

func init() {
	said.Store(slog.Default())
	nrilog.Set(logger{})
}

// logger gives the library's lines to slog. What it says of its own life is of interest to whoever looks into it only.
type logger struct{}

func (logger) Debugf(ctx context.Context, format string, args ...any) {
	said.Load().DebugContext(ctx, "nri: "+fmt.Sprintf(format, args...))
}

func (logger) Infof(ctx context.Context, format string, args ...any) {
	said.Load().DebugContext(ctx, "nri: "+fmt.Sprintf(format, args...))
}

func (logger) Warnf(ctx context.Context, format string, args ...any) {
	said.Load().WarnContext(ctx, "nri: "+fmt.Sprintf(format, args...))
}

func (logger) Errorf(ctx context.Context, format string, args ...any) {
	said.Load().ErrorContext(ctx, "nri: "+fmt.Sprintf(format, args...))
}
