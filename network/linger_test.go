package network

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// leftBehind starts what a killed daemon leaves: a plugin that holds the lock of the pod.
func leftBehind(t *testing.T, m *Manager, script string) *exec.Cmd {
	t.Helper()
	f, err := os.Create(m.runningFile(podID))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", script)
	cmd.Env = append(os.Environ(), "CNI_CONTAINERID="+podID)
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	noteRunning(f, cmd.Process.Pid)
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	return cmd
}

// A daemon was killed while a plugin ran. DEL does not run beside it, but after it: the bridge plugin that is killed half
// way through its DEL leaves firewall rules for good.
func TestTeardownWaitsForPluginsOfAnEarlierDaemon(t *testing.T) {
	n, m, p, _ := added(t)
	old := leftBehind(t, m, "sleep 0.3; echo old DEL >> "+n.log)
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "old DEL", "y DEL", "x DEL")
	if err := old.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(m.runningFile(podID)); !os.IsNotExist(err) {
		t.Errorf("the file of what runs is left: %v", err)
	}
}

func TestPluginOfAnEarlierDaemonThatHangsIsKilled(t *testing.T) {
	n, m, p, _ := added(t)
	old := leftBehind(t, m, "sleep 1000 & wait")
	m.linger = 100 * time.Millisecond
	start := time.Now()
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")
	if err := old.Wait(); err == nil {
		t.Error("it was not killed")
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
}

func TestWaitingForAnEarlierDaemonEndsWithTheContext(t *testing.T) {
	n, m, p, _ := added(t)
	leftBehind(t, m, "sleep 1000")
	if err := m.Teardown(within(t, 50*time.Millisecond), p); err == nil {
		t.Error("DEL ran beside a plugin")
	}
	n.same(n.calls())
}

// The plugins hold the lock themselves: it must not end with the daemon's descriptor.
func TestPluginsInheritTheLock(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	held := t.TempDir() + "/held"
	n.plugin("x", `readlink /proc/$$/fd/3 > `+held+"\n"+good)
	m := n.open()
	if _, err := m.Setup(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if got, want := read(t, held), m.runningFile(podID); got != want {
		t.Errorf("descriptor 3 is %q, want %q", got, want)
	}
}
