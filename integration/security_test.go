//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
)

// security is a node with what attacks need: a registry of hostile images, a tree of the host that nothing may touch, and
// pods of every kind that the tests share. Its methods are the tests, each named after what went wrong elsewhere and what
// docs/security.md lists; `go test -run TestSecurity/CVE_2024_21626` runs one.
type security struct {
	*lab.Node
	suite    *testing.T
	reg      *imagestest.Registry
	busybox  imagestest.LayerBlob
	sentinel *imagestest.Sentinel

	mu    sync.Mutex
	pods  map[podKind]*securityPod
	count int
}

// TestSecurity attacks `berth serve`, its shims and its containers. All attacks share one node: at the end of each, the
// tree outside is as it was, and at the end of all, nothing is left on the machine.
func TestSecurity(t *testing.T) {
	n, err := lab.New(lab.Options{Tools: tools, Log: t.Logf, Bin: os.Getenv("BERTH_TEST_BIN")})
	must(t, err)
	if n.Foreign() {
		must(t, n.Close())
		t.Skip("the attacks look at the processes of berth, not at another runtime's")
	}
	t.Cleanup(func() {
		if t.Failed() && n.Berth != nil {
			t.Logf("the end of the log of berth serve:\n%s", n.Berth.Tail(40))
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	must(t, n.StartRegistry(t.Context()))
	must(t, n.StartBerth(t.Context()))
	// Whoever is no root must fail at what berth protects, not at the lab's own directory.
	must(t, os.Chmod(n.Dir, 0o755))
	s := &security{Node: n, suite: t, reg: imagestest.NewRegistry(t), pods: map[podKind]*securityPod{}}
	s.sentinel = imagestest.NewSentinel(t, filepath.Join(n.Dir, "sentinel"))
	program, err := os.ReadFile(n.Tools.Busybox)
	must(t, err)
	s.busybox = imagestest.Layer(busyboxEntries(program)...)
	s.pod(t, plainPod) // with what the first pod of a node makes for good
	before, err := n.Snapshot()
	must(t, err)
	for i := range reflect.TypeFor[*security]().NumMethod() {
		method := reflect.TypeFor[*security]().Method(i)
		if !strings.HasPrefix(method.Name, "Test") {
			continue
		}
		run, ok := reflect.ValueOf(s).Method(i).Interface().(func(*testing.T))
		if !ok {
			t.Fatalf("%s is no test", method.Name)
		}
		t.Run(method.Name, func(t *testing.T) {
			t.Cleanup(func() { s.sentinel.Check(t); s.noMountOutside(t) })
			run(t)
		})
	}
	s.removePods(t)
	s.settle(t, before)
}

// settle waits until nothing is there that was not before. Cgroups below /berth are not this node's, whose pods name a parent.
func (s *security) settle(t *testing.T, before lab.Snapshot) {
	t.Helper()
	err := lab.Eventually(context.Background(), 20*time.Second, "everything is as it was before", func(context.Context) error {
		after, err := s.Snapshot()
		if err != nil {
			return err
		}
		diff := slices.DeleteFunc(before.Diff(after), func(line string) bool {
			return strings.HasPrefix(line, "- ") || strings.Contains(line, "/berth/") && strings.Contains(line, " cgroup ")
		})
		if len(diff) > 0 {
			return errors.New("leak:\n  " + strings.Join(diff, "\n  "))
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// busyboxEntries is a root file system with a shell, and users of several kinds.
func busyboxEntries(program []byte) []imagestest.Entry {
	entries := []imagestest.Entry{
		imagestest.Dir("bin"), imagestest.Dir("etc"), imagestest.Dir("tmp").Mode(0o1777), imagestest.Dir("root"),
		imagestest.File("bin/busybox", string(program)).Mode(0o755),
		imagestest.File("etc/passwd", "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n"),
		imagestest.File("etc/group", "root:x:0:\nuser:x:1000:\nextra:x:5000:user\n"),
	}
	for _, applet := range strings.Fields("cat chmod chown dd echo grep head hostname id ln ls mkdir mknod mount mv readlink rm sh sleep stat touch true unshare yes") {
		entries = append(entries, imagestest.HardLink("bin/"+applet, "bin/busybox"))
	}
	return entries
}

// podKind is one of the pods that tests share.
type podKind string

const (
	plainPod       podKind = "plain"        // what a kubelet asks for by default: all namespaces its own, PID namespaces per container
	privilegedPod  podKind = "privileged"   // may have privileged containers
	hostNetworkPod podKind = "host-network" // in the node's network and UTS namespaces
	sharedPIDPod   podKind = "shared-pid"   // shareProcessNamespace: true
	hostIPCPod     podKind = "host-ipc"     // in the node's IPC namespace
)

type securityPod struct {
	id  string
	cfg *runtimeapi.PodSandboxConfig
}

// podConfig is the configuration of a pod of that kind.
func (s *security) podConfig(kind podKind) *runtimeapi.PodSandboxConfig {
	s.mu.Lock()
	s.count++
	cfg := s.Pod(fmt.Sprintf("%s-%d", kind, s.count))
	s.mu.Unlock()
	ns := cfg.Linux.SecurityContext.NamespaceOptions
	switch kind {
	case privilegedPod:
		cfg.Linux.SecurityContext.Privileged = true
	case hostNetworkPod:
		ns.Network, cfg.Hostname = runtimeapi.NamespaceMode_NODE, ""
	case sharedPIDPod:
		ns.Pid = runtimeapi.NamespaceMode_POD
	case hostIPCPod:
		ns.Ipc = runtimeapi.NamespaceMode_NODE
	case plainPod:
	}
	return cfg
}

// pod is the pod of that kind that all tests share.
func (s *security) pod(t *testing.T, kind podKind) *securityPod {
	t.Helper()
	if p := s.pods[kind]; p != nil {
		return p
	}
	s.pods[kind] = s.runPod(t, s.podConfig(kind))
	return s.pods[kind]
}

// ownPod is a pod for one test.
func (s *security) ownPod(t *testing.T, cfg *runtimeapi.PodSandboxConfig) *securityPod {
	t.Helper()
	p := s.runPod(t, cfg)
	t.Cleanup(func() {
		if err := s.CRI.RemovePod(context.Background(), p.id); err != nil {
			t.Error(err)
		}
	})
	return p
}

func (s *security) runPod(t *testing.T, cfg *runtimeapi.PodSandboxConfig) *securityPod {
	t.Helper()
	id, err := s.CRI.RunPod(t.Context(), cfg)
	must(t, err)
	return &securityPod{id, cfg}
}

func (s *security) removePods(t *testing.T) {
	for _, p := range s.pods {
		if err := s.CRI.RemovePod(context.Background(), p.id); err != nil {
			t.Error(err)
		}
	}
}

// container is a container that runs a shell script, in the lab's busybox image or another.
func (s *security) container(image, script string) *runtimeapi.ContainerConfig {
	s.mu.Lock()
	s.count++
	ctr := lab.Sh(fmt.Sprintf("c%d", s.count), script)
	s.mu.Unlock()
	if image != "" {
		ctr.Image.Image = image
	}
	return ctr
}

// idle is a container that waits for execs.
func (s *security) idle(image string) *runtimeapi.ContainerConfig {
	return s.container(image, "trap 'exit 0' TERM; sleep 86400 & wait")
}

// start starts a container, which goes with the test.
func (s *security) start(t *testing.T, p *securityPod, ctr *runtimeapi.ContainerConfig) string {
	t.Helper()
	id, err := s.tryStart(t, p, ctr)
	must(t, err)
	return id
}

func (s *security) tryStart(t *testing.T, p *securityPod, ctr *runtimeapi.ContainerConfig) (string, error) {
	t.Helper()
	id, err := s.CRI.Start(t.Context(), p.id, p.cfg, ctr)
	if id != "" {
		t.Cleanup(func() { s.remove(t, id) })
	}
	return id, err
}

func (s *security) remove(t *testing.T, id string) {
	t.Helper()
	if _, err := s.CRI.RemoveContainer(context.Background(), &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
}

// output runs a container to its end and returns what it wrote and its exit code. A container that cannot be created or
// started is an error.
func (s *security) output(t *testing.T, p *securityPod, ctr *runtimeapi.ContainerConfig) (string, int32, error) {
	t.Helper()
	id, err := s.tryStart(t, p, ctr)
	if err != nil {
		return "", 0, err
	}
	st, err := s.CRI.WaitExit(t.Context(), id, 30*time.Second)
	must(t, err)
	lines, err := lab.Log(p.cfg, ctr)
	must(t, err)
	var text strings.Builder
	for _, l := range lines {
		text.WriteString(l.Text)
		if l.Tag == "F" {
			text.WriteByte('\n')
		}
	}
	return text.String(), st.ExitCode, nil
}

// exec runs a shell script in a running container and returns all that it wrote, and its exit code.
func (s *security) exec(t *testing.T, id, script string) (string, int32) {
	t.Helper()
	resp, err := s.CRI.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", script}, Timeout: 60})
	must(t, err)
	return string(resp.Stdout) + string(resp.Stderr), resp.ExitCode
}

// image pulls an image of busybox and more entries on top; change may be nil.
func (s *security) image(t *testing.T, change func(*imagestest.Image), entries ...imagestest.Entry) string {
	t.Helper()
	img := imagestest.NewImage(s.busybox)
	if len(entries) > 0 {
		img.Layers = append(img.Layers, imagestest.Layer(entries...))
	}
	if change != nil {
		change(img)
	}
	return s.pull(t, img)
}

// pull pushes an image to the registry of hostile images and pulls it through berth. It goes with the test.
func (s *security) pull(t *testing.T, img *imagestest.Image) string {
	t.Helper()
	ref := s.push(img)
	_, err := s.CRI.Pull(t.Context(), ref)
	must(t, err)
	t.Cleanup(func() { s.removeImage(t, ref) })
	return ref
}

func (s *security) push(img *imagestest.Image) string {
	s.mu.Lock()
	s.count++
	repo := fmt.Sprintf("hostile/i%d", s.count)
	s.mu.Unlock()
	img.Config.Config.Env = append(img.Config.Config.Env, "REPO="+repo) // an image of its own, which nobody else removes
	s.reg.Push(repo, "1", img)
	return s.reg.Host() + "/" + repo + ":1"
}

func (s *security) removeImage(t *testing.T, ref string) {
	t.Helper()
	_, err := s.CRI.RemoveImage(context.Background(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Error(err)
	}
}

// info is what a verbose status tells of a container.
type containerInfo struct {
	PID         int             `json:"pid"`
	CgroupPath  string          `json:"cgroupPath"`
	RuntimeSpec json.RawMessage `json:"runtimeSpec"`
}

func (s *security) info(t *testing.T, id string) containerInfo {
	t.Helper()
	resp, err := s.CRI.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	must(t, err)
	var info containerInfo
	must(t, json.Unmarshal([]byte(resp.Info["info"]), &info))
	return info
}

// noMountOutside fails the test when something of this node is mounted where only the host mounts, or on the sentinel tree.
func (s *security) noMountOutside(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		inside := strings.HasPrefix(f[4], s.Dir+"/")
		if strings.Contains(line, s.Dir+"/") && !inside || strings.HasPrefix(f[4], s.sentinel.Dir) {
			t.Errorf("mounted on the host: %s", line)
		}
	}
}

// wantCode fails the test unless the error has that code and names all the words.
func wantCode(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if got := codeOf(err); got != code {
		t.Errorf("code %v, want %v: %v", got, code, err)
	}
	for _, w := range words {
		if err != nil && !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not name %q: %v", w, err)
		}
	}
}

// codeOf is the gRPC code of an error, wrapped or not.
func codeOf(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	st, _ := status.FromError(err)
	return st.Code()
}

// bindMount is a volume of the host.
func bindMount(host, container string) *runtimeapi.Mount {
	return &runtimeapi.Mount{HostPath: host, ContainerPath: container}
}

// volume is a directory of the host for a container to write into, in the lab's directory so that leaks are seen.
func (s *security) volume(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(s.Dir, "volume-")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
