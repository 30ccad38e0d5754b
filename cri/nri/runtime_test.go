package nri

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

// nothing is a runtime without pods that notes what is asked of it.
type nothing struct {
	mu      sync.Mutex
	updated []string
	evicted chan string
}

func (n *nothing) Known() ([]*api.PodSandbox, []*api.Container) {
	return []*api.PodSandbox{{Id: "p"}}, []*api.Container{{Id: "c", PodSandboxId: "p"}}
}

func (n *nothing) Update(_ context.Context, id string, _ *api.LinuxResources) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.updated = append(n.updated, id)
	if id == "broken" {
		return errors.New("no such container")
	}
	return nil
}

func (n *nothing) Evict(_ context.Context, id, reason string) error {
	n.evicted <- id + ": " + reason
	return nil
}

// started is a runtime that plugins can connect to.
func started(t *testing.T, o Options) (*Runtime, *nothing) {
	t.Helper()
	if o.Socket == "" {
		o.Socket = filepath.Join(t.TempDir(), "n", "nri.sock")
	}
	o.Log = slog.New(slog.DiscardHandler)
	r, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	n := &nothing{evicted: make(chan string, 8)}
	if err := r.Start(n); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(o.Socket); err == nil {
			t.Errorf("%s is left behind", o.Socket)
		}
	})
	return r, n
}

// plugin is one whose answers tests choose.
type plugin struct {
	synced chan int // containers that it was told of
	create func(context.Context, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error)
	run    func(context.Context) error
}

func (p *plugin) Synchronize(_ context.Context, _ []*api.PodSandbox, cs []*api.Container) ([]*api.ContainerUpdate, error) {
	p.synced <- len(cs)
	return nil, nil
}

func (p *plugin) RunPodSandbox(ctx context.Context, _ *api.PodSandbox) error {
	if p.run == nil {
		return nil
	}
	return p.run(ctx)
}

func (p *plugin) CreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if p.create == nil {
		return nil, nil, nil
	}
	return p.create(ctx, c)
}

// connect connects a plugin and returns once it is one of those that events go to.
func connect(t *testing.T, r *Runtime, name string, p *plugin) stub.Stub {
	t.Helper()
	p.synced = make(chan int, 1)
	s, err := stub.New(p, stub.WithPluginName(name), stub.WithPluginIdx("10"), stub.WithSocketPath(r.o.Socket), stub.WithOnClose(func() {}))
	if err != nil {
		t.Fatal(err)
	}
	was := r.plugins.Load()
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	select {
	case n := <-p.synced:
		if n != 1 {
			t.Errorf("the plugin was told of %d containers", n)
		}
	case <-time.After(time.Minute):
		t.Fatal("the plugin is not told what there is")
	}
	eventually(t, "the plugin gets events", func() bool {
		leave, _ := r.Enter() // waits until the plugin is in
		defer leave()
		return r.plugins.Load() > was
	})
	return s
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so: %s", what)
		}
	}
}

func TestWithoutASocketThereIsNothing(t *testing.T) {
	r, err := Open(Options{})
	if err != nil || r != nil {
		t.Fatal(r, err)
	}
	leave, plugins := r.Enter()
	leave()
	if plugins || r.Active() || r.Start(nil) != nil || r.Close() != nil {
		t.Error("a runtime without NRI has plugins")
	}
}

func TestLiveSocketIsNotStolenAndStaleOneReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nri.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(Options{Socket: path, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(&nothing{}); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a live socket is taken: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the other runtime's socket has suffered: %v", err)
	}
	_ = c.Close()
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	r, _ = started(t, Options{Socket: path})
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	connect(t, r, "first", &plugin{})
}

func TestASocketThatIsNotOursStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nri.sock")
	r, err := Open(Options{Socket: path, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(&nothing{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("what another runtime has put there is gone: %v", err)
	}
}

func TestAFileThatIsNoSocketStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nri.sock")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Open(Options{Socket: path, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(&nothing{}); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Error(err)
	}
	_ = r.Close()
	if data, err := os.ReadFile(path); err != nil || string(data) != "x" {
		t.Error("the file has suffered", err)
	}
}

// A plugin that does not answer is waited for once, and dropped.
func TestHangingPluginIsDropped(t *testing.T) {
	r, _ := started(t, Options{RequestTimeout: 300 * time.Millisecond})
	release := make(chan struct{})
	defer close(release)
	connect(t, r, "hangs", &plugin{run: func(context.Context) error {
		<-release // and not the end of its time, which it would be told of just before the runtime gives it up
		return nil
	}})
	if !r.Active() {
		t.Fatal("no plugin")
	}
	err := r.RunPodSandbox(t.Context(), &api.PodSandbox{Id: "q"})
	if err != nil {
		t.Errorf("the pod does not go on without: %v", err)
	}
	if r.Active() {
		t.Error("the plugin is still asked")
	}
}

// A plugin whose connection ends is one that never was.
func TestPluginThatDiesIsDropped(t *testing.T) {
	r, _ := started(t, Options{})
	s := connect(t, r, "dies", &plugin{})
	s.Stop()
	eventually(t, "the plugin is gone", func() bool {
		if err := r.RunPodSandbox(t.Context(), &api.PodSandbox{Id: "q"}); err != nil {
			t.Fatalf("a pod suffers: %v", err)
		}
		return !r.Active()
	})
}

func TestMistakeOfAPluginNamesIt(t *testing.T) {
	r, _ := started(t, Options{})
	connect(t, r, "clumsy", &plugin{create: func(context.Context, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		a := &api.ContainerAdjustment{}
		a.AddRlimit("RLIMIT_NOTHING", 1, 1)
		return a, nil, nil
	}})
	_, _, err := r.CreateContainer(t.Context(), &api.PodSandbox{Id: "p"}, &api.Container{Id: testID})
	if err == nil || !strings.Contains(err.Error(), `plugin "10-clumsy": Rlimits["RLIMIT_NOTHING"]`) {
		t.Error(err)
	}
}

func TestUnsolicitedUpdatesAndEvictions(t *testing.T) {
	r, n := started(t, Options{})
	s := connect(t, r, "asks", &plugin{})
	update := func(id string) *api.ContainerUpdate {
		u := &api.ContainerUpdate{ContainerId: id}
		u.SetLinuxCPUShares(512)
		return u
	}
	failed, err := s.UpdateContainers([]*api.ContainerUpdate{update("good"), update("broken"), {ContainerId: "empty"}})
	if err != nil || len(failed) != 1 || failed[0].ContainerId != "broken" {
		t.Errorf("%v %v", failed, err)
	}
	n.mu.Lock()
	if strings.Join(n.updated, " ") != "good broken" {
		t.Errorf("updated: %v", n.updated)
	}
	n.mu.Unlock()
	// The stub has no call for evictions; the message has.
	_, err = r.asked(t.Context(), func(m any) error {
		m.(*api.UpdateContainersRequest).Evict = []*api.ContainerEviction{{ContainerId: "c", Reason: "too loud"}}
		return nil
	}, nil, func(_ context.Context, unmarshal func(any) error) (any, error) {
		return nil, unmarshal(&api.UpdateContainersRequest{})
	})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-n.evicted:
		if e != "c: too loud" {
			t.Error(e)
		}
	case <-time.After(time.Minute):
		t.Error("the container is not evicted")
	}
}

// A header that announces gigabytes ends the connection and makes nobody allocate them.
func TestHostileFramesAreRefused(t *testing.T) {
	r, _ := started(t, Options{})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for _, size := range []uint32{1 << 31, 1<<32 - 1, 5 << 20} {
		c, err := net.Dial("unix", r.o.Socket)
		if err != nil {
			t.Fatal(err)
		}
		var header [8]byte
		binary.BigEndian.PutUint32(header[:4], 2)
		binary.BigEndian.PutUint32(header[4:], size)
		if _, err := c.Write(header[:]); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := c.Read(header[:]); err == nil || os.IsTimeout(err) {
			t.Errorf("a frame of %d bytes: the connection stays: %v", size, err)
		}
		_ = c.Close()
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 64<<20 {
		t.Errorf("%d bytes were allocated", grown)
	}
	// Noise that is no frame at all, and a peer that says nothing, do not keep others out.
	for _, noise := range []string{"GET / HTTP/1.1\r\n\r\n", "\x00\x00\x00\x01\x00\x00\x00\x04abcd", ""} {
		c, err := net.Dial("unix", r.o.Socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte(noise))
		_ = c.Close()
	}
	connect(t, r, "honest", &plugin{})
}

// Plugins that are installed are started, with their configuration, and ended with the daemon.
func TestInstalledPluginIsStarted(t *testing.T) {
	dir := t.TempDir()
	ran := filepath.Join(dir, "ran")
	plugins := filepath.Join(dir, "plugins")
	if err := os.Mkdir(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\necho \"$NRI_PLUGIN_NAME $NRI_PLUGIN_IDX $NRI_PLUGIN_SOCKET\" > " + ran + "\n"
	if err := os.WriteFile(filepath.Join(plugins, "20-brief"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	r, _ := started(t, Options{Plugins: plugins, Config: dir})
	if data, err := os.ReadFile(ran); err != nil || string(data) != "brief 20 3\n" {
		t.Errorf("%q %v", data, err)
	}
	if r.Active() {
		t.Error("a plugin that has ended counts")
	}
}
