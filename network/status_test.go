package network

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// current11 is a list of version 1.1.
func current11(name string, types ...string) string {
	return strings.Replace(list(name, types...), `"cniVersion":"1.0.0"`, `"cniVersion":"1.1.0"`, 1)
}

// onStatus is a plugin that does something when it is asked for its status.
func onStatus(do string) string { return `[ "$CNI_COMMAND" != STATUS ] || { ` + do + `; }` }

// statuses counts the questions that plugins were asked since the last time, by plugin.
func (n *node) statuses() map[string]int {
	n.t.Helper()
	count := map[string]int{}
	for _, call := range n.calls() {
		if typ, is := strings.CutSuffix(call, " STATUS"); is {
			count[typ]++
		}
	}
	return count
}

func TestStatusOfPluginsIsThatOfTheNetwork(t *testing.T) {
	n := newNode(t)
	n.plugin("x", good)
	n.plugin("y", onStatus(`echo '{"cniVersion":"1.1.0","code":50,"msg":"agent starts"}'; exit 1`))
	n.write(n.conf+"/10-a.conflist", current11("a", "x", "y"))
	m := n.open()
	why := "network a (" + n.conf + `/10-a.conflist): plugin type="y" is not ready: agent starts (code 50)`
	readyWithin(t, m, 5*time.Second, why)
	if _, err := m.Conflist(); err != nil { // the plugin says itself what becomes of an ADD
		t.Error(err)
	}
	n.plugin("y", good)
	t.Log("recovered:", readyWithin(t, m, 5*time.Second, ""))
	n.plugin("x", onStatus(`kill -SEGV $$`))
	m.mu.Lock()
	m.status.at = time.Time{} // as if it were asked long ago
	m.mu.Unlock()
	readyWithin(t, m, 5*time.Second, `plugin type="x" is not ready: signal: segmentation fault`)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	log := n.daemonLog.String()
	for text, times := range map[string]int{"agent starts": 1, "the plugins of the network are ready": 1, "segmentation": 1} {
		if got := strings.Count(log, text); got != times {
			t.Errorf("%q is logged %d times: %s", text, got, log)
		}
	}
}

// A plugin that hangs is asked once at a time, killed at last, and named; whoever asks for the network does not wait.
func TestStatusOfAPluginThatHangs(t *testing.T) {
	n := newNode(t)
	n.plugin("x", onStatus(`sleep 1000 & wait`))
	n.write(n.conf+"/10-a.conflist", current11("a", "x"))
	m := n.open()
	readyWithin(t, m, 0, "network a ("+n.conf+"/10-a.conflist): its plugins have not answered STATUS yet")
	time.Sleep(pollEvery + pollEvery/2) // two rounds of the watch
	if got := n.statuses(); got["x"] != 1 {
		t.Errorf("asked %v", got)
	}
	// Another configuration is not held up by the question about this one.
	n.plugin("z", good)
	n.write(n.conf+"/10-a.conflist", current11("b", "z"))
	readyWithin(t, m, time.Second, "")
	n.write(n.conf+"/10-a.conflist", current11("a", "x"))
	readyWithin(t, m, time.Second, "not answered STATUS yet")
	start := time.Now()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 2*drain {
		t.Errorf("the end took %v", took)
	}

	m = n.open(func(o *Options) { o.statusTime = 100 * time.Millisecond })
	readyWithin(t, m, 5*time.Second, `plugin type="x" is not ready: killed: context deadline exceeded (no answer to STATUS within 100ms)`)
	start = time.Now()
	for range 1000 {
		_ = m.Ready()
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("a thousand questions took %v", took)
	}
	n.plugin("x", good)
	t.Log("recovered:", readyWithin(t, m, 5*time.Second, ""))
}

// A good answer is good for some seconds; each answer costs the start of a program.
func TestStatusIsNotAskedAllTheTime(t *testing.T) {
	n := newNode(t)
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", current11("a", "x"))
	m := n.open()
	readyWithin(t, m, 5*time.Second, "")
	for range 3 {
		m.refresh()
		m.askStatus()
	}
	time.Sleep(pollEvery + pollEvery/2)
	if got := n.statuses(); got["x"] != 1 {
		t.Errorf("asked %v", got)
	}
}

// Plugins of earlier versions do not know the command.
func TestStatusIsOfVersion11(t *testing.T) {
	for version, want := range map[string]int{"0.4.0": 0, "1.0.0": 0, "1.1.0": 1} {
		n := newNode(t)
		n.plugin("x", onStatus("exit 1"))
		n.write(n.conf+"/10-a.conflist", strings.Replace(list("a", "x"), "1.0.0", version, 1))
		m := n.open()
		readyWithin(t, m, 5*time.Second, map[int]string{1: `plugin type="x" is not ready: exit status 1`}[want])
		if got := n.statuses(); got["x"] != want {
			t.Errorf("%s: asked %v", version, got)
		}
		if err := os.Remove(n.conf + "/10-a.conflist"); err != nil {
			t.Fatal(err)
		}
		readyWithin(t, m, 5*time.Second, "no network configuration")
	}
}

// What varies in the reason does not fill the log.
func TestStatusWithADifferentReasonEachTimeIsLoggedOnce(t *testing.T) {
	n := newNode(t)
	n.plugin("x", onStatus(`date +%N >&2; exit 1`))
	n.write(n.conf+"/10-a.conflist", current11("a", "x"))
	m := n.open()
	for i := range 5 {
		eventually(t, fmt.Sprint("answer ", i), func() bool { return n.statuses()["x"] > 0 })
		eventually(t, "it is taken over", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.status.asking == nil })
		m.mu.Lock()
		m.status.at = time.Time{}
		m.mu.Unlock()
		m.askStatus()
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(n.daemonLog.String(), "network is not ready"); got != 1 {
		t.Errorf("logged %d times: %s", got, n.daemonLog.String())
	}
}

// A question that was given up says nothing, also where the network is the one again that it was about.
func TestStatusThatWasGivenUpSaysNothing(t *testing.T) {
	n := newNode(t)
	n.plugin("x", onStatus(`sleep 1000 & wait`))
	n.write(n.conf+"/10-a.conflist", current11("a", "x"))
	m := n.open()
	eventually(t, "it is asked", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.status.asking != nil })
	m.mu.Lock()
	c := m.conflist
	m.status.renew(nil)
	m.status.renew(c)
	m.mu.Unlock()
	for range 20 {
		if err := m.Ready(); err == nil || !strings.Contains(err.Error(), "not answered STATUS yet") {
			t.Fatalf("ready: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
