//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// badInput is a node with one pod and one container, which every bad request must leave as they are.
type badInput struct {
	*lab.Node
	podID, id string
	pod       *runtimeapi.PodSandboxConfig
	stopped   string // a container that has exited
	before    string
}

// badRequest is a request that must fail, how, and what its error has to name.
type badRequest struct {
	name string
	code codes.Code
	says []string
	call func(ctx context.Context, b *badInput) error
}

// TestBadInput sends hostile and wrong requests to a daemon, each of which must be answered with the right code and an error
// that names the field and the value, in one line of bounded length, create nothing, and leave the daemon well.
func TestBadInput(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("the texts of errors are berth's own")
	}
	ctx := t.Context()
	b := &badInput{Node: n, pod: n.Pod("good")}
	var err error
	b.podID, err = n.CRI.RunPod(ctx, b.pod)
	must(t, err)
	t.Cleanup(func() {
		if err := n.CRI.RemovePod(context.Background(), b.podID); err != nil {
			t.Error(err)
		}
	})
	b.id, err = n.CRI.Start(ctx, b.podID, b.pod, lab.Sleeper("good"))
	must(t, err)
	b.stopped, err = n.CRI.Start(ctx, b.podID, b.pod, lab.Sh("ended", "exit 0"))
	must(t, err)
	_, err = n.CRI.WaitExit(ctx, b.stopped, time.Minute)
	must(t, err)
	_, err = n.CRI.Exec(ctx, b.id, "true") // what the first exec makes for good
	must(t, err)
	b.before = b.lists(t)
	snapshot, err := n.Snapshot()
	must(t, err)
	resident := residentKiB(t, n.Berth.PID())

	requests := badPods()
	requests = append(requests, badContainers()...)
	requests = append(requests, badSecurity()...)
	requests = append(requests, badCalls()...)
	requests = append(requests, badBytes()...)
	names := map[string]bool{}
	for _, r := range requests {
		if names[r.name] {
			t.Errorf("two requests are called %q", r.name)
		}
		names[r.name] = true
		b.judge(t, r)
	}
	if len(requests) < 250 {
		t.Errorf("%d requests only", len(requests))
	}
	t.Logf("%d bad requests", len(requests))

	must(t, n.Settle(ctx, snapshot))
	if !n.Berth.Alive() {
		t.Fatal("the daemon has ended")
	}
	if grown := residentKiB(t, n.Berth.PID()) - resident; grown > 150<<10 { // a few messages of 16 MiB are under way in buffers
		t.Errorf("the daemon grew by %d KiB", grown)
	}
	out, err := n.CRI.Exec(ctx, b.id, "echo", "well")
	if err != nil || out != "well\n" {
		t.Errorf("the container answers %q, %v", out, err)
	}
	again, err := n.CRI.Start(ctx, b.podID, b.pod, lab.Sleeper("after"))
	must(t, err)
	_, err = n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: again})
	must(t, err)
}

// judge sends one bad request. Tests by the hundred would only hide the one that fails: what is wrong is said with its name.
func (b *badInput) judge(t *testing.T, r badRequest) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := r.call(ctx, b)
	st, ok := status.FromError(errors.Unwrap(err))
	if !ok || errors.Unwrap(err) == nil {
		st, _ = status.FromError(err)
	}
	if err == nil || st.Code() != r.code {
		t.Errorf("%s: code %v, want %v: %.300v", r.name, st.Code(), r.code, err)
		if now := b.lists(t); now != b.before {
			t.Errorf("%s: lists are now\n%s\nand were\n%s", r.name, now, b.before)
			b.before = now
		}
		return
	}
	text := st.Message()
	for _, word := range r.says {
		if !strings.Contains(text, word) {
			t.Errorf("%s: %q is not in the error: %.300s", r.name, word, text)
		}
	}
	if strings.ContainsAny(text, "\n\r\x00") || len(text) > 16<<10 {
		t.Errorf("%s: error of %d bytes: %.300q", r.name, len(text), text)
	}
	if now := b.lists(t); now != b.before {
		t.Errorf("%s: lists are now\n%s\nand were\n%s", r.name, now, b.before)
		b.before = now
	}
}

// lists is what the runtime says that there is.
func (b *badInput) lists(t *testing.T) string {
	t.Helper()
	pods, err := b.CRI.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	ctrs, err := b.CRI.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
	must(t, err)
	images, err := b.CRI.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	must(t, err)
	var lines []string
	for _, p := range pods.Items {
		lines = append(lines, fmt.Sprintf("pod %.80q %.12s %v", p.Metadata.Name, p.Id, p.State))
	}
	for _, c := range ctrs.Containers {
		lines = append(lines, fmt.Sprintf("container %.80q %.12s %v", c.Metadata.Name, c.Id, c.State))
	}
	return strings.Join(append(lines, fmt.Sprintf("%d images", len(images.Images))), "\n")
}

// badPod is a pod that differs from a good one.
func badPod(name string, code codes.Code, change func(*runtimeapi.PodSandboxConfig), says ...string) badRequest {
	return badRequest{"pod: " + name, code, says, func(ctx context.Context, b *badInput) error {
		cfg := b.Pod("bad")
		change(cfg)
		_, err := b.CRI.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
		return err
	}}
}

// badContainer is a container that differs from a good one.
func badContainer(name string, code codes.Code, change func(*runtimeapi.ContainerConfig), says ...string) badRequest {
	return badRequest{"container: " + name, code, says, func(ctx context.Context, b *badInput) error {
		cfg := lab.Sleeper("bad")
		change(cfg)
		_, err := b.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: b.podID, Config: cfg, SandboxConfig: b.pod})
		return err
	}}
}

// badCall is any other call.
func badCall[Q, S proto.Message](name string, code codes.Code, call func(*badInput) func(context.Context, Q) (S, error), req func(*badInput) Q, says ...string) badRequest {
	return badRequest{name, code, says, func(ctx context.Context, b *badInput) error {
		_, err := call(b)(ctx, req(b))
		return err
	}}
}

// Values that no name, path or word may have, with a word for each.
var (
	longText = strings.Repeat("x", 1<<16)
	controls = map[string]string{"NUL": "a\x00b", "line break": "a\nb", "carriage return": "a\rb", "escape": "a\x1b[2Jb", "C1 control": "a\u0085b"}
)
