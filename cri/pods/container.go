package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/internal/step"
)

// container is one container. The lock of its pod serialises the calls on it; mu guards rec, which exits change, too.
type container struct {
	m    *Manager
	pod  *pod
	view atomic.Pointer[Container]

	mu     sync.Mutex
	rec    containerRecord
	gone   bool          // forgotten: a call that comes late keeps no record of it
	exited chan struct{} // closed once it has exited and its record says so

	unheard  atomic.Bool // whoever made or started it may not know; see again.go
	life     lifeline    // what is told of it
	told     toldNRI     // to plugins of NRI
	resizing sync.Mutex  // one change of the resources at a time

	signalling lock // one stop signal at a time

	process atomic.Pointer[specs.Process] // of the specification, for exec
}

// Reasons that berth gives beside those that the kubelet knows ("Completed", "Error", "OOMKilled").
const (
	reasonStart  = "StartError"
	reasonShim   = "ShimDied"
	reasonReboot = "NodeRestarted"
	reasonLost   = "Unknown"
)

// startErrorCode is the exit code of a container whose program could not be started, as containerd gives it.
const startErrorCode = 128

func (m *Manager) newContainer(p *pod, rec containerRecord) *container {
	c := &container{m: m, pod: p, rec: rec, exited: make(chan struct{}), signalling: newLock()}
	c.life.tell = func(types ...cri.ContainerEventType) { m.announce(c.pod, rec.ID, types...) }
	ended := rec.Phase == stopped || !rec.FinishedAt.IsZero()
	if ended {
		close(c.exited)
	}
	c.told.recall(rec.Phase, ended)
	c.publish()
	return c
}

func (c *container) update(change func(*containerRecord)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.rec)
	c.publish()
	if c.gone {
		return nil
	}
	return c.m.ctrFiles.save(c.rec.ID, &c.rec)
}

// forget removes the record, for good.
func (c *container) forget() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	c.m.levels.free(c.rec.ID)
	return c.m.ctrFiles.remove(c.rec.ID)
}

func (c *container) saveSteps(begun []string) error {
	return c.update(func(r *containerRecord) { r.Steps = begun })
}

func (c *container) record() containerRecord {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec
}

func (c *container) publish() {
	r := &c.rec
	v := &Container{
		ID: r.ID, SandboxID: r.SandboxID, Config: r.Config.M, ImageID: r.ImageID, ImageRef: r.ImageRef,
		CreatedAt: r.CreatedAt, StartedAt: r.StartedAt, FinishedAt: r.FinishedAt, ExitCode: r.ExitCode,
		Reason: r.Reason, Message: r.Message, LogPath: r.LogPath, PID: r.PID, User: r.User.M, StopSignal: r.StopName,
		Resources: r.Resources.M, CgroupPath: cgroups.Path(r.Cgroup),
	}
	switch {
	case !r.FinishedAt.IsZero():
		v.State, v.PID = cri.ContainerState_CONTAINER_EXITED, 0
	case r.Phase == starting:
		v.State = cri.ContainerState_CONTAINER_RUNNING
	case r.Phase == ready:
		v.State = cri.ContainerState_CONTAINER_CREATED
	default:
		v.State = cri.ContainerState_CONTAINER_UNKNOWN
	}
	c.view.Store(v)
}

func containerName(sandboxID string, cfg *cri.ContainerConfig) string {
	return fmt.Sprintf("%s/%s_%d", sandboxID, cfg.GetMetadata().GetName(), cfg.GetMetadata().GetAttempt())
}

// CreateContainer makes a container in a pod that is ready and returns its id. Its init waits to be started. On an error
// nothing is left of it.
func (m *Manager) CreateContainer(ctx context.Context, sandboxID string, cfg *cri.ContainerConfig) (string, error) {
	p, err := m.pod(sandboxID)
	if err != nil {
		return "", err
	}
	if cfg.GetMetadata() == nil {
		return "", fmt.Errorf("config.metadata is missing: %w", errdefs.ErrInvalidArgument)
	}
	name := containerName(p.rec.ID, cfg)
	cl, id, err := m.claim(ctx, name)
	if errdefs.IsAlreadyExists(err) {
		if again := m.containerAgain(name, cfg); again != "" {
			return again, nil
		}
	}
	if err != nil || id != "" {
		return id, err
	}
	m.watchers.Go(cgroups.ExpectMove) // libcontainer moves the container's init
	c, err := m.createContainer(ctx, p, cfg)
	if err == nil {
		id = c.rec.ID
		c.unheard.Store(mayBeUnheard(ctx))
	}
	m.settle(name, cl, id, err)
	return id, err
}

func (m *Manager) createContainer(ctx context.Context, p *pod, cfg *cri.ContainerConfig) (*container, error) {
	image, err := m.opts.Images.Image(cfg.GetImage().GetImage())
	if err != nil {
		return nil, fmt.Errorf("config.image: %w", err)
	}
	id := newID()
	cgroup, err := m.opts.Cgroups.Join(p.config().GetLinux().GetCgroupParent(), id)
	if err != nil {
		return nil, err
	}
	logPath := ""
	if dir := p.config().GetLogDirectory(); dir != "" && cfg.GetLogPath() != "" {
		logPath = dir + "/" + cfg.GetLogPath()
	}
	if err := p.lock.Lock(ctx); err != nil {
		return nil, err
	}
	defer p.lock.Unlock()
	if !p.view.Load().Ready {
		return nil, failedPrecondition("pod sandbox %s is not ready (%s)", p.rec.ID, p.view.Load().Reason)
	}
	if err := m.labelContainer(id, cfg, p.rec.SELinux); err != nil {
		return nil, err
	}
	c := m.newContainer(p, containerRecord{
		ID: id, SandboxID: p.rec.ID, Boot: m.boot, Phase: creating, CreatedAt: m.createdNow(p.config().GetMetadata().GetUid()),
		ImageID: image.ID.String(), ImageRef: imageRef(image), Cgroup: string(cgroup), LogPath: logPath,
		Config: message[*cri.ContainerConfig]{M: cfg}, Resources: message[*cri.LinuxContainerResources]{M: cfg.GetLinux().GetResources()},
	})
	s := m.stack("CreateContainer", id, c.saveSteps)
	m.mu.Lock()
	m.making[id] = c
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.making, id)
		m.mu.Unlock()
	}()
	b := &build{container: c, image: image}
	err = s.Run(ctx, c.steps(b, "dirs", "rootfs", "mount", "image-volumes", "spec")...)
	if err == nil && b.labels().Mount != "" {
		err = s.Run(ctx, c.steps(b, "relabel")...)
	}
	if err == nil {
		err = b.negotiate(ctx, s)
	}
	if err == nil {
		err = s.Run(ctx, c.steps(b, "create")...)
	}
	if err == nil {
		err = s.Run(ctx, step.Step{Name: "record", Do: func(context.Context) error {
			return c.update(func(r *containerRecord) {
				r.Phase = ready
				if !r.FinishedAt.IsZero() { // init was killed meanwhile
					r.Phase = stopped
				}
			})
		}})
	}
	if err != nil {
		undo := s.Unwind(ctx)
		c.tellRemoved(ctx, s)
		if undo != nil {
			// It stays in the records, under no name, and is undone when the pod is removed or the daemon starts.
			_ = c.update(func(r *containerRecord) {
				r.Phase, r.FinishedAt, r.ExitCode, r.Reason, r.Message = removing, time.Now(), startErrorCode, reasonStart, err.Error()
			})
			c.markExited()
			m.mu.Lock()
			m.containers[id] = c
			m.mu.Unlock()
			m.log.Warn("container failed and is not all undone; it is tried again when it is removed", "id", id, "error", undo)
			return nil, err
		}
		return nil, errors.Join(err, c.forget())
	}
	m.mu.Lock()
	m.containers[id] = c
	m.mu.Unlock()
	c.life.isCreated()
	c.tellCreated(ctx, s)
	return c, nil
}

// imageRef is what a container says it was made from: a digest that a registry knows, where there is one.
func imageRef(i *images.Image) string {
	if len(i.RepoDigests) > 0 {
		return i.RepoDigests[0]
	}
	return i.ID.String()
}

// markExited tells everybody that the container has exited. Its status is on record.
func (c *container) markExited() {
	c.mu.Lock()
	select {
	case <-c.exited:
	default:
		close(c.exited)
	}
	c.mu.Unlock()
	c.life.hasEnded()
}

// StartContainer has a created container run its program.
func (m *Manager) StartContainer(ctx context.Context, id string) (err error) {
	c, err := m.container(id)
	if err != nil {
		return err
	}
	if err := c.pod.lock.Lock(ctx); err != nil {
		return err
	}
	defer c.pod.lock.Unlock()
	if c.startedAgain() {
		return nil
	}
	if v := c.view.Load(); v.State != cri.ContainerState_CONTAINER_CREATED {
		return failedPrecondition("container %s is %s, not created", c.rec.ID, stateName(v.State))
	}
	s := m.stack("StartContainer", c.rec.ID, nil)
	c.life.starting()
	defer func() { c.life.isStarted(err == nil) }()
	err = c.startTold(ctx, s, func() error {
		return s.Run(ctx,
			// Before it runs, so that a daemon that dies in between knows when it was started.
			step.Step{Name: "record", Do: func(context.Context) error {
				return c.update(func(r *containerRecord) { r.Phase, r.StartedAt = starting, time.Now() })
			}},
			step.Step{Name: "start", Timeout: 30 * time.Second, Do: func(ctx context.Context) error {
				return ofShim(c.pod.shim().Start(ctx, c.rec.ID))
			}},
		)
	})
	if err == nil {
		c.unheard.Store(mayBeUnheard(ctx))
		return nil
	}
	// The kubelet reads the reason from a container that has exited with code 128, and makes another.
	message := err.Error()
	_ = c.kill(context.WithoutCancel(ctx))
	_ = c.update(func(r *containerRecord) {
		if r.FinishedAt.IsZero() {
			r.FinishedAt = time.Now()
		}
		r.Phase, r.ExitCode, r.Reason, r.Message = stopped, startErrorCode, reasonStart, message
	})
	c.markExited()
	return err
}

func stateName(s cri.ContainerState) string {
	return map[cri.ContainerState]string{
		cri.ContainerState_CONTAINER_CREATED: "created", cri.ContainerState_CONTAINER_RUNNING: "running",
		cri.ContainerState_CONTAINER_EXITED: "exited",
	}[s]
}

// StopContainer sends a container its stop signal, once, waits for it to exit, and after the grace period kills all its
// processes. It returns when the container has exited. An unknown container is stopped.
func (m *Manager) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	c, err := m.container(id)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	s := m.stack("StopContainer", c.rec.ID, nil)
	if rec := c.record(); rec.FinishedAt.IsZero() && rec.Phase == starting && grace > 0 {
		err := s.Run(ctx,
			step.Step{Name: "signal", Timeout: 30 * time.Second, Do: func(ctx context.Context) error {
				// Of calls that come at once the others wait for the first: a program counts its signals.
				if err := c.signalling.Lock(ctx); err != nil {
					return err
				}
				defer c.signalling.Unlock()
				if c.record().Signalled {
					return nil
				}
				ctx, cancel := context.WithTimeout(ctx, shimAnswers)
				defer cancel()
				if err := c.pod.shim().Signal(ctx, rec.ID, rec.StopSignal); err != nil {
					return nil // it is killed below all the same
				}
				return c.update(func(r *containerRecord) { r.Signalled = true })
			}},
			step.Step{Name: "wait", Timeout: min(grace, math.MaxInt64-time.Minute) + time.Minute, Do: func(ctx context.Context) error {
				t := time.NewTimer(grace)
				defer t.Stop()
				select {
				case <-c.exited:
				case <-t.C:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				return nil
			}},
		)
		if err != nil {
			return err
		}
	}
	if err := s.Run(ctx, step.Step{Name: "kill", Timeout: time.Minute, Do: c.kill}); err != nil {
		return err
	}
	c.tellEnded(ctx, s)
	return nil
}

// Bounds on a shim that does not answer, stopped by somebody or stuck: then the container's cgroup is the truth.
const (
	shimAnswers = 10 * time.Second // to a request that it only has to pass on
	exitIsTold  = 5 * time.Second  // from when no process is left
)

// kill kills every process of the container and waits until its exit is on record. It does not depend on the shim.
func (c *container) kill(ctx context.Context) error {
	select {
	case <-c.exited:
		return nil
	default:
	}
	sctx, cancel := context.WithTimeout(ctx, shimAnswers)
	defer cancel()
	err := c.pod.shim().KillAll(sctx, c.rec.ID)
	var answer *shim.Error
	if errors.As(err, &answer) && answer.Code == shim.CodeNotFound {
		c.lost(reasonLost, "its shim does not know it")
		return nil
	}
	reason, why := reasonLost, "its shim does not tell how it ended"
	if err != nil {
		if kerr := cgroups.Kill(cgroups.Path(c.rec.Cgroup)); kerr != nil {
			return errors.Join(err, kerr)
		}
		reason, why = reasonShim, "it was killed, and its shim does not answer"
	}
	if errors.Is(err, shim.ErrGone) {
		c.lost(reason, "its shim has ended, and it was killed")
		return nil // there is nobody to wait for
	}
	t := time.NewTimer(exitIsTold)
	defer t.Stop()
	select {
	case <-c.exited:
		return nil
	case <-t.C:
	case <-ctx.Done():
		return fmt.Errorf("container %s was killed but has not exited yet: %w", c.rec.ID, context.Cause(ctx))
	}
	if err := cgroups.Kill(cgroups.Path(c.rec.Cgroup)); err != nil {
		return err
	}
	c.lost(reason, why)
	return nil
}

// RemoveContainer kills a container that runs, and removes it but for its log. An unknown container is removed.
func (m *Manager) RemoveContainer(ctx context.Context, id string) error {
	c, err := m.container(id)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.pod.lock.Lock(ctx); err != nil {
		return err
	}
	defer c.pod.lock.Unlock()
	return c.remove(ctx)
}

// remove does the work of RemoveContainer. The caller holds the pod's lock.
func (c *container) remove(ctx context.Context) error {
	m := c.m
	m.mu.RLock()
	known := m.containers[c.rec.ID] == c
	m.mu.RUnlock()
	if !known {
		return nil // another call was faster
	}
	s := m.stack("RemoveContainer", c.rec.ID, c.saveSteps)
	err := s.Run(ctx,
		step.Step{Name: "kill", Timeout: time.Minute, Do: c.kill},
		step.Step{Name: "record", Do: func(context.Context) error {
			return c.update(func(r *containerRecord) { r.Phase = removing })
		}},
	)
	if err != nil {
		return err
	}
	c.tellRemoved(ctx, s)
	s.Resume(c.steps(nil, c.record().Steps...)...)
	if err := s.Unwind(ctx); err != nil {
		return err
	}
	err = s.Run(ctx, step.Step{Name: "forget", Do: func(context.Context) error { return c.forget() }})
	if err != nil {
		return err
	}
	m.mu.Lock()
	delete(m.containers, c.rec.ID)
	m.mu.Unlock()
	m.freeName(containerName(c.rec.SandboxID, c.rec.Config.M), c.rec.ID)
	c.life.isDeleted()
	return nil
}

// leaveSandbox undoes what of a container cannot outlive its sandbox: what its shim and its cgroup know of it. Its root
// file system stays until it is removed.
func (c *container) leaveSandbox(ctx context.Context, call string) error {
	rec := c.record()
	i := len(rec.Steps) - 1
	if i < 0 || rec.Steps[i] != "create" {
		return nil
	}
	s := c.m.stack(call, rec.ID, func(begun []string) error {
		return c.saveSteps(append(append([]string(nil), rec.Steps[:i]...), begun...))
	})
	s.Resume(c.steps(nil, "create")...)
	return s.Unwind(ctx)
}

// observeState takes note of what a shim tells.
func (m *Manager) observeState(p *pod, s shim.State) {
	m.mu.RLock()
	c := m.containers[s.ID]
	if c == nil {
		c = m.making[s.ID]
	}
	m.mu.RUnlock()
	if c == nil || c.rec.SandboxID != p.rec.ID || s.Status != shim.Exited {
		return // the call that creates it asks by itself
	}
	c.exit(s)
}

// ended notes that the container has exited. One that is being made or removed stays so: a daemon that dies now leaves it
// to the next one to undo, and its name to others.
func (r *containerRecord) ended() {
	if r.Phase != creating && r.Phase != removing {
		r.Phase = stopped
	}
}

// exit puts a container's end on record, once.
func (c *container) exit(s shim.State) {
	select {
	case <-c.exited:
		return
	default:
	}
	err := c.update(func(r *containerRecord) {
		if !r.FinishedAt.IsZero() {
			return
		}
		r.FinishedAt, r.ExitCode = s.Exited, int32(s.ExitCode)
		if r.FinishedAt.IsZero() {
			r.FinishedAt = time.Now()
		}
		switch {
		case s.OOMKills > 0: // whichever process it was, and however init has ended since, as containerd says it, too
			r.Reason = "OOMKilled"
			r.Message = fmt.Sprintf("the kernel killed %d processes of the container because it used more memory than its limit allows", s.OOMKills)
		case s.ExitCode == 0:
			r.Reason = "Completed"
		default:
			r.Reason = "Error"
		}
		if s.LogDropped > 0 {
			r.Message += fmt.Sprintf(" (%d bytes of its output could not be written to its log: no space was left)", s.LogDropped)
		}
		r.ended()
	})
	if err != nil {
		c.m.log.Error("exit of a container is not kept", "id", c.rec.ID, "error", err)
	}
	c.markExited()
	c.endsByItself()
}

// lost puts the end of a container on record that nobody saw, unless its shim has left a note of it.
func (c *container) lost(reason, why string) {
	if s, err := shim.ReadExit(c.dir()); err == nil && s.ID == c.rec.ID {
		c.exit(*s)
		return
	}
	code := int32(128 + syscall.SIGKILL)
	if reason == reasonReboot || reason == reasonLost {
		code = 255
	}
	err := c.update(func(r *containerRecord) {
		if !r.FinishedAt.IsZero() {
			return
		}
		r.FinishedAt, r.ExitCode, r.Reason, r.Message = time.Now(), code, reason, why
		r.ended()
	})
	if err != nil {
		c.m.log.Error("exit of a container is not kept", "id", c.rec.ID, "error", err)
	}
	c.markExited()
	c.endsByItself()
}

// Spec returns the OCI runtime specification of a container.
func (m *Manager) Spec(id string) (json.RawMessage, error) {
	c, err := m.container(id)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(c.dir("config.json"))
	if errors.Is(err, os.ErrNotExist) {
		err = errdefs.ErrNotFound // of before a reboot
	}
	if err != nil {
		return nil, fmt.Errorf("specification of container %s: %w", c.rec.ID, err)
	}
	return data, nil
}
