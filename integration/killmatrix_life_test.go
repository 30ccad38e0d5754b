//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// The images of a life: one with a layer of its own, and one that shares its base with the bystander's.
var lifeImages = []string{testimages.Pause, "gcr.io/k8s-staging-cri-tools/test-image-1:latest"}

// life is everything that can happen to pods, as a list of calls that a client makes one after the other and each of
// which it repeats, as it is, when the daemon died in it. What a call has brought about is checked after it, and is known
// from then on, to be checked again after each restart of the daemon.
type life struct {
	n    *lab.Node
	acts []act
	pods map[string]*lifePod
	ctrs map[string]*lifeContainer
}

// act is one call. about names the pods and containers that it changes.
type act struct {
	name  string
	about []string
	do    func(context.Context) error
}

type lifePod struct {
	cfg   *runtimeapi.PodSandboxConfig
	id    string
	state string // "", ready, not ready
}

type lifeContainer struct {
	pod    *lifePod
	cfg    *runtimeapi.ContainerConfig
	id     string
	state  string // "", created, running, or exited with its code
	memory int64  // its limit, 0 if it was never resized
	ticks  *ticks
}

// Exits of containers.
const (
	stoppedCode = 42 // what the program exits with on its stop signal
	killedCode  = 128 + int32(syscall.SIGKILL)
)

// newLife makes a life. Nothing happens yet. keepImages leaves the images there, for other lives beside it.
func newLife(n *lab.Node, keepImages bool) *life {
	l := &life{n: n, pods: map[string]*lifePod{}, ctrs: map[string]*lifeContainer{}}
	for _, image := range lifeImages {
		l.act("PullImage "+image, nil, func(ctx context.Context) error {
			_, err := n.CRI.Pull(ctx, image)
			return err
		})
	}
	own := l.pod("own") // a user namespace, too: it is what most kills meet
	own.cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = ids().options()
	shared := l.pod("shared")
	shared.cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	l.pod("orphan")
	l.refusedPod("refused-early", func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{"net.ipv4.no_such_thing": "1"}
	})
	l.refusedPod("refused-late", func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "much"}
	})
	l.start(l.container("a", "own"))
	l.start(l.container("b", "own"))
	l.resize("b")
	l.resizePod("own")
	l.start(l.container("c", "shared"))
	l.start(l.container("d", "orphan"))
	l.refusedContainer("shared")
	l.stopContainer("a")
	l.removeContainer("a")
	l.killShim("orphan")
	l.stopPod("own")
	l.removePod("own")
	l.removePod("shared")
	l.stopPod("orphan")
	l.removePod("orphan")
	if !keepImages {
		for _, image := range lifeImages {
			l.act("RemoveImage "+image, nil, func(ctx context.Context) error {
				_, err := n.CRI.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
				return err
			})
		}
	}
	return l
}

func (l *life) act(name string, about []string, do func(context.Context) error) {
	l.acts = append(l.acts, act{name, about, do})
}

// run makes the calls from a certain one on, until one fails, which it returns.
func (l *life) run(ctx context.Context, from int) (int, error) {
	for i := from; i < len(l.acts); i++ {
		call, cancel := context.WithTimeout(ctx, time.Minute)
		err := l.acts[i].do(call)
		cancel()
		if err != nil {
			return i, fmt.Errorf("%s: %w", l.acts[i].name, err)
		}
	}
	return len(l.acts), nil
}

// pod adds RunPodSandbox.
func (l *life) pod(name string) *lifePod {
	p := &lifePod{cfg: l.n.Pod(name)}
	l.pods[name] = p
	l.act("RunPodSandbox "+name, []string{name}, func(ctx context.Context) error {
		var err error
		if p.id, err = l.n.CRI.RunPod(ctx, p.cfg); err != nil {
			return err
		}
		p.state = "ready"
		list, err := l.podsOf(ctx, p.cfg)
		if err != nil {
			return err
		}
		if len(list) != 1 || list[0].Id != p.id {
			return fmt.Errorf("pod %.12s is there as %v", p.id, list)
		}
		return l.checkPod(ctx, p)
	})
	return p
}

// refusedPod adds a RunPodSandbox that must fail, and leave nothing.
func (l *life) refusedPod(name string, spoil func(*runtimeapi.PodSandboxConfig)) {
	cfg := l.n.Pod(name)
	spoil(cfg)
	l.act("RunPodSandbox "+name, []string{name}, func(ctx context.Context) error {
		_, err := l.n.CRI.RunPod(ctx, cfg)
		if err := refused(err); err != nil {
			return err
		}
		list, err := l.podsOf(ctx, cfg)
		if err == nil && len(list) > 0 {
			err = fmt.Errorf("a pod that was refused is there: %v", list)
		}
		return err
	})
}

// refused turns the error of a call that must fail into nil, unless it says that there was nobody to refuse it.
func refused(err error) error {
	if err == nil {
		return errors.New("succeeds, although it asks for what cannot be")
	}
	if isGone(err) {
		return err
	}
	return nil
}

// isGone tells whether an error says that the daemon died.
func isGone(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if s, ok := status.FromError(err); ok {
			return s.Code() == codes.Unavailable || s.Code() == codes.Canceled
		}
	}
	return false
}

func (l *life) podsOf(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) ([]*runtimeapi.PodSandbox, error) {
	resp, err := l.n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	var list []*runtimeapi.PodSandbox
	for _, p := range resp.Items {
		if p.Metadata.Uid == cfg.Metadata.Uid {
			list = append(list, p)
		}
	}
	return list, nil
}

// container adds CreateContainer.
func (l *life) container(name, pod string) *lifeContainer {
	c := &lifeContainer{pod: l.pods[pod], cfg: ticking(name, fmt.Sprintf("exit %d", stoppedCode))}
	c.cfg.Image.Image = lifeImages[1]
	c.cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = c.pod.cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions
	l.ctrs[name] = c
	l.act("CreateContainer "+name, []string{name}, func(ctx context.Context) error {
		resp, err := l.n.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
			PodSandboxId: c.pod.id, Config: c.cfg, SandboxConfig: c.pod.cfg,
		})
		if err != nil {
			return err
		}
		c.id, c.state = resp.ContainerId, "created"
		list, err := l.n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{
			Filter: &runtimeapi.ContainerFilter{PodSandboxId: c.pod.id},
		})
		if err != nil {
			return err
		}
		n := 0
		for _, other := range list.Containers {
			if other.Metadata.Name == name {
				n++
			}
		}
		if n != 1 {
			return fmt.Errorf("container %s is there %d times", name, n)
		}
		return l.checkContainer(ctx, c)
	})
	return c
}

// refusedContainer adds a CreateContainer that must fail, and leave nothing.
func (l *life) refusedContainer(pod string) {
	p := l.pods[pod]
	cfg := lab.Container("refused", "/no/such/program")
	cfg.Image.Image = lifeImages[1]
	l.act("CreateContainer refused", []string{"refused"}, func(ctx context.Context) error {
		_, err := l.n.CRI.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
		if err := refused(err); err != nil {
			return err
		}
		list, err := l.n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.id}})
		if err != nil {
			return err
		}
		for _, c := range list.Containers {
			if c.Metadata.Name == "refused" {
				return fmt.Errorf("a container that was refused is there: %v", c)
			}
		}
		return nil
	})
}

func (l *life) start(c *lifeContainer) {
	name := c.cfg.Metadata.Name
	l.act("StartContainer "+name, []string{name}, func(ctx context.Context) error {
		_, err := l.n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.id})
		if err != nil {
			return err
		}
		c.state = "running"
		if c.ticks, err = followTicks(ctx, l.n, c.id, filepath.Join(c.pod.cfg.LogDirectory, c.cfg.LogPath)); err != nil {
			return err
		}
		return c.ticks.goesOn(ctx)
	})
}

// resizedMemory is what resize makes of a container's limit.
const resizedMemory = 96 << 20

// resize adds UpdateContainerResources. Status and kernel say the same, also after a restart.
func (l *life) resize(name string) {
	c := l.ctrs[name]
	l.act("UpdateContainerResources "+name, []string{name}, func(ctx context.Context) error {
		_, err := l.n.CRI.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: c.id, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: resizedMemory},
		})
		if err != nil {
			return err
		}
		c.memory = resizedMemory
		return l.checkContainer(ctx, c)
	})
}

// checkMemory checks that the kernel holds a container to what its status says, and that this is what is known.
func (l *life) checkMemory(ctx context.Context, c *lifeContainer, st *runtimeapi.ContainerStatus) error {
	if got := st.GetResources().GetLinux().GetMemoryLimitInBytes(); got != c.memory {
		return fmt.Errorf("container %s: its status has the memory limit %d, expected is %d", c.cfg.Metadata.Name, got, c.memory)
	}
	cgroup, _, err := cgroupOf(ctx, l.n, c.id)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(cgroupFile(cgroup, "memory", "memory.limit_in_bytes", "memory.max"))
	if err == nil && strings.TrimSpace(string(data)) != fmt.Sprint(c.memory) {
		err = fmt.Errorf("container %s: the kernel has the memory limit %s, expected is %d", c.cfg.Metadata.Name, data, c.memory)
	}
	return err
}

// resizePod adds UpdatePodSandboxResources.
func (l *life) resizePod(name string) {
	p := l.pods[name]
	l.act("UpdatePodSandboxResources "+name, []string{name}, func(ctx context.Context) error {
		_, err := l.n.CRI.UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: p.id, Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: resizedMemory},
		})
		if err != nil {
			return err
		}
		return l.checkPod(ctx, p)
	})
}

func (l *life) stopContainer(name string) {
	c := l.ctrs[name]
	l.act("StopContainer "+name, []string{name}, func(ctx context.Context) error {
		if _, err := l.n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.id, Timeout: 30}); err != nil {
			return err
		}
		c.state = exited(stoppedCode)
		return errors.Join(l.checkContainer(ctx, c), c.ticks.said())
	})
}

func (l *life) removeContainer(name string) {
	c := l.ctrs[name]
	l.act("RemoveContainer "+name, []string{name}, func(ctx context.Context) error {
		if _, err := l.n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.id}); err != nil {
			return err
		}
		c.state = ""
		return l.checkContainer(ctx, c)
	})
}

// killShim adds the death of a shim by itself.
func (l *life) killShim(pod string) {
	p := l.pods[pod]
	about := []string{pod}
	for name, c := range l.ctrs {
		if c.pod == p {
			about = append(about, name)
		}
	}
	killed := false
	l.act("shim of "+pod+" dies", about, func(ctx context.Context) error {
		if !killed {
			pid, err := shimPID(ctx, l.n, p.id)
			if err != nil {
				return err
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				return err
			}
			killed = true
		}
		for p.state = "not ready"; ; {
			err := l.checkPod(ctx, p)
			if err == nil {
				break
			}
			if isGone(err) || ctx.Err() != nil {
				return err
			}
			time.Sleep(5 * time.Millisecond)
		}
		// What is left of the pod is taken away after that, in a call of the daemon's own; a client's Stop waits for it.
		return l.finished(ctx, p, killedCode)
	})
}

// finished notes that the containers of a pod which ran have ended, and waits until the daemon says so.
func (l *life) finished(ctx context.Context, p *lifePod, code int32) error {
	for _, c := range l.ctrs {
		if c.pod != p || c.state != "running" {
			continue
		}
		st, err := l.n.CRI.WaitExit(ctx, c.id, 20*time.Second)
		if err != nil {
			return err
		}
		if st.ExitCode != code {
			return fmt.Errorf("container %s exited with %d, not %d (%s)", c.cfg.Metadata.Name, st.ExitCode, code, st.Reason)
		}
	}
	for _, c := range l.ctrs {
		if c.pod == p && c.state == "running" {
			c.state = exited(code)
		}
	}
	return nil
}

func (l *life) aboutPod(pod string) []string {
	about := []string{pod}
	for name, c := range l.ctrs {
		if c.pod == l.pods[pod] {
			about = append(about, name)
		}
	}
	return about
}

func (l *life) stopPod(pod string) {
	p := l.pods[pod]
	l.act("StopPodSandbox "+pod, l.aboutPod(pod), func(ctx context.Context) error {
		if _, err := l.n.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
			return err
		}
		p.state = "not ready"
		return errors.Join(l.checkPod(ctx, p), l.finished(ctx, p, killedCode))
	})
}

func (l *life) removePod(pod string) {
	p := l.pods[pod]
	l.act("RemovePodSandbox "+pod, l.aboutPod(pod), func(ctx context.Context) error {
		if _, err := l.n.CRI.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
			return err
		}
		p.state = ""
		for _, c := range l.ctrs {
			if c.pod == p {
				c.state = ""
			}
		}
		return l.check(ctx, nil)
	})
}

func exited(code int32) string { return fmt.Sprintf("exited with %d", code) }

// checkPod checks what is known of a pod.
func (l *life) checkPod(ctx context.Context, p *lifePod) error {
	state := ""
	resp, err := l.n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	switch {
	case status.Code(err) == codes.NotFound:
	case err != nil:
		return err
	case resp.Status.State == runtimeapi.PodSandboxState_SANDBOX_READY:
		state = "ready"
	default:
		state = "not ready"
	}
	if state != p.state {
		return fmt.Errorf("pod %s is %q, expected is %q", p.cfg.Metadata.Name, state, p.state)
	}
	if state == "ready" && resp.Status.GetNetwork().GetIp() == "" {
		return fmt.Errorf("pod %s is ready and has no address", p.cfg.Metadata.Name)
	}
	return nil
}

// checkContainer checks what is known of a container.
func (l *life) checkContainer(ctx context.Context, c *lifeContainer) error {
	state := ""
	st, err := l.n.CRI.ContainerState(ctx, c.id)
	switch {
	case status.Code(errors.Unwrap(err)) == codes.NotFound:
	case err != nil:
		return err
	case st.State == runtimeapi.ContainerState_CONTAINER_CREATED:
		state = "created"
	case st.State == runtimeapi.ContainerState_CONTAINER_RUNNING:
		state = "running"
	case st.State == runtimeapi.ContainerState_CONTAINER_EXITED:
		state = exited(st.ExitCode)
		if st.Reason == "" || st.FinishedAt == 0 {
			return fmt.Errorf("container %s: the exit lacks reason %q or time %d", c.cfg.Metadata.Name, st.Reason, st.FinishedAt)
		}
	default:
		state = st.State.String()
	}
	if state == "running" && c.memory != 0 {
		if err := l.checkMemory(ctx, c, st); err != nil {
			return err
		}
	}
	if state != c.state {
		return fmt.Errorf("container %s is %q (%s: %s), expected is %q", c.cfg.Metadata.Name, state, st.GetReason(), st.GetMessage(), c.state)
	}
	return nil
}

// check checks everything that is known, but for what a call that was interrupted is about.
func (l *life) check(ctx context.Context, interrupted []string) error {
	skip := map[string]bool{}
	for _, name := range interrupted {
		skip[name] = true
	}
	var errs []error
	for name, p := range l.pods {
		if !skip[name] && p.id != "" {
			errs = append(errs, l.checkPod(ctx, p))
		}
	}
	for name, c := range l.ctrs {
		if skip[name] || c.id == "" {
			continue
		}
		if err := l.checkContainer(ctx, c); err != nil {
			errs = append(errs, err)
		} else if c.state == "running" {
			errs = append(errs, c.ticks.goesOn(ctx))
		}
	}
	return errors.Join(errs...)
}
