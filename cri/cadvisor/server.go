package cadvisor

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/internal/version"
)

// Pods is what is asked about.
type Pods interface {
	Sandbox(id string) (*pods.Sandbox, error)
	Container(id string) (*pods.Container, error)
}

// Options of a [Server].
type Options struct {
	Pods Pods
	// Image names the image of a container, SandboxImage that of all sandboxes.
	Image        func(*pods.Container) string
	SandboxImage string
	CRI          string // path of the socket where the CRI is served, for those who take this one for it
	Log          *slog.Logger
}

// Server answers containers.Get, tasks.Get and version.Version.
type Server struct {
	grpc *grpc.Server
}

// namespace is containerd's for Kubernetes. In others there is nothing.
const namespace = "k8s.io"

// maxRequest is far more than an id takes.
const maxRequest = 16 << 10

// maxCalls bounds the calls at once on a connection: cAdvisor makes one for each of its containers at most.
const maxCalls = 64

// helloTimeout is how long a client may say nothing after it has connected, and so hold up the end of the daemon.
const helloTimeout = 5 * time.Second

// New makes a server.
func New(o Options) *Server {
	g := grpc.NewServer(grpc.MaxRecvMsgSize(maxRequest), grpc.MaxConcurrentStreams(maxCalls), grpc.ConnectionTimeout(helloTimeout),
		grpc.ChainUnaryInterceptor(o.guard, inNamespace), grpc.UnknownServiceHandler(o.elsewhere))
	containersapi.RegisterContainersServer(g, containers{o: o})
	tasksapi.RegisterTasksServer(g, tasks{o: o})
	versionapi.RegisterVersionServer(g, versions{})
	return &Server{g}
}

// Serve answers on l until ctx ends, and closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, s.grpc.Stop) // no call lasts
	defer stop()
	if err := s.grpc.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// elsewhere refuses calls of services that are not here. kubeadm and crictl try containerd's socket where they are told of none, and would
// else say no more than that the runtime is not implemented.
func (o *Options) elsewhere(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.Method(stream.Context())
	if o.CRI != "" && strings.HasPrefix(method, "/runtime.") {
		return status.Errorf(codes.Unimplemented, "this is berth's socket for the kubelet's cAdvisor; its CRI is served at unix://%s", o.CRI)
	}
	return status.Errorf(codes.Unimplemented, "unknown service of method %.200s", method)
}

// guard has a panic fail its call, and no other.
func (o *Options) guard(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			o.Log.Error("panic in an answer to cAdvisor", "call", info.FullMethod, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			resp, err = nil, status.Error(codes.Internal, "internal error, see the log of berth")
		}
	}()
	return handle(ctx, req)
}

const versionMethod = "/containerd.services.version.v1.Version/Version"

// inNamespace wants every call, but that for the version, to be about Kubernetes' containers.
func inNamespace(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if info.FullMethod == versionMethod {
		return handle(ctx, req)
	}
	md, _ := metadata.FromIncomingContext(ctx)
	names := md.Get("containerd-namespace")
	switch {
	case len(names) == 0:
		return nil, status.Error(codes.FailedPrecondition, "namespace is required")
	case names[0] != namespace:
		return nil, status.Errorf(codes.NotFound, "there is nothing in namespace %.64q, only in %q", names[0], namespace)
	}
	return handle(ctx, req)
}

var idPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// find looks up a container or a sandbox by its whole id: the name of a cgroup is no prefix of one.
func (o *Options) find(id string) (*pods.Container, *pods.Sandbox, error) {
	if !idPattern.MatchString(id) {
		return nil, nil, status.Errorf(codes.InvalidArgument, "id %.80q is not one of 64 hexadecimal digits", id)
	}
	if c, err := o.Pods.Container(id); err == nil {
		return c, nil, nil
	}
	s, err := o.Pods.Sandbox(id)
	if err != nil {
		return nil, nil, status.Errorf(codes.NotFound, "container %s: not found", id)
	}
	return nil, s, nil
}

type containers struct {
	containersapi.UnimplementedContainersServer
	o Options
}

func (s containers) Get(_ context.Context, req *containersapi.GetContainerRequest) (*containersapi.GetContainerResponse, error) {
	c, sb, err := s.o.find(req.GetID())
	if err != nil {
		return nil, err
	}
	if c == nil {
		return &containersapi.GetContainerResponse{Container: sandboxOf(sb, s.o.SandboxImage)}, nil
	}
	return &containersapi.GetContainerResponse{Container: containerOf(c, s.o.Image(c))}, nil
}

type tasks struct {
	tasksapi.UnimplementedTasksServer
	o Options
}

func (s tasks) Get(_ context.Context, req *tasksapi.GetRequest) (*tasksapi.GetResponse, error) {
	c, sb, err := s.o.find(req.GetContainerID())
	if err != nil {
		return nil, err
	}
	p, err := taskOrShim(c, sb)
	if err != nil { // cAdvisor asks again, a few times, for what is not found
		return nil, status.Error(codes.NotFound, err.Error())
	}
	return &tasksapi.GetResponse{Process: p}, nil
}

type versions struct {
	versionapi.UnimplementedVersionServer
}

func (versions) Version(context.Context, *emptypb.Empty) (*versionapi.VersionResponse, error) {
	return &versionapi.VersionResponse{Version: "berth " + version.Version, Revision: version.Commit}, nil
}
