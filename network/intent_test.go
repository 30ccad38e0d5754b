package network

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// intents are the names of what is noted, with the suffix of what is done.
func (n *node) intents() (names []string) {
	n.t.Helper()
	entries, err := os.ReadDir(n.cache + "/intents")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// forgotten is a node on which a pod was added; what the runtime and libcni know of it is lost.
func forgotten(t *testing.T) (*node, *Manager, Pod) {
	t.Helper()
	n, m, p, _ := added(t)
	n.same(n.intents(), podID)
	for _, file := range n.caches() {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	return n, m, p
}

// containerd#8197, #12923, harvester#7471: the daemon dies after ADD, or the power goes, before anything of the result is
// kept, and DEL never runs.
func TestContainerd12923_DelRunsForAnAddWithoutResult(t *testing.T) {
	n, m, p := forgotten(t)
	// The node has got another network since.
	n.plugin("z", good)
	n.write(n.conf+"/10-a.conflist", list("other", "z"))
	if err := m.GC(t.Context(), []string{podID}); err != nil { // it lives
		t.Fatal(err)
	}
	n.same(n.calls())
	if err := m.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	lines := n.lines()
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "y DEL netns="+p.NetNS+" id="+podID) || !strings.HasPrefix(lines[1], "x DEL ") ||
		!strings.Contains(lines[0], "K8S_POD_NAME=web-0") {
		t.Errorf("%q", lines)
	}
	n.same(n.intents(), podID+doneSuffix)
	if err := m.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls())
}

// A record that is damaged says no more than the id.
func TestTeardownByIDKnowsWhatWasIntended(t *testing.T) {
	n, m, p := forgotten(t)
	if err := os.RemoveAll(n.conf); err != nil {
		t.Fatal(err)
	}
	if err := m.Teardown(t.Context(), Pod{ID: podID}); err != nil {
		t.Fatal(err)
	}
	if lines := n.lines(); len(lines) != 2 || !strings.HasPrefix(lines[0], "y DEL netns="+p.NetNS+" id="+podID) {
		t.Errorf("%q", lines)
	}
}

// A power cut while it is written leaves some of it. The name has the id, and the node may have the network still.
func TestTornIntent(t *testing.T) {
	for _, size := range []int64{0, 1, 100} {
		n, m, _ := forgotten(t)
		if err := os.Truncate(m.intentFile(podID), size); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(n.conf, n.conf+"~"); err != nil {
			t.Fatal(err)
		}
		readyWithin(t, m, 5*time.Second, "no network")
		if err := m.GC(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		n.same(n.calls())
		n.same(n.intents(), podID) // until the node has one
		if err := os.Rename(n.conf+"~", n.conf); err != nil {
			t.Fatal(err)
		}
		if err := m.GC(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		n.same(n.calls(), "y DEL", "x DEL")
		n.same(n.intents(), podID+doneSuffix)
		again := func() {
			t.Helper()
			if err := n.open().GC(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			n.same(n.intents(), podID+doneSuffix)
		}
		again() // what was done under this kernel holds
		n.same(n.calls())
		long := time.Unix(0, 0)
		if err := os.Chtimes(m.intentFile(podID)+doneSuffix, long, long); err != nil {
			t.Fatal(err)
		}
		again()
		n.same(n.calls(), "y DEL", "x DEL")
	}
}

// What cannot be released at the start is tried again, and shown, as any other teardown that fails.
func TestLostPodThatCannotBeReleasedIsOwed(t *testing.T) {
	n, m, _ := forgotten(t)
	m.owedFirst = time.Millisecond
	n.plugin("y", `echo '{"code":5,"msg":"disk"}'; exit 1`)
	if err := m.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if owed := m.Owed(); len(owed) != 1 || !strings.Contains(owed[0].Error, "disk") || !strings.Contains(owed[0].Pod, "web-0") {
		t.Errorf("%+v", owed)
	}
	n.plugin("y", good)
	eventually(t, "nothing is owed", func() bool { return len(m.Owed()) == 0 })
	n.same(n.intents(), podID+doneSuffix)
}

// A power cut can undo DEL, too, where plugins keep what they know on another file system.
func TestTeardownJustBeforeARebootIsRepeated(t *testing.T) {
	n, m, p, _ := added(t)
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")
	m = n.open() // the same boot
	if err := m.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls())
	done := m.intentFile(podID) + doneSuffix
	var i intent
	if err := json.Unmarshal([]byte(read(t, done)), &i); err != nil {
		t.Fatal(err)
	}
	i.Boot = "another"
	data, err := json.Marshal(i)
	if err != nil {
		t.Fatal(err)
	}
	n.write(done, string(data))
	m = n.open()
	if err := m.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")

	n.same(n.intents(), podID+doneSuffix)
	m.forgetIntents()
	n.same(n.intents(), podID+doneSuffix)
	ahead := time.Now().Add(1000 * doneFor) // of a clock that has been set back since
	if err := os.Chtimes(done, ahead, ahead); err != nil {
		t.Fatal(err)
	}
	m.forgetIntents()
	n.same(n.intents(), podID+doneSuffix)
	if st, err := os.Stat(done); err != nil || time.Until(st.ModTime()) > 0 {
		t.Errorf("it counts from %v, %v", st.ModTime(), err)
	}
	old := time.Now().Add(-2 * doneFor)
	if err := os.Chtimes(done, old, old); err != nil {
		t.Fatal(err)
	}
	m.forgetIntents()
	n.same(n.intents())
}

// Without its intent no plugin runs.
func TestSetupWithoutRoomForItsIntentRunsNothing(t *testing.T) {
	n := newNode(t)
	p := n.pod()
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	m := n.open()
	if err := os.MkdirAll(n.cache, 0o700); err != nil {
		t.Fatal(err)
	}
	n.write(n.cache+"/intents", "") // in its way
	if _, err := m.Setup(t.Context(), p); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("%v", err)
	}
	n.same(n.calls())
}

// containernetworking/cni#1055: the intent is on the disk before the first plugin runs. The disk is a file below a loop device,
// and the plugin copies it: the copy is what a machine finds whose power is cut at that moment.
func TestCNI1055_IntentIsOnTheDiskBeforeAdd(t *testing.T) {
	needRoot(t)
	n := newNode(t)
	dir := t.TempDir()
	mount(t, dir+"/disk", n.cache)
	p := n.pod()
	n.plugin("x", `[ "$CNI_COMMAND" != ADD ] || cp `+dir+"/disk "+dir+"/cut\n"+good)
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	m := n.open()
	if _, err := m.Setup(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.lines()
	mount(t, dir+"/cut", dir+"/found")
	m = n.open(func(o *Options) { o.CacheDir = dir + "/found" })
	i, ok := m.intended(podID)
	if !ok || i.Pod.Name != "web-0" || string(i.Pod.Conflist) != list("a", "x") {
		t.Fatalf("%+v, %v", i, ok)
	}
	if err := m.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "x DEL")
}

// mount mounts a disk, a file, which is made where there is none.
func mount(t *testing.T, disk, dir string) {
	t.Helper()
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("needs mkfs.ext4")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs a loop device")
	}
	run := func(args ...string) {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	if _, err := os.Stat(disk); err != nil {
		run("truncate", "-s", "16M", disk)
		run("mkfs.ext4", "-q", "-F", disk)
	}
	if err := os.MkdirAll(filepath.Clean(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	run("mount", "-o", "loop", disk, dir)
	t.Cleanup(func() { run("umount", dir) })
}

// TestIntentsAreSyncedWhereTheirOrderIsNotKept: plugins that are programs keep what they do where only they know.
func TestIntentsAreSyncedWhereTheirOrderIsNotKept(t *testing.T) {
	const elsewhere = "/dev/shm"
	dir := t.TempDir()
	m := &Manager{opts: Options{CacheDir: dir}, plugins: &plugins{log: slog.New(slog.DiscardHandler)}}
	if err := os.Mkdir(m.intentsDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	var here, there unix.Stat_t
	if err := errors.Join(unix.Stat(dir, &here), unix.Stat(elsewhere, &there)); err != nil {
		t.Fatal(err)
	}
	if here.Dev == there.Dev {
		t.Skip("there is one file system only")
	}
	for config, want := range map[string]bool{
		`{"type":"bridge","ipam":{"type":"host-local","dataDir":"` + dir + `/not/there/yet"}},{"type":"portmap"}`: false,
		`{"type":"bridge","ipam":{"type":"host-local","dataDir":"` + elsewhere + `/networks"}}`:                   true,
		`{"type":"ptp","ipam":{"type":"static"}}`:                                                                 false,
		`{"type":"ptp","ipam":{"type":"dhcp"}}`:                                                                   true,
		`{"type":"bridge"},{"type":"calico"}`:                                                                     true,
	} {
		c, err := parseConflist([]byte(`{"cniVersion":"1.0.0","name":"n","plugins":[`+config+`]}`), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.keptElsewhere(c); got != want {
			t.Errorf("%s: %v", config, got)
		}
	}
}
