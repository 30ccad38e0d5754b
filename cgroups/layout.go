package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/cgroups"
	cgroupsv1 "github.com/opencontainers/cgroups/fs"
	"github.com/opencontainers/cgroups/fs2"
	"golang.org/x/sys/unix"
)

// layout says where the hierarchies of this machine are mounted. The key "" is the unified hierarchy: the only one on
// v2, the one without controllers on a hybrid machine.
type layout struct {
	v2     bool
	mounts map[string]string
	roots  []string // the distinct mount points: cpu and cpuacct often share one
}

// host looks at the mounts once: they do not change while a node runs.
var host = sync.OnceValues(func() (*layout, error) {
	if cgroups.IsCgroup2UnifiedMode() {
		return &layout{v2: true, mounts: map[string]string{"": fs2.UnifiedMountpoint}, roots: []string{fs2.UnifiedMountpoint}}, nil
	}
	// Ask the library that libcontainer uses too, so that both always mean the same directories.
	const probe = "/berth-probe"
	m, err := cgroupsv1.NewManager(&cgroups.Cgroup{Path: probe, Resources: &cgroups.Resources{SkipDevices: true}}, nil)
	if err != nil {
		return nil, fmt.Errorf("find the mounts of cgroup v1: %w", err)
	}
	l := &layout{mounts: map[string]string{}}
	for controller, dir := range m.GetPaths() {
		root := strings.TrimSuffix(dir, probe)
		l.mounts[controller] = root
		if !slices.Contains(l.roots, root) {
			l.roots = append(l.roots, root)
		}
	}
	slices.Sort(l.roots)
	return l, nil
})

// Version is 2 where the unified hierarchy has the controllers, else 1.
func Version() int {
	if cgroups.IsCgroup2UnifiedMode() {
		return 2
	}
	return 1
}

func (l *layout) mount(controller string) (string, bool) {
	if l.v2 {
		controller = ""
	}
	dir, ok := l.mounts[controller]
	return dir, ok
}

// dir is the directory of p for that controller, "" where the controller is not mounted.
func (l *layout) dir(p Path, controller string) string {
	root, ok := l.mount(controller)
	if !ok {
		return ""
	}
	return filepath.Join(root, string(p))
}

// dirs are the directories of p in all hierarchies.
func (l *layout) dirs(p Path) []string {
	dirs := make([]string, len(l.roots))
	for i, root := range l.roots {
		dirs[i] = filepath.Join(root, string(p))
	}
	return dirs
}

// manager is the library's view of p, with paths that were found once.
func (l *layout) manager(p Path, r *cgroups.Resources) (cgroups.Manager, error) {
	cfg := &cgroups.Cgroup{Path: string(p), Resources: r}
	if l.v2 {
		return fs2.NewManager(cfg, l.dir(p, ""))
	}
	return cgroupsv1.NewManager(cfg, l.paths(p))
}

// paths are the directories of p by controller.
func (l *layout) paths(p Path) map[string]string {
	paths := make(map[string]string, len(l.mounts))
	for controller := range l.mounts {
		paths[controller] = l.dir(p, controller)
	}
	return paths
}

// at checks p and finds the hierarchies.
func at(p Path) (*layout, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	return host()
}

// gone says whether err means that the cgroup, or the file of a controller in it, does not exist (any more): reads of
// an open file of a removed cgroup fail with ENODEV.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}
