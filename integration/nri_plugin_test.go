//go:build integration

package integration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"

	"github.com/berth-run/berth/integration/lab"
)

// nriWatcher is a plugin that takes every event and changes nothing. It ends with its connection.
func nriWatcher() int {
	gone := make(chan struct{})
	s, err := stub.New(&nriPlugin{}, stub.WithOnClose(sync.OnceFunc(func() { close(gone) })))
	if err != nil {
		return 1
	}
	if err := s.Start(context.Background()); err != nil {
		return 1
	}
	<-gone
	return 0
}

// installWatcher has a node's daemon start nriWatcher: it is this very program.
func installWatcher(n *lab.Node) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return errors.Join(os.Mkdir(n.NRIPlugins(), 0o755), os.Symlink(self, filepath.Join(n.NRIPlugins(), "20-watcher")))
}

// nriPlugin is a plugin whose answers a test chooses, by the name of the container.
type nriPlugin struct {
	mu     sync.Mutex
	adjust map[string]func(*api.ContainerAdjustment)
	update func(c *api.Container, want *api.LinuxResources) []*api.ContainerUpdate
	synced []string // containers that it was told of when it came
	events []string // of containers: what and name
	ready  chan struct{}
}

func (p *nriPlugin) note(event string, c *api.Container) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events = append(p.events, event+" "+c.GetName())
}

func (p *nriPlugin) Synchronize(_ context.Context, _ []*api.PodSandbox, cs []*api.Container) ([]*api.ContainerUpdate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range cs {
		p.synced = append(p.synced, c.GetId())
	}
	if p.ready != nil {
		close(p.ready)
		p.ready = nil
	}
	return nil, nil
}

func (p *nriPlugin) RunPodSandbox(context.Context, *api.PodSandbox) error    { return nil }
func (p *nriPlugin) StopPodSandbox(context.Context, *api.PodSandbox) error   { return nil }
func (p *nriPlugin) RemovePodSandbox(context.Context, *api.PodSandbox) error { return nil }

func (p *nriPlugin) CreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.note("create", c)
	change := p.adjust[c.GetName()]
	if change == nil {
		return nil, nil, nil
	}
	a := &api.ContainerAdjustment{}
	change(a)
	return a, nil, nil
}

func (p *nriPlugin) PostCreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("created", c)
	return nil
}

func (p *nriPlugin) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("start", c)
	return nil
}

func (p *nriPlugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("started", c)
	return nil
}

func (p *nriPlugin) UpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container, want *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	p.note("update", c)
	if p.update == nil {
		return nil, nil
	}
	return p.update(c, want), nil
}

func (p *nriPlugin) PostUpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("updated", c)
	return nil
}

func (p *nriPlugin) StopContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	p.note("stop", c)
	return nil, nil
}

func (p *nriPlugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("remove", c)
	return nil
}

// attach connects a plugin to a node's runtime and returns once it has been told what is there.
func (p *nriPlugin) attach(t *testing.T, n *lab.Node) stub.Stub {
	t.Helper()
	ready := make(chan struct{})
	p.ready = ready
	s, err := stub.New(p, stub.WithPluginName("test"), stub.WithPluginIdx("10"), stub.WithSocketPath(n.NRISocket()), stub.WithOnClose(func() {}))
	must(t, err)
	must(t, s.Start(t.Context()))
	t.Cleanup(s.Stop)
	select {
	case <-ready:
	case <-time.After(time.Minute):
		t.Fatal("the plugin is not told what there is")
	}
	return s
}
