package health

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Bounds of Events: a hostile cluster must not have the node write to the API server without end.
const (
	maxEvents   = 256              // that wait
	maxNote     = 1024             // bytes, of the API
	eventEvery  = time.Second / 10 // one at most
	eventWithin = 10 * time.Second
)

// EventWriter has an API server write Events down: a watch.Client.
type EventWriter interface {
	CreateEvent(context.Context, *eventsv1.Event) error
	// RenewEvent is for one that is there: it was seen again.
	RenewEvent(context.Context, *eventsv1.Event) error
}

// Events writes Events down, in the background, and loses those that are too many.
type Events struct {
	To EventWriter
	// Node is the name of the node.
	Node string
	Log  *slog.Logger

	queue chan *eventsv1.Event
}

// NewEvents makes an Events. Run sends them.
func NewEvents(node string, to EventWriter, log *slog.Logger) *Events {
	return &Events{To: to, Node: node, Log: log, queue: make(chan *eventsv1.Event, maxEvents)}
}

// Warn tells of an object that something is wrong with.
func (e *Events) Warn(object corev1.ObjectReference, reason, action, note string) {
	if len(note) > maxNote {
		note = note[:maxNote]
	}
	now := time.Now()
	namespace := object.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	// The name says what it is about: what is told again while it is there, as by a proxy that starts, is counted there.
	sum := sha256.Sum256([]byte(strings.Join([]string{e.Node, object.Kind, reason, note}, "\x00")))
	event := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: object.Name + "." + hex.EncodeToString(sum[:8])},
		EventTime:  metav1.NewMicroTime(now), ReportingController: "berth-proxy", ReportingInstance: "berth-proxy-" + e.Node,
		Action: action, Reason: reason, Regarding: object, Note: note, Type: corev1.EventTypeWarning,
	}
	select {
	case e.queue <- event:
	default:
		e.Log.Debug("an Event is lost, there are too many", "object", object.Name, "note", note)
	}
}

// Run sends until the context ends.
func (e *Events) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-e.queue:
			e.send(ctx, event)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(eventEvery):
		}
	}
}

func (e *Events) send(ctx context.Context, event *eventsv1.Event) {
	ctx, stop := context.WithTimeout(ctx, eventWithin)
	defer stop()
	err := e.To.CreateEvent(ctx, event)
	if apierrors.IsAlreadyExists(err) {
		err = e.To.RenewEvent(ctx, event)
	}
	if err != nil {
		e.Log.Debug("an Event was not written", "object", event.Regarding.Name, "error", err)
	}
}

// Reference names an object of a kind that the proxy reads.
func Reference(kind string, name types.NamespacedName) corev1.ObjectReference {
	version := "v1"
	switch kind {
	case "EndpointSlice":
		version = "discovery.k8s.io/v1"
	case "ServiceCIDR":
		version = "networking.k8s.io/v1"
	}
	return corev1.ObjectReference{APIVersion: version, Kind: kind, Namespace: name.Namespace, Name: name.Name}
}
