package network

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// readyWithin waits for Ready to hold (reason "") or to give that reason, and says how long it took.
func readyWithin(t *testing.T, m *Manager, d time.Duration, reason string) time.Duration {
	t.Helper()
	start := time.Now()
	for {
		err := m.Ready()
		if err == nil && reason == "" || err != nil && reason != "" && strings.Contains(err.Error(), reason) {
			return time.Since(start)
		}
		if time.Since(start) > d {
			t.Fatalf("after %v Ready is %v, want %q", d, err, reason)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// cri-o#4276, containerd#8419, #8774: a configuration was noticed once or never.
func TestConfigurationIsTakenUpWithoutRestart(t *testing.T) {
	n := newNode(t)
	for _, dir := range []string{n.conf, n.bin} {
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
	}
	const limit = 5 * time.Second
	m := n.open()
	readyWithin(t, m, 0, "no network configuration")
	if _, err := m.Conflist(); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("Conflist: %v", err)
	}
	n.mkdir(n.conf)
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	t.Log("directory and configuration:", readyWithin(t, m, limit, "no plugin x in"))
	n.mkdir(n.bin)
	n.writeMode(n.bin+"/x", "#!/bin/sh\n", 0o600)
	time.Sleep(pollEvery + 200*time.Millisecond)
	readyWithin(t, m, 0, "no plugin x in") // not executable
	if err := os.Chmod(n.bin+"/x", 0o700); err != nil {
		t.Fatal(err)
	}
	t.Log("plugin made executable:", readyWithin(t, m, limit, ""))

	n.write(n.conf+"/10-a.conflist", "{")
	t.Log("configuration spoilt:", readyWithin(t, m, time.Second, "10-a.conflist:1: not a configuration"))
	n.write(n.conf+"/10-a.conflist", list("b", "x"))
	t.Log("configuration mended:", readyWithin(t, m, time.Second, ""))
	if c, err := m.Conflist(); err != nil || string(c) != list("b", "x") {
		t.Errorf("%s, %v", c, err)
	}
	if err := os.RemoveAll(n.conf); err != nil {
		t.Fatal(err)
	}
	t.Log("directory removed:", readyWithin(t, m, limit, "no network configuration"))
	n.mkdir(n.conf)
	time.Sleep(pollEvery + 200*time.Millisecond)
	n.write(n.conf+"/10-a.conflist", list("c", "x"))
	t.Log("directory made anew:", readyWithin(t, m, time.Second, "")) // watched again, not only polled
	if err := os.RemoveAll(n.bin); err != nil {
		t.Fatal(err)
	}
	t.Log("plugins removed:", readyWithin(t, m, limit, "no plugin x in"))
	if err := os.Rename(n.conf, n.conf+".old"); err != nil {
		t.Fatal(err)
	}
	n.mkdir(n.conf)
	n.mkdir(n.bin)
	n.plugin("y", good)
	n.write(n.conf+"/10-a.conflist", list("d", "y"))
	t.Log("directories replaced:", readyWithin(t, m, limit, ""))
}

// A caller who knows better than the watch does not wait for it.
func TestSetupSeesWhatWasJustInstalled(t *testing.T) {
	n := newNode(t)
	m := n.open()
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	if _, err := m.Conflist(); err != nil {
		t.Error(err)
	}
}

func TestMissingPluginsAreNamed(t *testing.T) {
	n := newNode(t)
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x","ipam":{"type":"ipam-x"}},{"type":"y"},{"type":"y"}]}`)
	err := n.open().Ready()
	if err == nil || !strings.Contains(err.Error(), "network a") || !strings.Contains(err.Error(), "no plugin ipam-x, y in "+n.bin) || !strings.Contains(err.Error(), "10-a.conflist") {
		t.Errorf("%v", err)
	}
}

func TestOpenWantsDirectories(t *testing.T) {
	for _, o := range []Options{{}, {ConfDir: "/x"}, {BinDirs: []string{"/x"}}} {
		if _, err := Open(o); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
