// Command berth-shim is what stands behind the pods of berth: the daemon starts it from a sealed memfd, nobody else.
//
//	berth-shim shim DIR [lean] [shared-pid [USERNS NOBODY]]
//	                                   a pod's shim: the sandbox, see package cri/shim
//	berth-shim create                  creates one container for a shim, and ends
//	berth-shim seccomp                 compiles one seccomp profile for a creation, and ends: see seccomp.go
//	berth-shim exec                    runs processes in containers for the daemon, one per node
//	berth-shim pause                   PID 1 of a shared PID namespace
//	berth-holder                       holds new namespaces of a pod until they are pinned
//	berth-shim init                    libcontainer's init, inside a container
//	berth-shim version
package main

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"

	_ "github.com/opencontainers/cgroups/devices" // lets libcontainer set device rules
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // must run before Go's runtime starts threads
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/internal/version"
)

// idleMemory is the heap, in bytes, that a shim may have before its garbage collector runs. Collecting costs a small
// process 300 KiB of work buffers for good, and a shim that does little never gets there.
const idleMemory = 6 << 20

func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		// Here and not in main: libcontainer wants its init to be the first thing that Go runs.
		libcontainer.Init()
	}
}

func main() {
	mode := ""
	if len(os.Args) > 1 {
		mode = os.Args[1]
	}
	var err error
	switch mode {
	case "shim":
		err = runShim(os.Args[2:])
	case "create":
		name("berth-create")
		lookAhead()
		err = shim.ServeHelper(3, create)
	case "seccomp":
		name("berth-seccomp")
		err = record(os.Stdin)
	case "exec":
		name("berth-exec")
		defaultSignals()
		runtime.GOMAXPROCS(runtime.NumCPU()) // it serves the whole node; the inits that it starts keep to one
		err = shim.ServeExec(3, execute)
	case "pause":
		err = errPause // pause.go takes over before Go starts
	case "version":
		fmt.Println("berth-shim", version.Version, version.Commit)
	default:
		err = fmt.Errorf("berth-shim is started by berth serve, not by hand: unknown mode %q", mode)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "berth-shim:", mode+":", err)
		os.Exit(1)
	}
}

func runShim(args []string) error {
	if len(args) < 1 {
		return fmt.Errorf("shim needs the directory of its pod")
	}
	name("berth-shim")
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(idleMemory)
	// The node's shutdown and a terminal's hang-up are not for us: only the daemon ends a sandbox.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	ready, start := os.NewFile(3, "ready"), os.NewFile(4, "go")
	// The daemon puts this process into its cgroup first, so that all that it starts is there, too.
	if _, err := start.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("the daemon has gone: %w", err)
	}
	_ = start.Close()
	reserveThreads() // in its cgroup already: there is room now
	rest := args[1:]
	lean := len(rest) > 0 && rest[0] == "lean"
	if lean {
		rest = rest[1:]
	}
	pause, err := pauseOf(rest)
	if err != nil {
		return err
	}
	userns := -1
	if pause != nil && pause.Userns != "" {
		userns = 5
		unix.CloseOnExec(userns)
	}
	return shim.Serve(args[0], pause, lean, func() {
		if userns >= 0 {
			_ = unix.Close(userns) // PID 1 is in it
		}
		_, _ = ready.Write([]byte{1})
		_ = ready.Close()
	})
}

// pauseOf reads what follows the directory.
func pauseOf(args []string) (*shim.Pause, error) {
	p, rest := &shim.Pause{}, args
	if n := len(rest); n > 3 && rest[n-3] == "selinux" {
		p.Label, p.Context, rest = rest[n-2], rest[n-1], rest[:n-3]
	}
	switch {
	case len(rest) == 0:
		return nil, nil
	case rest[0] != "shared-pid" || len(rest) != 1 && len(rest) != 3:
		return nil, fmt.Errorf("arguments %q", args)
	case len(rest) == 1:
		return p, nil
	}
	nobody, err := strconv.ParseUint(rest[2], 10, 32)
	p.Userns, p.Nobody = rest[1], uint32(nobody)
	return p, err
}

// defaultSignals has what this process starts find no signal ignored, whatever started this one: a shell whose SIGINT is
// ignored when it begins cannot trap it (POSIX, sh), and then does not end on STOPSIGNAL SIGINT. The shim ignores
// signals, nohup does, and Go leaves SIGHUP and SIGINT as it finds them; a signal that is caught is the default again in
// the next program.
func defaultSignals() {
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT)
}

// name sets what ps shows, which would be a descriptor's number for a program that is started from a memfd.
func name(s string) {
	b := append([]byte(s), 0)
	_ = os.WriteFile("/proc/self/comm", b[:len(b)-1], 0)
}
