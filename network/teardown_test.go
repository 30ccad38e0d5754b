package network

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// added is a node with one network of two plugins, and a pod that was added to it.
func added(t *testing.T) (*node, *Manager, Pod, *Result) {
	t.Helper()
	n := newNode(t)
	p := n.pod()
	n.plugin("x", good)
	n.plugin("y", good)
	n.write(n.conf+"/10-a.conflist", list("a", "x", "y"))
	m := n.open()
	res, err := m.Setup(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	n.lines()
	return n, m, p, res
}

func TestTeardownRunsDelInReverseAndOnce(t *testing.T) {
	n, m, p, res := added(t)
	p.Conflist = res.Conflist
	p.PortMappings = []PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: 8080}}
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	lines := n.lines()
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "y DEL netns="+p.NetNS+" id="+podID+" if=eth0 ") || !strings.HasPrefix(lines[1], "x DEL ") {
		t.Fatalf("%q", lines)
	}
	conf := told(t, lines[0])
	if conf["prevResult"] == nil || fmt.Sprint(conf["runtimeConfig"]) != "map[portMappings:[map[containerPort:80 hostPort:8080 protocol:tcp]]]" {
		t.Errorf("DEL was told %v", conf)
	}
	if c := n.caches(); len(c) != 0 {
		t.Errorf("cache left: %v", c)
	}
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Errorf("again: %v", err)
	}
}

// containernetworking/cni#1055: a power cut leaves a cache file of no bytes, or of some, and the pod can never be removed.
func TestTornCacheIsDropped(t *testing.T) {
	n, m, p, res := added(t)
	file := n.caches()[0]
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	contents := map[string][]byte{
		"junk": []byte("\x00\x00\x00"), "null": []byte("null"), "number": []byte("1"), "empty object": []byte("{}"),
		"wrong kind": []byte(`{"kind":"x"}`), "result is no result": []byte(`{"kind":"cniCacheV1","result":{"cniVersion":"1.0.0","ips":[{"address":"x"}]}}`),
		"other version": []byte(`{"kind":"cniCacheV1","result":{"cniVersion":"77"}}`),
	}
	for _, size := range []int{0, 1, 2, len(whole) / 4, len(whole) / 2, len(whole) - 1} {
		contents[fmt.Sprintf("%d bytes of %d", size, len(whole))] = whole[:size]
	}
	for name, content := range contents {
		for _, stored := range [][]byte{res.Conflist, nil} {
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
			p.Conflist = stored
			if err := m.Teardown(t.Context(), p); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			n.same(n.calls(), "y DEL", "x DEL")
			if c := n.caches(); len(c) != 0 {
				t.Errorf("%s: cache left: %v", name, c)
			}
		}
	}
	if !strings.Contains(n.daemonLog.String(), "torn") {
		t.Error("nothing logged")
	}
}

// cri-o#4084, containerd/cri#948: after a reboot the namespace is gone, and its path may be a plain file.
func TestTeardownWithoutNamespace(t *testing.T) {
	n, m, p, res := added(t)
	p.Conflist = res.Conflist
	plain := t.TempDir() + "/net"
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"", "/nonexistent/net", plain, "/proc/1/nonexistent"} {
		p.NetNS = path
		if err := m.Teardown(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		lines := n.lines()
		if len(lines) != 2 || !strings.HasPrefix(lines[0], "y DEL netns= ") {
			t.Errorf("%q: %q", path, lines)
		}
	}
}

// cri-o#4276: a sandbox could not be removed without a network configuration.
func TestTeardownWithoutConfiguration(t *testing.T) {
	n, m, p, res := added(t)
	if err := os.RemoveAll(n.conf); err != nil {
		t.Fatal(err)
	}
	// The cache still knows.
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")
	// And the record.
	p.Conflist = res.Conflist
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")
	// Neither does: then there is nothing that could be done.
	p.Conflist = nil
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls())
}

// The configuration of the node changes while pods run: they are removed with the one that they were added with.
func TestTeardownUsesWhatAddUsed(t *testing.T) {
	n, m, p, res := added(t)
	n.plugin("z", good)
	n.write(n.conf+"/10-a.conflist", list("other", "z"))
	p.Conflist = res.Conflist
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")
}

// A pod whose ADD failed, and which was then added to another network, leaves both.
func TestTeardownOfEveryNetwork(t *testing.T) {
	n, m, p, _ := added(t)
	n.plugin("z", good)
	p.Conflist = []byte(list("b", "z"))
	if _, err := m.Setup(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.lines()
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL", "z DEL")
}

// The daemon died before the plugins were done: there is no result, but perhaps half of a network.
func TestTeardownAfterInterruptedAdd(t *testing.T) {
	n := newNode(t)
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	m := n.open()
	if err := m.Teardown(t.Context(), Pod{ID: podID, Name: "web-0", Namespace: "shop"}); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "x DEL")
}

func TestTeardownThatFailsCanBeRepeated(t *testing.T) {
	n, m, p, _ := added(t)
	n.plugin("y", `echo '{"code":5,"msg":"disk"}'; exit 1`)
	err := m.Teardown(t.Context(), p)
	if err == nil || !strings.Contains(err.Error(), `pod shop/web-0 (0123456789ab): network a: plugin type="y" failed (delete): disk`) {
		t.Errorf("%v", err)
	}
	if len(n.caches()) != 1 {
		t.Error("the result is forgotten")
	}
	n.plugin("y", `sleep 1000`)
	if err := m.Teardown(within(t, 100*time.Millisecond), p); err == nil || !strings.Contains(err.Error(), "context deadline exceeded") {
		t.Errorf("%v", err)
	}
	if err := os.Remove(n.bin + "/y"); err != nil {
		t.Fatal(err)
	}
	if err := m.Teardown(t.Context(), p); err == nil || !strings.Contains(err.Error(), `no plugin "y"`) {
		t.Errorf("%v", err)
	}
	n.plugin("y", good)
	n.lines()
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")
}

func TestTeardownIgnoresWhatOnlySetupNeeds(t *testing.T) {
	n, m, p, res := added(t)
	p.Conflist = res.Conflist
	p.Annotations = map[string]string{IngressBandwidth: "fast"} // was put there later
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")
}

func TestGCTearsDownLostPods(t *testing.T) {
	n, m, p, _ := added(t)
	lost := p
	lost.ID = otherID
	if _, err := m.Setup(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	n.lines()
	if err := m.GC(t.Context(), []string{podID, otherID}); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls())
	if err := m.GC(t.Context(), []string{podID}); err != nil {
		t.Fatal(err)
	}
	lines := n.lines()
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "y DEL netns="+p.NetNS+" id="+otherID) || !strings.Contains(lines[0], "K8S_POD_NAME=web-0") {
		t.Errorf("%q", lines)
	}
	if c := n.caches(); len(c) != 1 || !strings.Contains(c[0], podID) {
		t.Errorf("cache: %v", c)
	}
	// Of an earlier daemon, which noted no intent; torn, and the node has no configuration: kept until it has one.
	if err := os.Remove(m.intentFile(podID)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.caches()[0], nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(n.conf, n.conf+"~"); err != nil {
		t.Fatal(err)
	}
	readyWithin(t, m, 5*time.Second, "no network")
	if err := m.GC(t.Context(), nil); err != nil || len(n.caches()) != 1 {
		t.Errorf("%v, %v", err, n.caches())
	}
	if err := os.Rename(n.conf+"~", n.conf); err != nil {
		t.Fatal(err)
	}
	if err := m.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "y DEL", "x DEL")
	if c := n.caches(); len(c) != 0 {
		t.Errorf("cache: %v", c)
	}
}

// The verb GC makes plugins release what they do not find in the list: the pods of another runtime on the same network,
// too. So it is run only where there is none.
func TestGCVerbOnlyOnExclusiveNetworks(t *testing.T) {
	n := newNode(t)
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"x"}]}`)
	m := n.open()
	readyWithin(t, m, 5*time.Second, "") // x has answered STATUS
	n.lines()
	if err := m.GC(t.Context(), []string{podID}); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls())
	m.opts.ExclusiveNetworks = true
	if err := m.GC(t.Context(), []string{podID}); err != nil {
		t.Fatal(err)
	}
	lines := n.lines()
	if len(lines) != 1 || !strings.HasPrefix(lines[0], "x GC ") {
		t.Fatalf("%q", lines)
	}
	got, _ := json.Marshal(told(t, lines[0])["cni.dev/valid-attachments"])
	if string(got) != `[{"containerID":"`+podID+`","ifname":"eth0"}]` {
		t.Errorf("%s", got)
	}
	n.plugin("x", "exit 1")
	if err := m.GC(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "network a") {
		t.Errorf("%v", err)
	}
}

func TestSetupWithoutNamespaceRunsNothing(t *testing.T) {
	n, m, p, _ := added(t)
	plain := t.TempDir() + "/net"
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p.NetNS = plain
	if _, err := m.Setup(t.Context(), p); !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v", err)
	}
	n.same(n.calls())
}

// Pods are torn down side by side, after a restart above all. Each looked through the results of all, and warned of those
// that others had just removed.
func TestResultsOfOthersMayGo(t *testing.T) {
	n, m, p, _ := added(t)
	file := n.caches()[0]
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	id := strings.Repeat("0", len(podID))
	other, made := strings.Replace(file, podID, id, 1), n.cache+"/made"
	whole = bytes.ReplaceAll(whole, []byte(podID), []byte(id))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 1000 {
			_ = os.WriteFile(made, whole, 0o600)
			_ = os.Rename(made, other)
			_ = os.Remove(other)
		}
	}()
	for busy := true; busy; {
		select {
		case <-done:
			busy = false
		default:
		}
		all, err := m.attachments()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(all, func(a attachment) bool { return a.id == podID }) {
			t.Fatalf("%d results of other pods, none of %s", len(all), p.ID)
		}
	}
	if log := n.daemonLog.String(); strings.Contains(log, "cannot be used") {
		t.Errorf("%.300s", log)
	}
}
