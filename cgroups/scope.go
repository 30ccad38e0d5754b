package cgroups

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	sd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/fs2"
	"github.com/opencontainers/cgroups/systemd"
)

// systemdWait bounds each request to systemd: one that hangs must not hold a pod for ever.
const systemdWait = 30 * time.Second

// withSystemd connects to systemd itself: the message bus between us and it may be stuck or be restarted.
func withSystemd(f func(ctx context.Context, c *sd.Conn) error) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), systemdWait,
		fmt.Errorf("systemd has not answered within %s: %w", systemdWait, context.DeadlineExceeded))
	defer cancel()
	c, err := sd.NewSystemdConnectionContext(ctx)
	if err != nil {
		var berr error
		if c, berr = sd.NewSystemConnectionContext(ctx); berr != nil {
			return fmt.Errorf("connect to systemd: %w", errors.Join(err, berr, context.Cause(ctx)))
		}
	}
	defer c.Close()
	if err := f(ctx, c); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	return nil
}

// await waits for a job of systemd.
func await(ctx context.Context, job <-chan string) error {
	select {
	case result := <-job:
		if result != "done" {
			return fmt.Errorf("systemd says %q", result)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// startScope has systemd make the scope of a sandbox around a process: systemd makes no empty ones. Where the scope is
// there already, the process joins it.
func startScope(s Scope, pid int) error {
	properties := []sd.Property{
		sd.PropDescription("berth pod sandbox " + s.ID),
		sd.PropSlice(s.Slice),
		property("PIDs", []uint32{uint32(pid)}),
		property("Delegate", true),
		property("DefaultDependencies", false),
		property("MemoryAccounting", true),
		property("CPUAccounting", true),
		property("TasksAccounting", true),
		// No unit is left of one that has failed.
		property("CollectMode", "inactive-or-failed"),
	}
	if Version() == 2 {
		properties = append(properties, property("CPUWeight", cgroups.ConvertCPUSharesToCgroupV2Value(sandboxShares)))
	} else {
		properties = append(properties, property("CPUShares", uint64(sandboxShares)))
	}
	err := withSystemd(func(ctx context.Context, c *sd.Conn) error {
		job := make(chan string, 1)
		_, err := c.StartTransientUnitContext(ctx, s.Unit(), "fail", properties, job)
		if named(err, "org.freedesktop.systemd1.UnitExists") {
			return c.AttachProcessesToUnit(ctx, s.Unit(), "/", []uint32{uint32(pid)})
		}
		if err != nil {
			return err
		}
		return await(ctx, job)
	})
	if err != nil {
		return fmt.Errorf("start unit %s in %s: %w", s.Unit(), s.Slice, err)
	}
	return nil
}

// stopScope has systemd forget a scope whose processes have all ended. Most are gone by then: a scope ends with its last
// process.
func stopScope(s Scope) error {
	err := withSystemd(func(ctx context.Context, c *sd.Conn) error {
		job := make(chan string, 1)
		_, err := c.StopUnitContext(ctx, s.Unit(), "replace", job)
		if err == nil {
			err = await(ctx, job)
		}
		if named(err, "org.freedesktop.systemd1.NoSuchUnit") {
			return nil
		}
		if err == nil {
			_ = c.ResetFailedUnitContext(ctx, s.Unit()) // one that failed stays listed; most are not there any more
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("stop unit %s: %w", s.Unit(), err)
	}
	return nil
}

func property(name string, value any) sd.Property {
	return sd.Property{Name: name, Value: dbus.MakeVariant(value)}
}

func named(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}

// setScope tells systemd the limits of a scope, which it would otherwise set to what it knows with its next reload.
func (l *layout) setScope(p Path, s Scope, r *cgroups.Resources) error {
	cfg := &cgroups.Cgroup{Name: s.ID, ScopePrefix: ScopePrefix, Parent: s.Slice, Systemd: true, Resources: r}
	var (
		m   cgroups.Manager
		err error
	)
	if l.v2 {
		m, err = systemd.NewUnifiedManager(cfg, filepath.Join(fs2.UnifiedMountpoint, string(p)))
	} else {
		m, err = systemd.NewLegacyManager(cfg, l.paths(p))
	}
	if err != nil {
		return err
	}
	// The library waits for systemd without end.
	done := make(chan error, 1)
	go func() { done <- m.Set(r) }()
	select {
	case err := <-done:
		return err
	case <-time.After(systemdWait):
		return fmt.Errorf("limits of unit %s: systemd has not answered within %s: %w", s.Unit(), systemdWait, errdefs.ErrUnavailable)
	}
}
