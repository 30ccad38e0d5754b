package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/internal/step"
)

// build is what the steps of a creation hand on to each other.
type build struct {
	*container
	image *images.Image
	out   *spec.Output

	volumes []spec.Source // of the request's mounts

	target uint64 // the PID namespace of the container that mode TARGET names, else 0
}

// dir is a path below the container's directory in the run root, its bundle.
func (c *container) dir(parts ...string) string {
	return c.m.runDir(append([]string{"containers", c.rec.ID}, parts...)...)
}

// steps returns the named steps of a container, in the order of the names. b is nil to undo them.
func (c *container) steps(b *build, names ...string) []step.Step {
	if b == nil {
		b = &build{container: c}
	}
	all := map[string]step.Step{
		"dirs":          {Timeout: 10 * time.Second, Do: c.makeDirs, Undo: c.removeDirs},
		"rootfs":        {Timeout: 30 * time.Second, Do: b.prepare, Undo: c.release},
		"mount":         {Timeout: 30 * time.Second, Do: c.mount, Undo: c.unmount},
		"image-volumes": {Timeout: 30 * time.Second, Do: b.mountVolumes, Undo: c.unmountVolumes},
		"spec":          {Timeout: 30 * time.Second, Do: b.writeSpec}, // it stats the host paths of volumes, which may hang
		"relabel":       {Timeout: relabelWithin, Do: b.relabel},
		"create":        {Timeout: 100 * time.Second, Do: b.create, Undo: c.destroy},
	}
	list := make([]step.Step, 0, len(names))
	for _, n := range names {
		s, ok := all[n]
		if !ok {
			s = step.Step{Undo: func(context.Context) error { return nil }}
			c.m.log.Warn("record names a step that this berth does not know", "id", c.rec.ID, "step", n)
		}
		s.Name = n
		list = append(list, s)
	}
	return list
}

func (c *container) makeDirs(context.Context) error {
	if err := os.MkdirAll(c.dir("rootfs"), 0o700); err != nil {
		return err
	}
	return c.openToInit()
}

func (c *container) removeDirs(context.Context) error { return os.RemoveAll(c.dir()) }

func (b *build) prepare(context.Context) error {
	return b.m.opts.Images.Prepare(b.rec.ID, b.image.ID, b.pod.imageUserns())
}

func (c *container) release(context.Context) error { return c.m.opts.Images.Release(c.rec.ID) }

func (c *container) mount(ctx context.Context) error {
	return c.m.opts.Images.Mount(ctx, c.rec.ID, c.dir("rootfs"), images.Context(c.labels().Mount))
}

func (c *container) unmount(context.Context) error { return c.m.opts.Images.Unmount(c.dir("rootfs")) }

// volumePath is where the image volume that is the container's i-th mount is mounted.
func (c *container) volumePath(i int) string { return c.dir("volumes", fmt.Sprint(i)) }

func (b *build) mountVolumes(ctx context.Context) error {
	for i, m := range b.rec.Config.M.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}
		image, err := b.m.opts.Images.Image(m.GetImage().GetImage())
		if err != nil {
			return fmt.Errorf("ImageVolumeMountFailed: config.mounts[%d].image: %w", i, err)
		}
		if err := os.MkdirAll(b.volumePath(i), 0o700); err != nil {
			return err
		}
		if err := b.m.opts.Images.MountView(ctx, image.ID, b.volumePath(i), b.pod.imageUserns(), images.Context(b.labels().Mount)); err != nil {
			return fmt.Errorf("ImageVolumeMountFailed: config.mounts[%d].image: %w", i, err)
		}
	}
	return nil
}

func (c *container) unmountVolumes(context.Context) error {
	var errs []error
	for i, m := range c.rec.Config.M.GetMounts() {
		if m.GetImage().GetImage() != "" {
			errs = append(errs, c.m.opts.Images.Unmount(c.volumePath(i)))
		}
	}
	return errors.Join(errs...)
}

// writeSpec collects the facts, has the specification computed, and writes it into the bundle.
func (b *build) writeSpec(context.Context) error {
	in, err := b.input()
	if err != nil {
		return err
	}
	out, err := spec.Container(in)
	if err != nil {
		return err
	}
	if err := b.editByCDI(out); err != nil {
		return err
	}
	b.out = out
	data, err := json.Marshal(out.Spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(b.dir("config.json"), data, 0o600); err != nil {
		return err
	}
	b.process.Store(out.Spec.Process)
	return b.update(func(r *containerRecord) {
		r.User = message[*cri.ContainerUser]{M: out.User}
		r.StopSignal, r.StopName = int(out.StopSignal), out.StopSignalName
	})
}

// editByCDI adds the container's CDI devices to its specification. Groups that they bring are the user's, too.
func (b *build) editByCDI(out *spec.Output) error {
	var names []string
	for _, d := range b.rec.Config.M.GetCDIDevices() {
		names = append(names, d.GetName())
	}
	edits, err := b.m.opts.CDI.Resolve(names)
	if err == nil {
		err = edits.Apply(out.Spec)
	}
	if err != nil {
		return fmt.Errorf("config.CDI_devices: %w", err)
	}
	out.AddGroups(edits.Groups())
	return nil
}

// create opens the log and has the shim create the container, up to where its init waits to be started.
func (b *build) create(ctx context.Context) error {
	var log *os.File
	if b.rec.LogPath != "" {
		var err error
		if log, err = openLog(b.pod.config().GetLogDirectory(), b.rec.Config.M.GetLogPath()); err != nil {
			return fmt.Errorf("config.log_path: %w", err)
		}
		defer log.Close()
	}
	cfg := b.rec.Config.M
	dirs, err := cgroupDirs(cgroups.Path(b.rec.Cgroup))
	if err != nil {
		return err
	}
	scope, ok := cgroups.Path(b.rec.Cgroup).Scope()
	prefix := ""
	if ok {
		prefix = cgroups.ScopePrefix
	}
	req := shim.CreateRequest{
		Slice: scope.Slice, ScopePrefix: prefix, SeccompRecords: b.m.seccompRecords(),
		ID: b.rec.ID, Bundle: b.dir(), StateRoot: b.m.stateRoot(), CgroupDir: dirs.kill, MemoryDir: dirs.memory,
		Terminal: cfg.GetTty(), Stdin: cfg.GetStdin(), StdinOnce: cfg.GetStdinOnce(),
	}
	var trees []*os.File
	if b.pod.record().Lean {
		if trees, err = b.trees(&req); err != nil {
			return err
		}
		defer closeAll(trees)
	}
	pid, err := b.pod.shim().Create(ctx, req, log, trees...)
	if err != nil {
		return spec.OfWorkingDir(ofShim(err), cfg, b.process.Load().Cwd)
	}
	if err := cgroups.Verify(cgroups.Path(b.rec.Cgroup), pid); err != nil { // CVE-2025-47291
		return err
	}
	if b.target != 0 {
		if is, err := pidNamespace(pid); err != nil || is != b.target {
			return failedPrecondition("config.linux.security_context.namespace_options.target_id: the container has ended (%v)", err)
		}
	}
	return b.update(func(r *containerRecord) { r.PID = pid })
}

// destroy kills what is left of the container and removes what libcontainer and its shim keep of it.
func (c *container) destroy(ctx context.Context) error {
	cg := cgroups.Path(c.rec.Cgroup)
	sctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_ = c.pod.shim().KillAll(sctx, c.rec.ID) // init may have been moved out of its cgroup; no shim, no init
	if err := cgroups.Kill(cg); err != nil {
		return err
	}
	for { // its exit has to be on its way before the shim may forget it
		err := c.pod.shim().Delete(sctx, c.rec.ID)
		var answer *shim.Error
		if err == nil || !errors.As(err, &answer) || answer.Code != shim.CodeState || sctx.Err() != nil {
			break
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-sctx.Done():
		}
	}
	if err := cgroups.Remove(cg); err != nil {
		return err
	}
	c.poststop(ctx)
	return os.RemoveAll(filepath.Join(c.m.stateRoot(), c.rec.ID))
}

// execProcess is the process of the container's specification, from memory or from the bundle.
func (c *container) execProcess() (*specs.Process, error) {
	if p := c.process.Load(); p != nil {
		return p, nil
	}
	data, err := os.ReadFile(c.dir("config.json"))
	if err != nil {
		return nil, err
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("specification of container %s: %w", c.rec.ID, err)
	}
	c.process.Store(s.Process)
	return s.Process, nil
}
