package cri

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// busy has calls that last: lists until they are let go, and events without end.
type busy struct {
	cri.UnimplementedRuntimeServiceServer
	called chan struct{} // one for each list
	end    chan struct{}
	full   chan struct{} // closed when more was sent than a client takes that does not read
}

func (b *busy) ListContainers(ctx context.Context, _ *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	b.called <- struct{}{}
	select {
	case <-b.end:
		return &cri.ListContainersResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (b *busy) GetContainerEvents(_ *cri.GetEventsRequest, stream grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	e := &cri.ContainerEventResponse{ContainerId: strings.Repeat("a", 1<<20)}
	for sent := 0; ; sent++ {
		late := time.AfterFunc(time.Second, func() { close(b.full) })
		err := stream.Send(e)
		if !late.Stop() || err != nil {
			return err
		}
	}
}

// serveBusy serves b as Serve does, until stop is called.
func serveBusy(t *testing.T, b *busy, grace time.Duration, log *logBuffer) (client cri.RuntimeServiceClient, stop func()) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(tempDir(t), "s.sock"))
	if err != nil {
		t.Fatal(err)
	}
	i := &interceptor{log: log.logger(), now: time.Now}
	g := grpc.NewServer(grpc.UnaryInterceptor(i.unary), grpc.StreamInterceptor(i.stream), grpc.WaitForHandlers(true))
	cri.RegisterRuntimeServiceServer(g, b)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(); g.Stop() })
	return cri.NewRuntimeServiceClient(conn), func() {
		drain(g, &i.under, grace, log.logger())
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}

// A reader of events that never reads holds up neither the daemon's end nor a call that is under way.
func TestDrainWaitsForCallsAndNotForStreams(t *testing.T) {
	b, log := &busy{called: make(chan struct{}, 1), end: make(chan struct{}), full: make(chan struct{})}, &logBuffer{}
	client, stop := serveBusy(t, b, time.Hour, log)
	if _, err := client.GetContainerEvents(t.Context(), &cri.GetEventsRequest{}); err != nil {
		t.Fatal(err)
	}
	listed := make(chan error, 1)
	go func() {
		_, err := client.ListContainers(t.Context(), &cri.ListContainersRequest{})
		listed <- err
	}()
	<-b.called
	<-b.full
	ended := make(chan struct{})
	go func() { stop(); close(ended) }()
	select {
	case <-ended:
		t.Error("a call under way is not waited for")
	case <-time.After(2 * taken):
	}
	close(b.end)
	if err := <-listed; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the reader is waited for")
	}
}

// A call that does not end is cut off.
func TestDrainCutsOffCallsThatDoNotEnd(t *testing.T) {
	b, log := &busy{called: make(chan struct{}, 1)}, &logBuffer{}
	client, stop := serveBusy(t, b, time.Millisecond, log)
	listed := make(chan error, 1)
	go func() {
		_, err := client.ListContainers(t.Context(), &cri.ListContainersRequest{})
		listed <- err
	}()
	<-b.called
	stop()
	if err := <-listed; status.Code(err) != codes.Unavailable && status.Code(err) != codes.Canceled {
		t.Errorf("the call: %v", err)
	}
	if !strings.Contains(log.String(), "cut off") {
		t.Errorf("nothing is said: %s", log)
	}
}
