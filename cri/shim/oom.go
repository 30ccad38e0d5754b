package shim

import (
	"errors"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cgroups/oom"
)

// podKills is what the shim knows of the kills for memory in the cgroup above its containers', on v2, where that has the
// kills of all that is below it.
type podKills struct {
	before uint64 // when the first container was made
	gone   uint64 // of containers that the shim has forgotten
	known  bool
}

// begin notes how many kills there were before the pod's first container. The caller holds the server's lock.
func (k *podKills) begin(memoryDir string) {
	if k.known {
		return
	}
	if n, err := oom.Kills(filepath.Dir(memoryDir)); err == nil {
		k.before, k.known = n, true
	}
}

// oomKills counts the processes of a container, whose init has just ended, that the kernel has killed for memory: it
// counts before it kills. No memory controller, no count.
//
// systemd may have removed the cgroup of a scope by now, and the count with it. The pod's slice still has it: if there is
// a kill that is of none of the pod's other containers, it is what ended this one, had it been killed.
func (s *Server) oomKills(c *container, status unix.WaitStatus) uint64 {
	n, err := oom.Kills(c.req.MemoryDir)
	if !errors.Is(err, fs.ErrNotExist) || c.req.Slice == "" || !status.Signaled() || status.Signal() != unix.SIGKILL {
		return n
	}
	all, err := oom.Kills(filepath.Dir(c.req.MemoryDir))
	if err != nil {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	others := s.kills.before + s.kills.gone
	if !s.kills.known {
		return 0
	}
	for _, o := range s.containers {
		if o == c {
			continue
		}
		if told := o.snapshot(); told.Status == Exited {
			others += told.OOMKills
		} else if n, err := oom.Kills(o.req.MemoryDir); err == nil {
			others += n
		}
	}
	return min(1, all-min(all, others))
}
