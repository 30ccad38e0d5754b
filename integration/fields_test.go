//go:build integration

package integration

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
)

// A fieldCase shows on a real container what fields of a pod or a container do.
type fieldCase struct {
	name  string
	about string // the fields, as MESSAGE.FIELD, separated by blanks
	run   func(t *testing.T, f *fields)
}

// fieldGroup is the cases of one theme.
type fieldGroup struct {
	name  string
	cases []fieldCase
}

// fields is the node that the cases run on, with pods that they share.
type fields struct {
	*security
	peer bool // the node runs containerd: what only berth promises is not asked for
}

// fieldGroups are all cases.
func fieldGroups() []fieldGroup {
	return slices.Concat(podFields(), networkFields(), namespaceFields(), userFields(), processFields(), streamFields(), mountFields(),
		imageVolumeFields(), propagationFields(), deviceFields(), confinementFields(), capabilityFields(), imageFields(), resourceFields())
}

// TestFields runs containers with each field of the request in use, and looks at what their users see. With
// BERTH_FIELDS_PEER=1 it runs on containerd: what is expected here is the interface, and not berth's reading of it.
//
//	go test -tags integration ./integration -run 'TestFields/mounts/read-only'
func TestFields(t *testing.T) {
	peer := os.Getenv("BERTH_FIELDS_PEER") != ""
	n, err := lab.New(lab.Options{Tools: tools, Log: t.Logf, Containerd: peer})
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() && n.Berth != nil {
			t.Logf("the end of the log of berth serve:\n%s", n.Berth.Tail(40))
		}
		if err := n.Close(); err != nil && !n.Foreign() {
			t.Error(err)
		}
	})
	must(t, n.StartRegistry(t.Context()))
	must(t, n.StartBerth(t.Context()))
	s := &security{Node: n, suite: t, reg: imagestest.NewRegistry(t), pods: map[podKind]*securityPod{}}
	program, err := os.ReadFile(n.Tools.Busybox)
	must(t, err)
	s.busybox = imagestest.Layer(busyboxEntries(program)...)
	f := &fields{s, n.Foreign()}
	sent := fieldsSent(n)
	f.pod(t, plainPod)
	before, err := n.Snapshot()
	must(t, err)
	count := 0
	for _, group := range fieldGroups() {
		t.Run(group.name, func(t *testing.T) {
			for _, c := range group.cases {
				count++
				t.Run(c.name, func(t *testing.T) { c.run(t, f) })
			}
		})
	}
	t.Logf("%d cases in %d groups", count, len(fieldGroups()))
	if !strings.Contains(flag.Lookup("test.run").Value.String(), "/") { // all cases ran
		sent.wantAll(t)
	}
	s.removePods(t)
	if !f.peer {
		s.settle(t, before)
	}
}

// sentFields notes which fields of requests were set, by all cases together: some are about what holds without.
type sentFields struct {
	runtimeapi.RuntimeServiceClient

	mu  sync.Mutex
	set map[string]bool
}

// fieldsSent notes what a node's runtime is asked for from now on.
func fieldsSent(n *lab.Node) *sentFields {
	s := &sentFields{RuntimeServiceClient: n.CRI.RuntimeServiceClient, set: map[string]bool{}}
	n.CRI.RuntimeServiceClient = s
	return s
}

// RunPodSandbox implements runtimeapi.RuntimeServiceClient.
func (s *sentFields) RunPodSandbox(ctx context.Context, in *runtimeapi.RunPodSandboxRequest, o ...grpc.CallOption) (*runtimeapi.RunPodSandboxResponse, error) {
	s.note(in.ProtoReflect())
	return s.RuntimeServiceClient.RunPodSandbox(ctx, in, o...)
}

// CreateContainer implements runtimeapi.RuntimeServiceClient.
func (s *sentFields) CreateContainer(ctx context.Context, in *runtimeapi.CreateContainerRequest, o ...grpc.CallOption) (*runtimeapi.CreateContainerResponse, error) {
	s.note(in.ProtoReflect())
	return s.RuntimeServiceClient.CreateContainer(ctx, in, o...)
}

func (s *sentFields) note(m protoreflect.Message) {
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		s.mu.Lock()
		s.set[string(m.Descriptor().Name())+"."+string(field.Name())] = true
		s.mu.Unlock()
		switch {
		case field.IsMap() || field.Message() == nil:
		case field.IsList():
			for i := range v.List().Len() {
				s.note(v.List().Get(i).Message())
			}
		default:
			s.note(v.Message())
		}
		return true
	})
}

// wantAll wants every field that a case is about to have had a value in some request.
func (s *sentFields) wantAll(t *testing.T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range fieldGroups() {
		for _, c := range g.cases {
			for field := range strings.FieldsSeq(c.about) {
				if !s.set[field] && field != "ImageSpec.image_ref" { // which only a status has
					t.Errorf("%s/%s is said to be about %s, which no request had set", g.name, c.name, field)
				}
			}
		}
	}
}

// elsewhere are the fields that tests of other names show, and why.
var elsewhere = map[string]string{
	"PodSandboxConfig.windows":    "TestBadInput", // refused on Linux
	"ContainerConfig.windows":     "TestBadInput",
	"ContainerConfig.CDI_devices": "TestCDI",
	"CDIDevice.name":              "TestCDI",
	"Mount.uidMappings":           "TestUserNamespaces",
	"Mount.gidMappings":           "TestUserNamespaces",
	"UserNamespace.uids":          "TestUserNamespaces",
	"UserNamespace.gids":          "TestUserNamespaces",
	"IDMapping.host_id":           "TestUserNamespaces",
	"IDMapping.container_id":      "TestUserNamespaces",
	"IDMapping.length":            "TestUserNamespaces",
}

// TestEveryFieldHasATest walks the messages that make pods and containers, and demands of every field that a case is about
// it, or that another test is named which is.
func TestEveryFieldHasATest(t *testing.T) {
	shown := map[string]bool{}
	for _, g := range fieldGroups() {
		for _, c := range g.cases {
			for field := range strings.FieldsSeq(c.about) {
				shown[field] = true
			}
		}
	}
	existing := testsIn(t, ".", `func (Test\w+)\(`)
	all := map[string]bool{}
	messages := map[protoreflect.FullName]bool{}
	var walk func(protoreflect.MessageDescriptor)
	walk = func(m protoreflect.MessageDescriptor) {
		if messages[m.FullName()] || strings.HasPrefix(string(m.Name()), "Windows") {
			return
		}
		messages[m.FullName()] = true
		for i := range m.Fields().Len() {
			field := m.Fields().Get(i)
			if !m.IsMapEntry() {
				all[string(m.Name())+"."+string(field.Name())] = true
			}
			if field.Message() != nil {
				walk(field.Message())
			}
		}
	}
	walk((&runtimeapi.RunPodSandboxRequest{}).ProtoReflect().Descriptor())
	walk((&runtimeapi.CreateContainerRequest{}).ProtoReflect().Descriptor())
	for field := range all {
		switch other := elsewhere[field]; {
		case shown[field] && other != "":
			t.Errorf("%s is said to be shown by %s, but a case of TestFields is about it", field, other)
		case !shown[field] && other == "":
			t.Errorf("no case of TestFields is about %s", field)
		case other != "" && !existing[other]:
			t.Errorf("%s is said to be shown by %s, which does not exist", field, other)
		}
	}
	for field := range shown {
		if !all[field] {
			t.Errorf("a case is about %s, which does not exist", field)
		}
	}
	for field := range elsewhere {
		if !all[field] {
			t.Errorf("%s is listed as shown elsewhere, and does not exist", field)
		}
	}
	if len(all) < 120 || len(messages) < 24 {
		t.Errorf("only %d fields of %d messages", len(all), len(messages))
	}
	t.Logf("%d fields of %d messages, %d of them by other tests", len(all), len(messages), len(elsewhere))
}

// ctr is a container that runs a script and ends.
func (f *fields) ctr(script string, change ...func(*runtimeapi.ContainerConfig)) *runtimeapi.ContainerConfig {
	cfg := f.container("", script)
	for _, c := range change {
		c(cfg)
	}
	return cfg
}

// says runs a container to its end, and wants it to write that and to succeed.
func (f *fields) says(t *testing.T, p *securityPod, cfg *runtimeapi.ContainerConfig, want string) {
	t.Helper()
	out, code, err := f.output(t, p, cfg)
	if err != nil || code != 0 || out != want {
		t.Errorf("exit code %d, %v: %q, want %q", code, err, out, want)
	}
}

// gives is what a container writes that succeeds.
func (f *fields) gives(t *testing.T, p *securityPod, cfg *runtimeapi.ContainerConfig) string {
	t.Helper()
	out, code, err := f.output(t, p, cfg)
	if err != nil || code != 0 {
		t.Errorf("exit code %d, %v: %q", code, err, out)
	}
	return out
}

// refused wants a container not to be created. A peer has its own codes and texts.
func (f *fields) refused(t *testing.T, p *securityPod, cfg *runtimeapi.ContainerConfig, code codes.Code, words ...string) {
	t.Helper()
	id, err := f.CRI.Start(t.Context(), p.id, p.cfg, cfg)
	if id != "" {
		defer f.remove(t, id)
	}
	if f.peer {
		if err == nil {
			t.Errorf("runs")
		}
		return
	}
	wantCode(t, err, code, words...)
}

// status is what the runtime says of a container.
func (f *fields) status(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	st, err := f.CRI.ContainerState(t.Context(), id)
	must(t, err)
	return st
}

// podStatus is what the runtime says of a pod.
func (f *fields) podStatus(t *testing.T, id string) *runtimeapi.PodSandboxStatus {
	t.Helper()
	resp, err := f.CRI.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	must(t, err)
	return resp.Status
}

// newPod is a pod for one case.
func (f *fields) newPod(t *testing.T, kind podKind, change func(*runtimeapi.PodSandboxConfig)) *securityPod {
	t.Helper()
	cfg := f.podConfig(kind)
	if change != nil {
		change(cfg)
	}
	return f.ownPod(t, cfg)
}

// image is an image of busybox and more entries, with a PATH: containerd has one of its own only where an image has no
// variables at all.
func (f *fields) image(t *testing.T, change func(*imagestest.Image), entries ...imagestest.Entry) string {
	t.Helper()
	return f.security.image(t, func(i *imagestest.Image) {
		i.Config.Config.Env = append(i.Config.Config.Env, "PATH=/bin")
		if change != nil {
			change(i)
		}
	}, entries...)
}

// log is what a container has written so far.
func (f *fields) log(t *testing.T, p *securityPod, cfg *runtimeapi.ContainerConfig) string {
	t.Helper()
	lines, err := lab.Log(p.cfg, cfg)
	if errors.Is(err, fs.ErrNotExist) {
		return "" // not begun
	}
	must(t, err)
	var text strings.Builder
	for _, l := range lines {
		text.WriteString(l.Text)
		if l.Tag == "F" {
			text.WriteByte('\n')
		}
	}
	return text.String()
}

// waitLog waits until a container has written a text.
func (f *fields) waitLog(t *testing.T, p *securityPod, cfg *runtimeapi.ContainerConfig, want string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), time.Minute, "the log holds "+want, func(context.Context) error {
		if text := f.log(t, p, cfg); !strings.Contains(text, want) {
			return fmt.Errorf("it is %q", text)
		}
		return nil
	}))
}

// security is the security context of a container, to be changed.
func withSecurity(change func(*runtimeapi.LinuxContainerSecurityContext)) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) { change(c.Linux.SecurityContext) }
}

// withMount adds mounts.
func withMount(mounts ...*runtimeapi.Mount) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) { c.Mounts = append(c.Mounts, mounts...) }
}
