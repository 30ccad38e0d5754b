package network

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

// owing is a node with a pod whose DEL fails, and is owed. Its own namespace is unpinned.
func owing(t *testing.T) (n *node, open func() *Manager, p Pod) {
	t.Helper()
	n, m, p, res := added(t)
	p.Conflist = res.Conflist
	spaces := func(o *Options) { o.NamespaceDir = n.cache + ".netns" }
	if err := m.Close(); err != nil { // this one has no place for namespaces
		t.Fatal(err)
	}
	open = func() *Manager { return n.open(spaces) }
	t.Cleanup(func() {
		if err := Unpin(n.cache + ".netns/" + p.ID); err != nil {
			t.Error(err)
		}
	})
	n.plugin("y", `echo '{"code":5,"msg":"disk"}'; exit 1`)
	m = open()
	m.owedFirst = time.Millisecond
	if err := m.Owe(p, errors.New("disk")); err != nil {
		t.Fatal(err)
	}
	if err := Unpin(p.NetNS); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is tried again", func() bool { all := m.Owed(); return len(all) == 1 && all[0].Tries > 1 })
	if o := m.Owed()[0]; !strings.Contains(o.Error, `plugin type="y" failed (delete): disk`) || o.Pod != p.String() {
		t.Errorf("%+v", o)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return n, open, p
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for start := time.Now(); !is(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("not within ten seconds: %s", what)
		}
	}
}

func (n *node) settled(m *Manager) {
	n.t.Helper()
	eventually(n.t, "nothing is owed", func() bool { return len(m.Owed()) == 0 })
	for _, dir := range []string{n.cache + "/owed", n.cache + ".netns", n.cache + "/results"} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			n.t.Errorf("%s: %v, %v", dir, left, err)
		}
	}
	if !strings.Contains(n.daemonLog.String(), "the network of a pod that is gone is released") {
		n.t.Error("the log says nothing of it")
	}
}

func TestOwedTeardownIsDoneByALaterDaemon(t *testing.T) {
	n, open, p := owing(t)
	n.plugin("y", good)
	n.lines()
	n.settled(open())
	lines := n.lines()
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "y DEL netns="+n.cache+".netns/"+p.ID+" id="+p.ID) || !strings.HasPrefix(lines[1], "x DEL ") {
		t.Errorf("%q", lines)
	}
}

func TestOwedTeardownOutlivesConfigurationAndReboot(t *testing.T) {
	n, open, _ := owing(t)
	for _, err := range []error{Unpin(n.cache + ".netns/" + podID), os.RemoveAll(n.conf), os.Remove(n.bin + "/y")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	m := open()
	eventually(t, "it is tried", func() bool { return m.Owed()[0].Tries > 0 })
	if o := m.Owed()[0]; !strings.Contains(o.Error, `no plugin "y"`) {
		t.Errorf("%+v", o)
	}
	n.lines()
	n.plugin("y", good)
	n.settled(open())
	if lines := n.lines(); len(lines) != 2 || !strings.HasPrefix(lines[0], "y DEL netns= ") {
		t.Errorf("%q", lines)
	}
}

// A power cut leaves a file of no bytes; its name has the id, and so has the cached result.
func TestTornNoteOfWhatIsOwed(t *testing.T) {
	n, open, p := owing(t)
	if err := os.Truncate(n.cache+"/owed/"+p.ID+".json", 0); err != nil {
		t.Fatal(err)
	}
	n.plugin("y", good)
	n.lines()
	n.settled(open())
	n.same(n.calls(), "y DEL", "x DEL")
}

func TestGCLeavesAloneWhatIsOwed(t *testing.T) {
	n, open, _ := owing(t)
	m := open()
	eventually(t, "it is tried", func() bool { return m.Owed()[0].Tries > 0 })
	n.lines()
	if err := m.GC(t.Context(), nil); err != nil {
		t.Error(err)
	}
	n.same(n.calls())
}

// A daemon was killed when it had pinned the namespace, and nothing more: the pod still has its own.
func TestNamespaceThatNothingIsOwedForIsReleased(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	m := n.open(func(o *Options) { o.NamespaceDir = n.cache + ".netns" })
	if err := m.keepNamespace(&p); err != nil || !Pinned(n.cache+".netns/"+podID) {
		t.Fatal(err)
	}
	n.open(func(o *Options) { o.NamespaceDir = n.cache + ".netns" })
	if _, err := os.Lstat(n.cache + ".netns/" + podID); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}
