package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/internal/socket"
	"github.com/berth-run/berth/network"
)

// logBuffer is a log that can be read while it is written to.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
func (l *logBuffer) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

func (l *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// tempDir is short: a socket's path has 107 bytes.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "berth")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// start serves over a real socket, with nothing behind it: what the tests ask must be answered before a pod or an image is
// touched. What is touched panics.
func start(t *testing.T) (cri.RuntimeServiceClient, cri.ImageServiceClient, *logBuffer) {
	t.Helper()
	conn, log := connect(t)
	return cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn), log
}

func connect(t *testing.T, change ...func(*Options)) (*grpc.ClientConn, *logBuffer) {
	t.Helper()
	log := &logBuffer{}
	dir := tempDir(t)
	net, err := network.Open(network.Options{ConfDir: filepath.Join(dir, "net.d"), BinDirs: []string{filepath.Join(dir, "bin")}, CacheDir: filepath.Join(dir, "cni")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = net.Close() })
	o := Options{Log: log.logger(), Network: net, RecursiveReadOnly: true}
	for _, c := range change {
		c(&o)
	}
	srv := New(o)
	path := filepath.Join(dir, "berth.sock")
	l, err := socket.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Error("the socket is left behind")
		}
	})
	return conn, log
}

func TestHandshake(t *testing.T) {
	rt, _, _ := start(t)
	v, err := rt.Version(t.Context(), &cri.VersionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	// cri-client refuses another version and empty fields.
	if v.GetVersion() != "0.1.0" || v.GetRuntimeName() != "berth" || v.GetRuntimeVersion() == "" || v.GetRuntimeApiVersion() != "v1" {
		t.Errorf("%v", v)
	}
	c, err := rt.RuntimeConfig(t.Context(), &cri.RuntimeConfigRequest{})
	if err != nil || c.GetLinux() == nil || c.GetLinux().GetCgroupDriver() != cri.CgroupDriver_CGROUPFS {
		t.Errorf("%v %v", c, err)
	}
	systemd := &Server{driver: cgroups.Systemd}
	if c, err := systemd.RuntimeConfig(t.Context(), nil); err != nil || c.GetLinux() == nil || c.GetLinux().GetCgroupDriver() != cri.CgroupDriver_SYSTEMD {
		t.Errorf("systemd: %v %v", c, err)
	}
}

// Every request that cannot be right is refused before anything is looked up, with the field and its value.
func TestBadRequestsNameFieldAndValue(t *testing.T) {
	rt, im, log := start(t)
	ctx := t.Context()
	for _, tc := range []struct {
		name string
		call func() error
		want string
	}{
		{"RunPodSandbox without config", func() error { _, err := rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{}); return err }, "config: missing"},
		{"StopPodSandbox without id", func() error { _, err := rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{}); return err }, "pod_sandbox_id: missing"},
		{"RemovePodSandbox without id", func() error { _, err := rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{}); return err }, "pod_sandbox_id: missing"},
		{"PodSandboxStatus without id", func() error { _, err := rt.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{}); return err }, "pod_sandbox_id: missing"},
		{"path for an id", func() error {
			_, err := rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: "../../etc"})
			return err
		}, `pod_sandbox_id: "../../etc"`},
		{"control character in an id", func() error {
			_, err := rt.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: "a\nb"})
			return err
		}, `container_id: "a\nb"`},
		{"endless id", func() error {
			_, err := rt.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: strings.Repeat("a", 1<<20)})
			return err
		}, "container_id:"},
		{"CreateContainer without sandbox", func() error { _, err := rt.CreateContainer(ctx, &cri.CreateContainerRequest{}); return err }, "pod_sandbox_id: missing"},
		{"CreateContainer without config", func() error {
			_, err := rt.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: idA})
			return err
		}, "config: missing"},
		{"StartContainer without id", func() error { _, err := rt.StartContainer(ctx, &cri.StartContainerRequest{}); return err }, "container_id: missing"},
		{"StopContainer without id", func() error { _, err := rt.StopContainer(ctx, &cri.StopContainerRequest{}); return err }, "container_id: missing"},
		{"StopContainer with a negative timeout", func() error {
			_, err := rt.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: idA, Timeout: -3})
			return err
		}, "timeout: -3"},
		{"RemoveContainer without id", func() error { _, err := rt.RemoveContainer(ctx, &cri.RemoveContainerRequest{}); return err }, "container_id: missing"},
		{"ReopenContainerLog without id", func() error { _, err := rt.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{}); return err }, "container_id: missing"},
		{"UpdateContainerResources without any", func() error {
			_, err := rt.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: idA})
			return err
		}, "linux: missing"},
		{"UpdateContainerResources of Windows", func() error {
			_, err := rt.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: idA, Windows: &cri.WindowsContainerResources{}})
			return err
		}, "windows:"},
		{"ContainerStats without id", func() error { _, err := rt.ContainerStats(ctx, &cri.ContainerStatsRequest{}); return err }, "container_id: missing"},
		{"ExecSync without command", func() error { _, err := rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: idA}); return err }, "cmd: missing"},
		{"ExecSync of nothing", func() error {
			_, err := rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: idA, Cmd: []string{""}})
			return err
		}, "cmd: missing"},
		{"ExecSync with NUL", func() error {
			_, err := rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: idA, Cmd: []string{"a", "b\x00c"}})
			return err
		}, `cmd: "b\x00c"`},
		{"ExecSync with an endless argument", func() error {
			_, err := rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: idA, Cmd: []string{"a", strings.Repeat("b", 1<<17)}})
			return err
		}, `cmd: "bbb`},
		{"an endless handler", func() error {
			_, err := rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{
				Config: &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: "a"}}, RuntimeHandler: strings.Repeat("h", 1<<20),
			})
			return err
		}, `runtime_handler: "hhh`},
		{"ExecSync with a negative timeout", func() error {
			_, err := rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: idA, Cmd: []string{"a"}, Timeout: -1})
			return err
		}, "timeout: -1"},
		{"ExecSync without container", func() error { _, err := rt.ExecSync(ctx, &cri.ExecSyncRequest{Cmd: []string{"a"}}); return err }, "container_id: missing"},
		{"Exec on a terminal with stderr", func() error {
			_, err := rt.Exec(ctx, &cri.ExecRequest{ContainerId: idA, Cmd: []string{"a"}, Tty: true, Stdout: true, Stderr: true})
			return err
		}, "stderr: true"},
		{"Exec without streams", func() error {
			_, err := rt.Exec(ctx, &cri.ExecRequest{ContainerId: idA, Cmd: []string{"a"}})
			return err
		}, "stdin, stdout, stderr: false"},
		{"Exec without command", func() error {
			_, err := rt.Exec(ctx, &cri.ExecRequest{ContainerId: idA, Stdout: true})
			return err
		}, "cmd: missing"},
		{"Attach on a terminal with stderr", func() error {
			_, err := rt.Attach(ctx, &cri.AttachRequest{ContainerId: idA, Tty: true, Stdin: true, Stderr: true})
			return err
		}, "stderr: true"},
		{"Attach without streams", func() error { _, err := rt.Attach(ctx, &cri.AttachRequest{ContainerId: idA}); return err }, "stdin, stdout, stderr: false"},
		{"PortForward without sandbox", func() error { _, err := rt.PortForward(ctx, &cri.PortForwardRequest{}); return err }, "pod_sandbox_id: missing"},
		{"PortForward of port 0", func() error {
			_, err := rt.PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: idA, Port: []int32{80, 0}})
			return err
		}, "port: 0"},
		{"PortForward of port 65536", func() error {
			_, err := rt.PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: idA, Port: []int32{65536}})
			return err
		}, "port: 65536"},
		{"PullImage of nothing", func() error { _, err := im.PullImage(ctx, &cri.PullImageRequest{}); return err }, "image.image: missing"},
		{"PullImage with a blank", func() error {
			_, err := im.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "a b"}})
			return err
		}, `image.image: "a b"`},
		{"PullImage with an endless name", func() error {
			_, err := im.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: strings.Repeat("a", 1<<20)}})
			return err
		}, `image.image: "aaa`},
		{"PullImage with a token that is no header", func() error {
			_, err := im.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "a"}, Auth: &cri.AuthConfig{RegistryToken: "x\ny"}})
			return err
		}, "auth.registry_token: holds"},
		{"ListImages with an endless name", func() error {
			_, err := im.ListImages(ctx, &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: &cri.ImageSpec{Image: strings.Repeat("a", 1<<20)}}})
			return err
		}, `image.image: "aaa`},
		{"ImageStatus of nothing", func() error { _, err := im.ImageStatus(ctx, &cri.ImageStatusRequest{}); return err }, "image.image: missing"},
		{"RemoveImage of nothing", func() error { _, err := im.RemoveImage(ctx, &cri.RemoveImageRequest{}); return err }, "image.image: missing"},
	} {
		err := tc.call()
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(status.Convert(err).Message(), tc.want) {
			t.Errorf("%s: %v, want InvalidArgument with %q", tc.name, err, tc.want)
		}
		if len(status.Convert(err).Message()) > 1000 {
			t.Errorf("%s: the error repeats all of the request", tc.name)
		}
	}
	for line := range strings.Lines(log.String()) {
		if len(line) > 4000 {
			t.Errorf("a line of %d bytes in the log: %.200s", len(line), line)
		}
	}
}

func TestUnknownHandlerIsRefused(t *testing.T) {
	s := New(Options{Log: slog.New(slog.DiscardHandler)})
	if err := s.checkHandler("runtime_handler", ""); err != nil {
		t.Errorf("the default: %v", err)
	}
	if err := s.checkHandler("runtime_handler", "kata"); code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), `runtime_handler: "kata"`) {
		t.Errorf("%v", err)
	}
}

// TestEveryCallIsImplemented makes every call that the services' descriptors have, with an empty request. There is nothing
// behind the server, so that what they answer is of no account here, as long as it is not that there is no such call.
func TestEveryCallIsImplemented(t *testing.T) {
	notYet := []string{"CheckpointContainer", "CheckpointPod", "RestorePod"}
	conn, _ := connect(t)
	calls := 0
	var missing []string
	for _, service := range []protoreflect.FullName{"runtime.v1.RuntimeService", "runtime.v1.ImageService"} {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(service)
		if err != nil {
			t.Fatal(err)
		}
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			m := methods.Get(i)
			calls++
			path := fmt.Sprintf("/%s/%s", service, m.Name())
			in, out := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
			var err error
			if m.IsStreamingServer() {
				var stream grpc.ClientStream
				stream, err = conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, path)
				if err == nil {
					err = errors.Join(stream.SendMsg(in), stream.CloseSend())
				}
				if err == nil {
					err = stream.RecvMsg(out)
				}
			} else {
				err = conn.Invoke(t.Context(), path, in, out)
			}
			if status.Code(err) == codes.Unimplemented {
				missing = append(missing, string(m.Name()))
			}
		}
	}
	if calls != 43 || !slices.Equal(missing, notYet) {
		t.Errorf("of %d calls, %v are not there; want %v of 43", calls, missing, notYet)
	}
}

func TestAPanicFailsItsCallAndNoOther(t *testing.T) {
	log := &logBuffer{}
	i := &interceptor{log: log.logger(), now: time.Now}
	var m map[string]int
	_, err := i.unary(t.Context(), &cri.ListPodSandboxRequest{}, &grpc.UnaryServerInfo{FullMethod: "/runtime.v1.RuntimeService/ListPodSandbox"},
		func(context.Context, any) (any, error) { m["x"]++; return "answer", nil })
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "nil map") {
		t.Errorf("unary: %v", err)
	}
	err = i.stream(nil, contextStream{ctx: t.Context()}, &grpc.StreamServerInfo{FullMethod: "/runtime.v1.RuntimeService/GetContainerEvents"},
		func(any, grpc.ServerStream) error { panic("at the disco") })
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "disco") {
		t.Errorf("stream: %v", err)
	}
	s := log.String()
	for _, want := range []string{"call=ListPodSandbox", "nil map", "server_test.go", "call=GetContainerEvents", "at the disco"} {
		if !strings.Contains(s, want) {
			t.Errorf("the log does not say %q: %s", want, s)
		}
	}
}

type contextStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s contextStream) Context() context.Context { return s.ctx }

func TestMessagesOfMoreThanFourMiB(t *testing.T) {
	rt, _, _ := start(t)
	big := &cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: strings.Repeat("x", 12<<20)}}}
	if _, err := rt.UpdateRuntimeConfig(t.Context(), big); err != nil {
		t.Errorf("12 MiB: %.200s", err.Error())
	}
	big.RuntimeConfig.NetworkConfig.PodCidr = strings.Repeat("x", 17<<20)
	if _, err := rt.UpdateRuntimeConfig(t.Context(), big, grpc.MaxCallSendMsgSize(32<<20)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("17 MiB: %.200v", err)
	}
}

func TestRequestsAreNumberedAndTheirSecretsAreNotLogged(t *testing.T) {
	_, im, log := start(t)
	_, _ = im.PullImage(t.Context(), &cri.PullImageRequest{
		Image: &cri.ImageSpec{Image: "reg/app:1"}, Auth: &cri.AuthConfig{Username: "user-s3cret", Password: "s3cret", IdentityToken: "s3cret"},
	})
	s := log.String()
	if !strings.Contains(s, "call=PullImage req=1 image=reg/app:1") || strings.Contains(s, "s3cret") {
		t.Errorf("%s", s)
	}
}

// A pull that fails is one warning, which says whose it is.
func TestAFailedPullIsWarnedOfOnce(t *testing.T) {
	conn, log := connect(t, func(o *Options) {
		store, err := images.Open(images.Options{Root: filepath.Join(t.TempDir(), "images"), Log: o.Log})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := store.Close(); err != nil {
				t.Error(err)
			}
		})
		o.Images = store
	})
	im := cri.NewImageServiceClient(conn)
	reg := imagestest.NewRegistry(t)
	for req, name := range []string{"127.0.0.1:1/nobody/answers:1", reg.Host() + "/nothing/here:1"} {
		before := len(log.String())
		_, err := im.PullImage(t.Context(), &cri.PullImageRequest{
			Image: &cri.ImageSpec{Image: name}, SandboxConfig: &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Namespace: "shop", Name: "cart"}},
		})
		if err == nil {
			t.Fatalf("%s was pulled", name)
		}
		var warnings []string
		for line := range strings.Lines(log.String()[before:]) {
			if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
				warnings = append(warnings, line)
			}
		}
		want := fmt.Sprintf("call=PullImage req=%d image=%s pod=shop/cart ", req+1, name)
		if len(warnings) != 1 || !strings.Contains(warnings[0], want) {
			t.Errorf("warnings %q, want one with %q", warnings, want)
		}
	}
}

func TestSlowCallsAreWarnedOfUnlessTheyWait(t *testing.T) {
	for _, tc := range []struct {
		call string
		took time.Duration
		c    codes.Code
		want slog.Level
	}{
		{"CreateContainer", time.Second, codes.OK, slog.LevelDebug},
		{"CreateContainer", 10 * time.Second, codes.OK, slog.LevelWarn},
		{"StopContainer", time.Hour, codes.OK, slog.LevelDebug},
		{"PullImage", time.Hour, codes.OK, slog.LevelDebug},
		{"ExecSync", time.Minute, codes.DeadlineExceeded, slog.LevelInfo},
		{"RunPodSandbox", time.Minute, codes.DeadlineExceeded, slog.LevelWarn},
		{"ContainerStatus", 0, codes.NotFound, slog.LevelDebug},
		{"PullImage", 0, codes.NotFound, slog.LevelWarn},
		{"PullImage", 0, codes.FailedPrecondition, slog.LevelWarn},
		{"PullImage", 0, codes.InvalidArgument, slog.LevelInfo},
		{"RunPodSandbox", 0, codes.InvalidArgument, slog.LevelInfo},
		{"RunPodSandbox", 0, codes.Unknown, slog.LevelWarn},
		{"RunPodSandbox", 0, codes.Internal, slog.LevelError},
	} {
		if got := verdict(tc.call, tc.took, tc.c); got != tc.want {
			t.Errorf("%s %s %s: %s, want %s", tc.call, tc.took, tc.c, got, tc.want)
		}
	}
}

func TestStatusConditions(t *testing.T) {
	full, dead := &pods.Problem{Reason: "StorageFull", Message: "/var is full"}, &pods.Problem{Reason: "StorageReadOnly", Message: "/var is read-only"}
	noNetwork := errors.New("no conflist in /etc/cni/net.d")
	const network = "NetworkPluginNotReady: no conflist in /etc/cni/net.d"
	for _, tc := range []struct {
		name                  string
		health                pods.Health
		network               error
		runtime, net, storage string
	}{
		{"all is well", pods.Health{}, nil, "", "", ""},
		{"no network", pods.Health{}, noNetwork, "", network, ""},
		{"a full disk", pods.Health{Storage: full}, nil, "", "", "StorageFull: /var is full"},
		{"a dead disk and no network", pods.Health{Runtime: dead, Storage: dead}, noNetwork, "StorageReadOnly: /var is read-only", network, "StorageReadOnly: /var is read-only"},
	} {
		got := conditions(tc.health, tc.network)
		if len(got) != 3 {
			t.Fatalf("%s: %v", tc.name, got)
		}
		for i, want := range []struct{ name, problem string }{{"RuntimeReady", tc.runtime}, {"NetworkReady", tc.net}, {"StorageReady", tc.storage}} {
			c := got[i]
			problem := strings.TrimSuffix(c.GetReason()+": "+c.GetMessage(), ": ")
			if c.GetType() != want.name || c.GetStatus() != (want.problem == "") || problem != want.problem {
				t.Errorf("%s: %v, want %s %q", tc.name, c, want.name, want.problem)
			}
		}
	}
}

func TestDefaultHandlerIsListedByItsEmptyName(t *testing.T) {
	for _, rro := range []bool{true, false} {
		h := runtimeHandlers(rro, !rro)
		if len(h) != 1 || h[0].GetName() != "" || h[0].GetFeatures().GetRecursiveReadOnlyMounts() != rro || h[0].GetFeatures().GetUserNamespaces() == rro {
			t.Errorf("%v", h)
		}
	}
}
