package cgroups

import (
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/cgroups"
)

// expecting is held while the kernel makes itself ready.
var expecting sync.Mutex

// ExpectMove tells the kernel that a process is about to be moved into a cgroup of v1, which libcontainer does for each
// container, and returns when it is ready: the first one who moves a process waits for 7 to 15 ms until all processors know that
// forks may have to be held still (rcu_sync), and who comes within some ten milliseconds after another does not wait. So a caller
// who has other things to do first has that done beside. Where it cannot be had, and on v2, where processes are made in their cgroups,
// nothing happens.
func ExpectMove() {
	l, err := host()
	if err != nil || l.v2 || !expecting.TryLock() { // who holds it has this one's done, too
		return
	}
	defer expecting.Unlock()
	own, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	if err != nil {
		return
	}
	const controller = "freezer" // nothing is counted there
	root, ok := l.mount(controller)
	if !ok {
		return
	}
	f, err := os.OpenFile(filepath.Join(root, own[controller], "cgroup.procs"), os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer f.Close()           //nolint:errcheck // the write is what counts
	_, _ = f.WriteString("0") // moves this process to where it is
}
