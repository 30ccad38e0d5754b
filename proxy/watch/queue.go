package watch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/berth-run/berth/proxy/model"
)

// key names an object.
type key struct {
	kind Kind
	name types.NamespacedName
}

// queue is what has changed and was not handed on yet.
type queue struct {
	node   string
	queued func(Kind)
	wake   chan struct{} // holds a value while take has something

	mu      sync.Mutex
	pending map[key]metav1.Object // nil for what has gone
	since   time.Time             // when the oldest of pending came in
	names   [kinds]map[types.NamespacedName]struct{}
	listed  [kinds]bool
	first   bool // nothing was handed on yet
}

func newQueue(node string, queued func(Kind)) *queue {
	q := &queue{node: node, queued: queued, wake: make(chan struct{}, 1), pending: map[key]metav1.Object{}, first: true}
	for k := range q.names {
		q.names[k] = map[types.NamespacedName]struct{}{}
	}
	return q
}

// set notes an object that is there.
func (q *queue) set(kind Kind, obj any) error {
	o, ok := known(kind, obj)
	if !ok {
		return fmt.Errorf("%T is no %s, or has no name", obj, kind)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.put(kind, o)
	return nil
}

// put has the lock.
func (q *queue) put(kind Kind, o metav1.Object) {
	if kind == Node && o.GetName() != q.node {
		return // of a server that takes no notice of what was asked for
	}
	_, _ = trim(o)
	q.names[kind][nameOf(o)] = struct{}{}
	q.note(kind, nameOf(o), o)
}

// drop notes an object that has gone.
func (q *queue) drop(kind Kind, obj any) error {
	o, ok := known(kind, obj)
	if !ok {
		return fmt.Errorf("%T is no %s, or has no name", obj, kind)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.names[kind][nameOf(o)]; ok {
		delete(q.names[kind], nameOf(o))
		q.note(kind, nameOf(o), nil)
	}
	return nil
}

// replace notes a whole list, in one go: what is not in it has gone.
func (q *queue) replace(kind Kind, list []any) error {
	there := make(map[types.NamespacedName]metav1.Object, len(list))
	for _, obj := range list {
		o, ok := known(kind, obj)
		if !ok {
			return fmt.Errorf("a list of %s has a %T, or one without a name", kind, obj)
		}
		there[nameOf(o)] = o
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, o := range there {
		q.put(kind, o)
	}
	for name := range q.names[kind] {
		if there[name] == nil {
			delete(q.names[kind], name)
			q.note(kind, name, nil)
		}
	}
	q.listed[kind] = true
	q.poke()
	return nil
}

// absent notes a kind that the API server does not have.
func (q *queue) absent(kind Kind) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.listed[kind] = true
	q.poke()
}

// note has the lock.
func (q *queue) note(kind Kind, name types.NamespacedName, o metav1.Object) {
	if len(q.pending) == 0 {
		q.since = time.Now()
	}
	q.pending[key{kind, name}] = o
	if q.queued != nil {
		q.queued(kind)
	}
	q.poke()
}

// poke has the lock.
func (q *queue) poke() {
	if q.ready() {
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
}

// ready has the lock: whether there is something to hand on.
func (q *queue) ready() bool {
	for _, listed := range q.listed {
		if !listed {
			return false
		}
	}
	return q.first || len(q.pending) > 0
}

func (q *queue) take() *Batch {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.ready() {
		return nil
	}
	b := &Batch{First: q.first, Since: q.since, changes: q.pending}
	q.pending, q.first, q.since = map[key]metav1.Object{}, false, time.Time{}
	return b
}

func (q *queue) next(ctx context.Context) (*Batch, error) {
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-q.wake:
			if b := q.take(); b != nil {
				return b, nil
			}
		}
	}
}

func nameOf(o metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}
}

// Batch is what has changed, each object with its last word.
type Batch struct {
	// First is whether it is all there is.
	First bool
	// Since is when the oldest of its changes came in; zero if it has none.
	Since   time.Time
	changes map[key]metav1.Object
}

// Len is how many objects of a kind have changed.
func (b *Batch) Len(kind Kind) int {
	n := 0
	for k := range b.changes {
		if k.kind == kind {
			n++
		}
	}
	return n
}

// Node is the node's own Node, if that is among what has changed: nil with true if it has gone.
func (b *Batch) Node() (*corev1.Node, bool) {
	for k, o := range b.changes {
		if k.kind == Node {
			node, _ := o.(*corev1.Node)
			return node, true
		}
	}
	return nil, false
}

// Triggers are when what has led to changes of slices happened, as far as their controller says so (the annotation
// endpoints.kubernetes.io/last-change-trigger-time).
func (b *Batch) Triggers() []time.Time {
	var out []time.Time
	for k, o := range b.changes {
		if k.kind != EndpointSlice || o == nil {
			continue
		}
		if t, err := time.Parse(time.RFC3339Nano, o.GetAnnotations()[corev1.EndpointsLastChangeTriggerTime]); err == nil {
			out = append(out, t)
		}
	}
	return out
}

// Apply has a model know of it. It does not commit.
func (b *Batch) Apply(m *model.Model) {
	for k, obj := range b.changes {
		switch o := obj.(type) {
		case *corev1.Service:
			m.SetService(o)
		case *discoveryv1.EndpointSlice:
			m.SetSlice(o)
		case *networkingv1.ServiceCIDR:
			m.SetServiceCIDR(o)
		case *corev1.Node:
			m.SetNode(o)
		default:
			remove(m, k)
		}
	}
}

func remove(m *model.Model, k key) {
	switch k.kind {
	case Service:
		m.DeleteService(k.name)
	case EndpointSlice:
		m.DeleteSlice(k.name)
	case ServiceCIDR:
		m.DeleteServiceCIDR(k.name.Name)
	case Node:
		m.SetNode(nil)
	}
}

// store hands what a reflector sees on to the queue.
type store struct {
	kind  Kind
	queue *queue
}

var _ cache.TransformingStore = (*store)(nil)

func (s *store) Add(obj any) error                { return s.queue.set(s.kind, obj) }
func (s *store) Update(obj any) error             { return s.queue.set(s.kind, obj) }
func (s *store) Delete(obj any) error             { return s.queue.drop(s.kind, obj) }
func (s *store) Resync() error                    { return nil }
func (s *store) Transformer() cache.TransformFunc { return trim }

// Replace refuses a list without a revision: an API server always has one, so it is no list of all there is.
func (s *store) Replace(list []any, revision string) error {
	if revision == "" {
		return errors.New("the list of " + s.kind.String() + " has no revision")
	}
	return s.queue.replace(s.kind, list)
}

// NewBatch makes a Batch of objects that are there: Services, EndpointSlices, ServiceCIDRs and Nodes.
func NewBatch(first bool, objects ...metav1.Object) *Batch {
	b := &Batch{First: first, changes: map[key]metav1.Object{}}
	for _, o := range objects {
		for kind := range kinds {
			if _, ok := known(kind, o); ok {
				b.changes[key{kind, nameOf(o)}] = o
			}
		}
	}
	return b
}
