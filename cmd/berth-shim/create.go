package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-run/berth/cri/shim"
)

// lookAhead does, while the helper is parked, what a creation would wait for: where not all controllers of cgroup v1 are
// mounted, libcontainer looks for them among all mounts of the node, which are some for each pod, and remembers what it finds.
func lookAhead() {
	if !cgroups.IsCgroup2UnifiedMode() {
		_, _ = cgroups.GetCgroupMounts(false) // an error is told by the creation
	}
}

// create makes the container whose specification is in the request's bundle and returns the pid of its init, which waits
// on its fifo. On an error nothing is left of it.
func create(req shim.CreateRequest, files []*os.File) (pid int, err error) {
	spec, err := loadSpec(filepath.Join(req.Bundle, "config.json"))
	if err != nil {
		return 0, err
	}
	streams := len(files) - len(req.Trees) - len(req.Sources)
	if streams < 0 {
		return 0, fmt.Errorf("%d descriptors for %d mounts", len(files), len(req.Trees)+len(req.Sources))
	}
	asNamed, err := attach(req, spec, files[streams:])
	if err != nil {
		return 0, err
	}
	defer func() { err = asNamed(err) }()
	files = files[:streams]
	// specconv takes the bundle to be the working directory.
	if err := os.Chdir(req.Bundle); err != nil {
		return 0, err
	}
	opts := &specconv.CreateOpts{CgroupName: req.ID, Spec: spec}
	if req.Slice != "" {
		opts.UseSystemdCgroup = true
		spec.Linux.CgroupsPath = req.Slice + ":" + req.ScopePrefix + ":" + req.ID
	}
	config, err := specconv.CreateLibcontainerConfig(opts)
	if err != nil {
		return 0, fmt.Errorf("specification: %w", err)
	}
	if req.Slice != "" {
		// No unit is left of a container that was killed for memory.
		config.Cgroups.SystemdProps = append(config.Cgroups.SystemdProps,
			systemd.Property{Name: "CollectMode", Value: dbus.MakeVariant("inactive-or-failed")})
	}
	if !req.Terminal && hasDevVolume(spec) {
		if err := replaceHostNull(files, emptyInput); err != nil {
			return 0, err
		}
	}
	process, err := newProcess(spec.Process, files, req.Terminal)
	if err != nil {
		return 0, err
	}
	process.Init, process.LogLevel = true, logLevel
	defaultSignals()
	c, err := libcontainer.Create(req.StateRoot, req.ID, config)
	if err != nil {
		return 0, err
	}
	if config.Seccomp != nil && req.SeccompRecords != "" {
		process.LogLevel += "\n" + recordLine(req.StateRoot, req.ID)
		if err := linkRecord(req.SeccompRecords, filepath.Join(req.StateRoot, req.ID), config.Seccomp); err != nil {
			fmt.Fprintln(os.Stderr, "execs in", req.ID, "will be slow:", err)
		}
	}
	if err := c.Start(process); err != nil {
		return 0, errors.Join(plain(err), c.Destroy())
	}
	if err := writeExecState(req.StateRoot, req.ID); err != nil {
		fmt.Fprintln(os.Stderr, "execs in", req.ID, "will be slow:", err)
	}
	return process.Pid()
}

func loadSpec(path string) (*specs.Spec, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	spec := new(specs.Spec)
	if err := json.Unmarshal(data, spec); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if spec.Process == nil || spec.Linux == nil {
		return nil, fmt.Errorf("%s: no process or no Linux part", path)
	}
	return spec, nil
}

// newProcess is the libcontainer form of an OCI process with its streams: stdin, stdout and stderr, or the socket that
// takes its terminal's master.
func newProcess(p *specs.Process, files []*os.File, terminal bool) (*libcontainer.Process, error) {
	lp := &libcontainer.Process{
		Args:            p.Args,
		Env:             p.Env,
		UID:             int(p.User.UID),
		GID:             int(p.User.GID),
		Cwd:             p.Cwd,
		Label:           p.SelinuxLabel,
		NoNewPrivileges: &p.NoNewPrivileges,
		AppArmorProfile: p.ApparmorProfile,
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	lp.Scheduler, lp.IOPriority = p.Scheduler, p.IOPriority
	for _, r := range p.Rlimits {
		resource, ok := rlimits[r.Type]
		if !ok {
			return nil, fmt.Errorf("rlimit %q is not known", r.Type)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: resource, Soft: r.Soft, Hard: r.Hard})
	}
	if terminal {
		if len(files) != 1 {
			return nil, fmt.Errorf("%d descriptors for a terminal", len(files))
		}
		lp.ConsoleSocket = files[0]
		if s := p.ConsoleSize; s != nil {
			lp.ConsoleWidth, lp.ConsoleHeight = uint16(s.Width), uint16(s.Height)
		}
		return lp, nil
	}
	if len(files) != 3 {
		return nil, fmt.Errorf("%d descriptors for stdin, stdout and stderr", len(files))
	}
	lp.Stdin, lp.Stdout, lp.Stderr = files[0], files[1], files[2]
	return lp, nil
}

// plain takes off the prefixes that tell where in libcontainer an error arose: users read what is left as an event.
func plain(err error) error {
	s := err.Error()
	for _, p := range []string{"unable to start container process: ", "error during container init: "} {
		s = strings.TrimPrefix(s, p)
	}
	return errors.New(s)
}
