package pods

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/spec"
)

func selinuxFacts() (spec.SELinux, error) {
	if !selinux.GetEnabled() {
		return spec.SELinux{}, nil
	}
	process, file, err := label.InitLabels(nil)
	if err != nil {
		return spec.SELinux{}, fmt.Errorf("SELinux labels of the policy: %w", err)
	}
	selinux.ReleaseLabel(process) // levels are given out by the manager
	return spec.SELinux{Enabled: true, Process: process, File: file}, nil
}

// levels are the SELinux levels that pods and containers have. Pods have them until they are removed.
type levels struct {
	mu   sync.Mutex
	held map[string]string // by the id of who has it
}

// categories is how many there are in every policy with levels.
const categories = 1024

// reserve takes a level of two categories that nobody has.
func (l *levels) reserve(id string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	taken := make(map[string]bool, len(l.held))
	for _, level := range l.held {
		taken[level] = true
	}
	for {
		a, b := rand.IntN(categories), rand.IntN(categories)
		level := fmt.Sprintf("s0:c%d,c%d", min(a, b), max(a, b))
		if a != b && !taken[level] {
			l.hold(id, level)
			return level
		}
	}
}

// keep takes a level that somebody has, whoever else has it. Empty means none.
func (l *levels) keep(id, level string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hold(id, level)
}

func (l *levels) hold(id, level string) {
	if l.held == nil {
		l.held = map[string]string{}
	}
	if level == "" {
		delete(l.held, id)
		return
	}
	l.held[id] = level
}

func (l *levels) free(id string) { l.keep(id, "") }

// labelPod gives a pod its SELinux labels. It has its level until forget.
func (m *Manager) labelPod(id string, cfg *cri.PodSandboxConfig) (spec.Labels, error) {
	if !m.host.SELinux.Enabled {
		return spec.Labels{}, nil
	}
	l, err := spec.PodLabels(cfg, m.host.SELinux, m.levels.reserve(id))
	if err == nil {
		err = inPolicy("config.linux.security_context.selinux_options", l)
	}
	if err != nil {
		m.levels.free(id)
		return spec.Labels{}, err
	}
	m.levels.keep(id, l.Level())
	return l, nil
}

// labelContainer checks the SELinux labels that a container will have. It has its level until forget.
func (m *Manager) labelContainer(id string, cfg *cri.ContainerConfig, pod spec.Labels) error {
	l, err := spec.ContainerLabels(cfg, m.host.SELinux, pod)
	if err == nil {
		err = inPolicy("config.linux.security_context.selinux_options", l)
	}
	if err == nil {
		m.levels.keep(id, l.Level())
	}
	return err
}

// labels are the container's. Its record has none of its own: they follow from its configuration and its pod's.
func (c *container) labels() spec.Labels {
	l, _ := spec.ContainerLabels(c.rec.Config.M, c.m.host.SELinux, c.pod.rec.SELinux) // labelContainer has had no error
	return l
}

// inPolicy asks the kernel whether its policy knows the labels.
func inPolicy(at string, l spec.Labels) error {
	if !selinux.GetEnabled() {
		return nil
	}
	for _, context := range []string{l.Process, l.Mount} {
		if context == "" {
			continue
		}
		if err := selinux.SecurityCheckContext(context); errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("%s: %q is no context of this host's policy: %w", at, context, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// labelFiles gives the pod's own files an SELinux context.
func (p *pod) labelFiles(context string) error {
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		if err := label.SetFileLabel(p.dir(name), context); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return err
		}
	}
	return nil
}

// relabel gives the volumes that are to have it the container's SELinux context. A container of a level of its own has the
// pod's files at the one that all levels may use.
func (b *build) relabel(ctx context.Context) error {
	l := b.labels()
	if l.Mount != b.pod.rec.SELinux.Mount {
		if err := b.pod.labelFiles(l.Shared()); err != nil {
			return err
		}
	}
	for i, m := range b.rec.Config.M.GetMounts() {
		if !spec.Relabels(m) {
			continue
		}
		if err := relabelTree(ctx, b.volumes[i].Path, l.Mount, b.m.opts.RelabelOnce); err != nil {
			return fmt.Errorf("config.mounts[%d].selinux_relabel: %w", i, err)
		}
	}
	return nil
}
