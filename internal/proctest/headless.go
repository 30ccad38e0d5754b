// Package proctest has processes for tests that are hard to come by.
package proctest

import (
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// headless is set in the environment of a program that is to end its first thread and go on.
const headless = "BERTH_TEST_HEADLESS"

func init() {
	if os.Getenv(headless) == "" {
		return
	}
	// Package initialisation runs on the first thread.
	runtime.LockOSThread()
	go func() {
		time.Sleep(time.Hour)
		os.Exit(0)
	}()
	_, _, _ = unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
}

// Headless starts a process whose first thread has ended when it returns: it looks like a zombie, and runs. How it ends is
// told once; with the test it is killed.
func Headless(t *testing.T) (pid int, ended <-chan *os.ProcessState) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), headless+"=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	told, gone := make(chan *os.ProcessState, 1), make(chan struct{})
	go func() {
		defer close(gone)
		_ = cmd.Wait()
		told <- cmd.ProcessState
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-gone
	})
	stat := "/proc/" + strconv.Itoa(cmd.Process.Pid) + "/stat"
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(stat)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), ") Z ") {
			return cmd.Process.Pid, told
		}
		if time.Now().After(deadline) {
			t.Fatalf("its first thread does not end: %s", text)
		}
	}
}
