package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/cri/streaming"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/network"
)

// maxMessage is the size of a message either way. The kubelet's client takes 16 MiB (k8s.io/cri-client/pkg/utils.go);
// gRPC's own default is 4.
const maxMessage = 16 << 20

// helloTimeout is how long a client may say nothing after it has connected. The library's two minutes would be how long one
// that never does holds up the end of the daemon.
const helloTimeout = 5 * time.Second

// Options of a [Server]. All fields but Info and NodeRoutes are required.
type Options struct {
	Pods      *pods.Manager
	Images    *images.Store
	Network   *network.Manager
	Streaming *streaming.Server
	// CgroupDriver is what RuntimeConfig tells the kubelet.
	CgroupDriver cgroups.Driver
	// RecursiveReadOnly says whether the kernel makes mounts read-only recursively (5.12).
	RecursiveReadOnly bool
	// UserNamespaces says whether pods can have user namespaces of their own.
	UserNamespaces bool
	// Info is shown by a verbose Status: the effective configuration, without secrets.
	Info any
	// NodeRoutes, if not nil, says how routes to other nodes are, for a verbose Status.
	NodeRoutes func() any
	Log        *slog.Logger
}

// Server answers the calls of both services of CRI v1.
type Server struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer

	pods      *pods.Manager
	images    *images.Store
	network   *network.Manager
	streaming *streaming.Server
	driver    cgroups.Driver
	handlers  []*cri.RuntimeHandler
	userns    bool
	info      any
	routes    func() any
	rates     rates
	log       *slog.Logger
	stopping  chan struct{} // closed when Serve is told to stop: what would go on for ever ends
}

// New makes a server of the packages that do the work.
func New(o Options) *Server {
	return &Server{
		pods: o.Pods, images: o.Images, network: o.Network, streaming: o.Streaming,
		driver:   o.CgroupDriver,
		handlers: runtimeHandlers(o.RecursiveReadOnly, o.UserNamespaces),
		userns:   o.UserNamespaces,
		info:     o.Info,
		routes:   o.NodeRoutes,
		log:      o.Log,
		stopping: make(chan struct{}),
	}
}

// Serve answers calls on l until ctx ends. Calls under way then have ten seconds to end, and streams end at once; pods go on
// running. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	i := &interceptor{log: s.log, now: time.Now}
	d := newDecoder(s.log)
	g := grpc.NewServer(
		grpc.ForceServerCodecV2(d),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(i.unary), grpc.StreamInterceptor(i.stream),
		grpc.WaitForHandlers(true), grpc.ConnectionTimeout(helloTimeout),
	)
	g.RegisterService(d.strict(cri.RuntimeService_ServiceDesc), s)
	g.RegisterService(d.strict(cri.ImageService_ServiceDesc), s)

	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	close(s.stopping)
	drain(g, &i.under, graceful, s.log)
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}
