package step

import (
	"os"
	"strings"
	"sync"
	"syscall"
)

// Environment variables that arm fail points. They are for tests: a process whose environment an attacker sets is lost
// anyway.
const (
	// EnvKill names one fail point; the process kills itself with SIGKILL when it passes it.
	EnvKill = "BERTH_FAIL_AT"
	// EnvList names a file to which every fail point is appended, a line each, when it is passed for the first time.
	EnvList = "BERTH_FAIL_LIST"
)

var points struct {
	once sync.Once
	kill string
	mu   sync.Mutex
	list *os.File
	seen map[string]bool
}

// Point passes the fail point of that name: it returns, unless a test has asked through [EnvKill] that the process die
// here.
func Point(name string) {
	points.once.Do(func() {
		points.kill = os.Getenv(EnvKill)
		if path := os.Getenv(EnvList); path != "" {
			points.list, _ = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_CLOEXEC, 0o600)
			points.seen = map[string]bool{}
		}
	})
	if points.list != nil {
		points.mu.Lock()
		if !points.seen[name] {
			points.seen[name] = true
			_, _ = points.list.WriteString(strings.ReplaceAll(name, "\n", " ") + "\n")
		}
		points.mu.Unlock()
	}
	if points.kill == name {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // the signal is on its way
	}
}
