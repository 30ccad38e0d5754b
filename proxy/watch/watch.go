package watch

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// Options are what to watch.
type Options struct {
	// Node is the name of the node's own Node.
	Node string
	// Log gets what an operator can act on; none if it is nil.
	Log *slog.Logger
	// Queued, if it is not nil, is called for each change as it comes in, from any goroutine.
	Queued func(Kind)
}

// Watcher watches until Run's context ends.
type Watcher struct {
	sources [kinds]source
	log     *slog.Logger
	queue   *queue

	mu     sync.Mutex
	failed [kinds]bool // the last answer was an error
	ended  [kinds]bool // the last connection ended without an answer
	silent bool        // that was told
	since  time.Time   // when the first of failed did
	err    error       // of the last that failed
}

// New makes a Watcher. Nothing is asked for before Run.
func New(c *Client, o Options) *Watcher {
	w := &Watcher{sources: sources(c, o.Node), log: o.Log, queue: newQueue(o.Node, o.Queued)}
	if w.log == nil {
		w.log = slog.New(slog.DiscardHandler)
	}
	return w
}

// Run watches until the context ends, and returns when nothing of it is left.
func (w *Watcher) Run(ctx context.Context) {
	var all sync.WaitGroup
	for kind := range kinds {
		all.Go(func() { w.reflector(kind).RunWithContext(ctx) })
	}
	all.Wait()
}

func (w *Watcher) reflector(kind Kind) *cache.Reflector {
	src := &w.sources[kind]
	return cache.NewReflectorWithOptions(w.listWatch(kind), src.object, &store{kind: kind, queue: w.queue},
		cache.ReflectorOptions{Name: "proxy", TypeDescription: kind.String()})
}

// Next waits for a change, and returns all that has changed since the last call. The first call waits until all was listed, and
// returns all of it, which may be nothing. An error is that of the context.
func (w *Watcher) Next(ctx context.Context) (*Batch, error) { return w.queue.next(ctx) }

// Wake has a value when Next has something to return.
func (w *Watcher) Wake() <-chan struct{} { return w.queue.wake }

// Take returns what has changed since the last call of Next or Take; nil if there is nothing, or not all was listed yet.
func (w *Watcher) Take() *Batch { return w.queue.take() }

// Silent is since when the API server has not told what changes of some kind, and the last error; without an error it does.
func (w *Watcher) Silent() (since time.Time, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.since, w.err
}

// noAnswer is what the client makes of a connection that ends, or times out, before it is answered: a watch without an error that is
// over at once.
var noAnswer = reflect.TypeOf(watch.NewEmptyWatch())

// listWatch asks for a kind, and notes whether it was answered.
func (w *Watcher) listWatch(kind Kind) cache.ListerWatcher {
	src := &w.sources[kind]
	selected := func(o metav1.ListOptions) metav1.ListOptions {
		o.LabelSelector, o.FieldSelector = src.labels, src.fields
		return o
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o, list := selected(o), src.list()
			err := src.client.Get().Resource(src.resource).VersionedParams(&o, metav1.ParameterCodec).Do(ctx).Into(list)
			w.answered(ctx, kind, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o = selected(o)
			o.Watch = true
			events, err := src.client.Get().Resource(src.resource).VersionedParams(&o, metav1.ParameterCodec).Watch(ctx)
			answer := err
			if err == nil && reflect.TypeOf(events) == noAnswer {
				answer = io.EOF
			}
			w.answered(ctx, kind, answer)
			if err != nil && o.SendInitialEvents != nil && utilnet.IsConnectionRefused(err) {
				// The client would wait for up to half a minute, and for no context. For another error it lists, and waits for both.
				err = errors.New(err.Error())
			}
			return events, err
		},
	}
}

// answered tells when the API server does not answer, and when it does again, and takes it that a kind which the server does
// not have has no objects.
func (w *Watcher) answered(ctx context.Context, kind Kind, err error) {
	if ctx.Err() != nil {
		return
	}
	if apierrors.IsNotFound(err) && w.sources[kind].optional {
		w.queue.absent(kind)
		err = nil
	}
	if err != nil && retried(err) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	// A server that stops ends connections. One that does so again and again is a load balancer without a server behind it.
	again := w.ended[kind]
	w.ended[kind] = errors.Is(err, io.EOF)
	if w.ended[kind] && !again {
		return
	}
	w.failed[kind] = err != nil
	any := false
	for _, f := range w.failed {
		any = any || f
	}
	switch {
	case err != nil:
		if w.err == nil {
			w.since = time.Now()
		}
		w.err = fmt.Errorf("%s: %w", kind, err)
	case !any:
		w.since, w.err = time.Time{}, nil
	}
	switch {
	case err != nil && !w.silent:
		hint := ""
		var invalid x509.CertificateInvalidError
		switch {
		case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
			hint = "this node's clock is wrong, or the API server's certificate has expired"
		case apierrors.IsForbidden(err):
			hint = "the proxy needs the rights list and watch, see examples/proxy"
		case apierrors.IsUnauthorized(err):
			hint = "the API server does not take the proxy's token or certificate: see the kubeconfig's user, or the pod's service account"
		}
		w.log.Warn("the API server does not tell what has changed: Services stay as they are", "kind", kind.String(), "error", err, "hint", hint)
		w.silent = true
	case !any && w.silent:
		w.log.Info("the API server tells what has changed again")
		w.silent = false
	}
}

// retried are errors that are part of how lists and watches work: the client asks anew in another way, at once.
func retried(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || apierrors.IsInvalid(err) || apierrors.IsTooManyRequests(err) ||
		apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge)
}
