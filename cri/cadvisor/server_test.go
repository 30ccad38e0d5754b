package cadvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/internal/socket"
)

var (
	podID     = strings.Repeat("a", 64)
	runningID = strings.Repeat("b", 64)
	exitedID  = strings.Repeat("c", 64)
	newID     = strings.Repeat("d", 64)
)

// listed is a node's pods at one moment.
type listed struct {
	sandboxes  map[string]*pods.Sandbox
	containers map[string]*pods.Container
}

func (l listed) Sandbox(id string) (*pods.Sandbox, error) {
	if s := l.sandboxes[id]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("pod sandbox %q: %w", id, errdefs.ErrNotFound)
}

func (l listed) Container(id string) (*pods.Container, error) {
	if c := l.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

var node = listed{
	sandboxes: map[string]*pods.Sandbox{podID: {ID: podID, Ready: true, ShimPID: 77, CreatedAt: time.Unix(50, 0), Config: &cri.PodSandboxConfig{
		Labels: map[string]string{"io.kubernetes.pod.name": "web", "app": "web"},
	}}},
	containers: map[string]*pods.Container{
		runningID: {ID: runningID, State: cri.ContainerState_CONTAINER_RUNNING, PID: 88, CreatedAt: time.Unix(60, 0), Config: &cri.ContainerConfig{
			Labels: map[string]string{"io.kubernetes.container.name": "c", "io.kubernetes.pod.name": "web", "io.kubernetes.endless": strings.Repeat("x", 1<<20)},
			Envs:   []*cri.KeyValue{{Key: "PASSWORD", Value: []byte("secret")}},
		}},
		exitedID: {ID: exitedID, State: cri.ContainerState_CONTAINER_EXITED, ExitCode: 137, FinishedAt: time.Unix(70, 0), Config: &cri.ContainerConfig{}},
		newID:    {ID: newID, State: cri.ContainerState_CONTAINER_CREATED, Config: &cri.ContainerConfig{}},
	},
}

// dial serves the node on a socket and connects as cAdvisor does.
func dial(t *testing.T) *grpc.ClientConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := socket.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	server := New(Options{Pods: node, SandboxImage: "shim", CRI: "/run/berth/berth.sock", Log: slog.New(slog.DiscardHandler), Image: func(c *pods.Container) string {
		if c.ID == exitedID {
			panic("no image")
		}
		return "busybox:1"
	}})
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		stop()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
	})
	return conn
}

func in(ctx context.Context, namespace string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "containerd-namespace", namespace)
}

func TestContainersAreToldAsContainerdTellsThem(t *testing.T) {
	client := containersapi.NewContainersClient(dial(t))
	ctx := in(t.Context(), "k8s.io")
	for id, want := range map[string]struct {
		kind, image, created string
		labels               map[string]string
	}{
		podID:     {"sandbox", "shim", "1970-01-01T00:00:50Z", map[string]string{"io.kubernetes.pod.name": "web"}},
		runningID: {"container", "busybox:1", "1970-01-01T00:01:00Z", map[string]string{"io.kubernetes.container.name": "c", "io.kubernetes.pod.name": "web"}},
	} {
		resp, err := client.Get(ctx, &containersapi.GetContainerRequest{ID: id})
		if err != nil {
			t.Errorf("%s: %v", want.kind, err)
			continue
		}
		c := resp.GetContainer()
		want.labels["io.cri-containerd.kind"] = want.kind
		if fmt.Sprint(c.GetLabels()) != fmt.Sprint(want.labels) || c.GetImage() != want.image || c.GetID() != id || c.GetSnapshotKey() != id {
			t.Errorf("%s: labels %v, image %q, %v", want.kind, c.GetLabels(), c.GetImage(), c)
		}
		if at := c.GetCreatedAt().AsTime().Format(time.RFC3339); at != want.created {
			t.Errorf("%s: created %s, want %s", want.kind, at, want.created)
		}
		var spec specs.Spec // cAdvisor gives up on one that it cannot read, and reads process.env
		if err := json.Unmarshal(c.GetSpec().GetValue(), &spec); err != nil || spec.Process == nil {
			t.Errorf("%s: specification %s: %v", want.kind, c.GetSpec().GetValue(), err)
		}
		if strings.Contains(fmt.Sprint(resp), "secret") {
			t.Errorf("%s: a password is told: %v", want.kind, resp)
		}
	}
}

func TestTasksAreTheProcessesOfContainersAndShims(t *testing.T) {
	client := tasksapi.NewTasksClient(dial(t))
	ctx := in(t.Context(), "k8s.io")
	for id, want := range map[string]struct {
		pid  uint32
		is   tasktypes.Status
		code uint32
	}{
		podID:     {77, tasktypes.Status_RUNNING, 0},
		runningID: {88, tasktypes.Status_RUNNING, 0},
		exitedID:  {0, tasktypes.Status_STOPPED, 137},
	} {
		resp, err := client.Get(ctx, &tasksapi.GetRequest{ContainerID: id})
		p := resp.GetProcess()
		if err != nil || p.GetPid() != want.pid || p.GetStatus() != want.is || p.GetExitStatus() != want.code {
			t.Errorf("%.4s: %v, %v, want %+v", id, p, err, want)
		}
	}
	// One without a process is asked for again.
	if _, err := client.Get(ctx, &tasksapi.GetRequest{ContainerID: newID}); status.Code(err) != codes.NotFound {
		t.Errorf("without a process: %v", err)
	}
}

func TestWhatIsNotThereIsRefused(t *testing.T) {
	conn := dial(t)
	containers, ctx := containersapi.NewContainersClient(conn), in(t.Context(), "k8s.io")
	for name, tc := range map[string]struct {
		ctx  context.Context
		id   string
		want codes.Code
	}{
		"unknown id":         {ctx, strings.Repeat("e", 64), codes.NotFound},
		"prefix of an id":    {ctx, podID[:12], codes.InvalidArgument},
		"path":               {ctx, "../" + podID, codes.InvalidArgument},
		"endless id":         {ctx, strings.Repeat("a", 8<<10), codes.InvalidArgument},
		"endless request":    {ctx, strings.Repeat("a", 1<<20), codes.ResourceExhausted},
		"another namespace":  {in(t.Context(), "moby"), podID, codes.NotFound},
		"without namespace":  {t.Context(), podID, codes.FailedPrecondition},
		"two namespaces":     {in(in(t.Context(), "moby"), "k8s.io"), podID, codes.NotFound},
		"capitals in the id": {ctx, strings.ToUpper(podID), codes.InvalidArgument},
	} {
		if _, err := containers.Get(tc.ctx, &containersapi.GetContainerRequest{ID: tc.id}); status.Code(err) != tc.want {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	for name, call := range map[string]func() error{
		"containers.Delete": func() error {
			_, err := containers.Delete(ctx, &containersapi.DeleteContainerRequest{ID: podID})
			return err
		},
		"tasks.Kill": func() error {
			_, err := tasksapi.NewTasksClient(conn).Kill(ctx, &tasksapi.KillRequest{ContainerID: podID, Signal: 9})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", name, err)
		}
	}
	if v, err := versionapi.NewVersionClient(conn).Version(t.Context(), &emptypb.Empty{}); err != nil || v.GetVersion() == "" {
		t.Errorf("version: %v, %v", v, err)
	}
}

func TestAPanicFailsItsCallAndNoOther(t *testing.T) {
	client := containersapi.NewContainersClient(dial(t))
	ctx := in(t.Context(), "k8s.io")
	if _, err := client.Get(ctx, &containersapi.GetContainerRequest{ID: exitedID}); status.Code(err) != codes.Internal {
		t.Errorf("the call that panics: %v", err)
	}
	if _, err := client.Get(ctx, &containersapi.GetContainerRequest{ID: runningID}); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

// kubeadm takes this socket for a runtime's where it is told of no other.
func TestWhoAsksForTheCRIIsToldWhereItIs(t *testing.T) {
	conn := dial(t)
	_, err := cri.NewRuntimeServiceClient(conn).Version(t.Context(), &cri.VersionRequest{})
	if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "CRI is served at unix:///run/berth/berth.sock") {
		t.Errorf("the CRI: %v", err)
	}
	if err := conn.Invoke(t.Context(), "/of.Another/Call", &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unimplemented || strings.Contains(err.Error(), "CRI") {
		t.Errorf("another service: %v", err)
	}
}
