package pods

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
)

// An exec belongs to the client that waits for it, and an exec server whose daemon has gone kills what it runs. One that
// is killed itself cannot. What it ran is found by its cgroups and killed: nobody else knows of it.

var execCgroup = regexp.MustCompile(`^exec-[0-9]+-[0-9]+$`)

// endExecs kills what an exec server, which has ended, has left.
func (m *Manager) endExecs(server int) {
	select {
	case <-m.closing: // it was told to end, and does so by itself
		return
	default:
	}
	m.mu.RLock()
	all := slices.Collect(maps.Values(m.containers))
	m.mu.RUnlock()
	for _, dir := range leftExecs(all, shim.ExecCgroups(server)) {
		m.endExec(dir)
	}
}

// leftExecs lists the cgroups of execs whose names begin so.
func leftExecs(containers []*container, prefix string) (dirs []string) {
	for _, c := range containers {
		if c.view.Load().PID == 0 {
			continue // it has ended, and all that ran in it
		}
		d, err := cgroupDirs(cgroups.Path(c.rec.Cgroup))
		if err != nil {
			continue
		}
		entries, err := os.ReadDir(d.kill)
		if err != nil {
			continue // it ends just now
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), prefix) && execCgroup.MatchString(e.Name()) {
				dirs = append(dirs, filepath.Join(d.kill, e.Name()))
			}
		}
	}
	return dirs
}

// endExec kills what is in the cgroup of an exec, and removes it.
func (m *Manager) endExec(dir string) {
	m.log.Warn("an exec that its exec server has left is killed", "cgroup", dir)
	var err error
	for range 100 { // the kernel lets go of the last process a moment later
		if err = shim.KillCgroup(dir); err != nil {
			break
		}
		if err = shim.RemoveCgroup(dir); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.log.Warn("the cgroup of an exec stays until its container goes", "cgroup", dir, "error", err)
}
