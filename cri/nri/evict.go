package nri

import (
	"context"
	"sync"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
)

// The library has messages for evictions but hands none of them on. So they are read where they pass: in the answers of
// plugins to events, and in what they ask for by themselves.

// evictions are those that the answers to one event ask for.
type evictions struct {
	mu   sync.Mutex
	list []*api.ContainerEviction
}

type evictionsKey struct{}

func collectEvictions(ctx context.Context) (context.Context, *evictions) {
	e := &evictions{}
	return context.WithValue(ctx, evictionsKey{}, e), e
}

func (e *evictions) add(list []*api.ContainerEviction) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, list...)
}

// answered looks into the answer to an event.
func answered(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker) error {
	if err := call(ctx, req, resp); err != nil {
		return err
	}
	e, ok := ctx.Value(evictionsKey{}).(*evictions)
	if !ok || len(resp.GetPayload()) == 0 {
		return nil
	}
	switch req.GetMethod() {
	case "CreateContainer":
		var m api.CreateContainerResponse
		if err := proto.Unmarshal(resp.Payload, &m); err == nil { // the library says what is wrong with it
			e.add(m.Evict)
		}
	case "UpdateContainer":
		var m api.UpdateContainerResponse
		if err := proto.Unmarshal(resp.Payload, &m); err == nil {
			e.add(m.Evict)
		}
	}
	return nil
}

// asked looks into what a plugin asks for by itself.
func (r *Runtime) asked(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, call ttrpc.Method) (any, error) {
	var evict []*api.ContainerEviction
	out, err := call(ctx, func(m any) error {
		err := unmarshal(m)
		if req, ok := m.(*api.UpdateContainersRequest); ok && err == nil {
			evict = req.Evict
		}
		return err
	})
	if err == nil && len(evict) > 0 {
		err = r.evict(evict)
	}
	return out, err
}

// evict ends containers in the background: each end is an event, which the plugin that wants it may have to handle after
// what it does just now.
func (r *Runtime) evict(list []*api.ContainerEviction) error {
	if len(list) == 0 {
		return nil
	}
	return r.background(func(ctx context.Context) {
		for _, e := range list {
			if e.GetContainerId() == "" {
				continue
			}
			if err := r.state.Evict(ctx, e.ContainerId, e.Reason); err != nil {
				r.log.Warn("a container is not evicted as an NRI plugin has asked", "id", e.ContainerId, "reason", e.Reason, "error", err)
			}
		}
	})
}
