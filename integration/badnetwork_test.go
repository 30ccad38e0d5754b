//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// TestBadNetwork breaks the node's network in each way that configurations, plugins and annotations know. Each is told, by
// file and line or by the plugin's name; the pod that met it runs as soon as it is mended, under the same name; nothing is
// left of the attempt.
func TestBadNetwork(t *testing.T) {
	bin := t.TempDir()
	n := badNetwork{startNode(t, lab.Options{Tools: tools, Log: t.Logf, Serve: []string{"--cni-bin", tools.CNI + ":" + bin}}), bin}
	if n.Foreign() {
		t.Skip("the network of another runtime is not ours to break")
	}
	n.mend(t)
	for _, f := range n.files() {
		t.Run("configuration: "+f.name, func(t *testing.T) { n.badFile(t, f) })
	}
	for _, f := range badPlugins {
		t.Run("plugin: "+f.name, func(t *testing.T) { n.badPlugin(t, f) })
	}
	t.Run("plugin: it says that it is not ready", n.saysNotReady)
	t.Run("plugin: it hangs in ADD", n.hangsInAdd)
	t.Run("plugin: it hangs in DEL", n.hangsInDel)
	t.Run("plugin: it fails in DEL", n.failsInDel)
	t.Run("plugin: it fails in DEL, and nobody asks again", n.failsOnce)
	t.Run("plugin: it is uninstalled while a pod runs", n.uninstalled)
	for _, f := range badAnnotations {
		t.Run(fmt.Sprintf("annotation: %s=%.20s", f.key, f.value), func(t *testing.T) { n.badAnnotation(t, f) })
	}
	t.Run("configuration: it is replaced all the time", n.replaced)
	t.Run("configuration: it is written in place all the time", n.writtenInPlace)
}

// badNetwork is the node, with a directory of plugins of its own.
type badNetwork struct {
	*lab.Node
	bin string
}

// badType is the plugin that is last in the chain, so that there is something to undo when it fails.
const badType = "berth-lab-bad"

func (n badNetwork) file() string { return filepath.Join(n.CNIConf(), "10-lab.conflist") }

func (n badNetwork) conflist() string {
	return strings.Replace(n.Conflist(), `{"type": "bandwidth", "capabilities": {"bandwidth": true}}`,
		`{"type": "bandwidth", "capabilities": {"bandwidth": true}},`+"\n    "+`{"type": "`+badType+`"}`, 1)
}

// mend makes configuration and plugin good again.
func (n badNetwork) mend(t *testing.T) {
	t.Helper()
	n.install(t, passes)
	must(t, os.RemoveAll(n.file()))
	must(t, os.MkdirAll(n.CNIConf(), 0o755))
	must(t, replaceFile(n.file(), []byte(n.conflist()), 0o644))
	must(t, lab.Eventually(context.Background(), soon, "the network is ready", n.CRI.Ready)) // also when the test is over
}

// passes is the body of a plugin that hands on what the one before it has made.
const passes = `echo "$conf" | sed -n 's/.*"prevResult":\({.*}\),"type".*/\1/p'`

// install makes the plugin do that in ADD; DEL does nothing.
func (n badNetwork) install(t *testing.T, add string) { n.installBoth(t, add, ":") }

func (n badNetwork) installBoth(t *testing.T, add, del string) {
	t.Helper()
	script := fmt.Sprintf("#!/bin/sh\nconf=$(cat)\ncase $CNI_COMMAND in\nADD)\n%s\n;;\nDEL)\n%s\n;;\nesac\n", add, del)
	must(t, replaceFile(filepath.Join(n.bin, badType), []byte(script), 0o755))
}

// replaceFile is never seen half written.
func replaceFile(file string, data []byte, mode fs.FileMode) error {
	if err := os.WriteFile(file+"~", data, mode); err != nil {
		return err
	}
	return os.Rename(file+"~", file)
}

// runs wants a pod to run, and removes it.
func (n badNetwork) runs(t *testing.T, pod *runtimeapi.PodSandboxConfig) {
	t.Helper()
	id, err := n.CRI.RunPod(t.Context(), pod)
	must(t, err)
	must(t, n.CRI.RemovePod(t.Context(), id))
}

// refused wants a pod not to run, with an error that says all of that.
func (n badNetwork) refused(t *testing.T, pod *runtimeapi.PodSandboxConfig, want ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	id, err := n.CRI.RunPod(ctx, pod)
	if err == nil {
		t.Errorf("it runs")
		must(t, n.CRI.RemovePod(ctx, id))
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not say %q: %.1000s", w, err)
		}
	}
	if len(err.Error()) > 3000 {
		t.Errorf("the error has %d bytes", len(err.Error()))
	}
}

// badFile is a way to break the configuration, and what NetworkReady says of it.
type badFile struct {
	name  string
	spoil func() error
	want  string
}

func (n badNetwork) files() []badFile {
	write := func(content string) func() error {
		return func() error { return replaceFile(n.file(), []byte(content), 0o644) }
	}
	instead := func(put func(file string) error) func() error {
		return func() error { return errors.Join(os.Remove(n.file()), put(n.file())) }
	}
	change := func(old, new string) func() error { return write(strings.Replace(n.conflist(), old, new, 1)) }
	at := n.file()
	plugin := filepath.Join(n.bin, badType)
	return []badFile{
		{"empty", write(""), at + ":1: not a configuration: unexpected end"},
		{"cut off", write(n.conflist()[:150]), at + ":5: not a configuration: unexpected end"},
		{"a comma too many", change(`"portMappings": true}},`, `"portMappings": true}},,`), at + ":7: not a configuration: invalid character ','"},
		{"binary", write("\x7fELF\x02\x01\x01\x00"), at + ":1: not a configuration"},
		{"something behind it", write(n.conflist() + "}"), at + ":12: not a configuration"},
		{"a list", write("[]"), at + ":1: not a configuration: json: cannot unmarshal array"},
		{"10 MB", write(n.conflist() + strings.Repeat(" ", 10<<20)), at + ": larger than 1048576 bytes"},
		{"a version to come", change("1.0.0", "9.0.0"), at + `:2: network ` + n.Network() + `: CNI version "9.0.0" is none of`},
		{"a version that is none", change("1.0.0", "latest"), at + `:2: network ` + n.Network() + `: CNI version "latest" is none of`},
		{"no name", change(`"name": "`+n.Network()+`",`, ""), at + ":1: name is missing"},
		{"a name that is a path", change(n.Network(), "../../x"), at + `:3: name "../../x": invalid characters found in network name`},
		{"no plugins", write(`{"cniVersion": "1.0.0", "name": "x", "plugins": []}`), at + ":1: network x has no plugins"},
		{"a plugin without a type", change(`"type": "portmap", `, ""), at + ":7: plugin 2: "},
		{"a type that is a path", change("portmap", "../../../../tmp/x"), at + `:7: plugin 2: plugin type "../../../../tmp/x" is not a file name`},
		{"addresses by a path", change("host-local", "/tmp/x"), at + `:5: plugin 1: bridge: ipam: plugin type "/tmp/x"`},
		{"capabilities that are none", change(`{"portMappings": true}`, `"portMappings"`), at + ":7: plugin 2: "},
		{"a plugin that is not installed", change(badType, "berth-lab-none"), "network " + n.Network() + " (" + at + "): no plugin berth-lab-none in "},
		{"a plugin that is no program", func() error { return os.Chmod(plugin, 0o644) }, "no plugin " + badType + " in "},
		{"a plugin that is a directory", func() error { return errors.Join(os.Remove(plugin), os.Mkdir(plugin, 0o755)) }, "no plugin " + badType + " in "},
		{"a pipe that nobody writes to", instead(func(file string) error { return unix.Mkfifo(file, 0o644) }), at + ": not a regular file"},
		{"a directory", instead(func(file string) error { return os.Mkdir(file, 0o755) }), at + ": "},
		{"a link to nowhere", instead(func(file string) error { return os.Symlink("/nowhere", file) }), at + ": open " + at + ": no such file"},
		{"a link to itself", instead(func(file string) error { return os.Symlink(file, file) }), "too many levels of symbolic links"},
		{"gone", func() error { return os.Remove(at) }, "no network configuration (*.conflist, *.conf, *.json) in " + n.CNIConf()},
		{"gone with its directory", func() error { return os.RemoveAll(n.CNIConf()) }, "no network configuration (*.conflist, *.conf, *.json) in " + n.CNIConf()},
	}
}

func (n badNetwork) badFile(t *testing.T, f badFile) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	must(t, f.spoil())
	must(t, lab.Eventually(t.Context(), soon, "NetworkReady is false, and says why", func(ctx context.Context) error {
		if err := n.CRI.Ready(ctx); err == nil || !strings.Contains(err.Error(), "NetworkReady is false: NetworkPluginNotReady: ") || !strings.Contains(err.Error(), f.want) {
			return fmt.Errorf("it says %v, want %q", err, f.want)
		}
		return nil
	}))
	pod := n.Pod("early")
	n.refused(t, pod, f.want)
	must(t, os.RemoveAll(filepath.Join(n.bin, badType)))
	n.mend(t)
	n.runs(t, pod)
}

// badPlugin is what a plugin does in ADD, and what the error says of it beside its name.
type badPlugin struct{ name, add, want string }

var badPlugins = []badPlugin{
	{"it fails by the book", `echo '{"cniVersion":"1.0.0","code":100,"msg":"no more","details":"at all"}'; exit 1`, "no more; at all (code 100)"},
	{"it asks for another try", `echo '{"cniVersion":"1.0.0","code":11,"msg":"agent starts"}'; exit 1`, "agent starts (code 11)"},
	{"it fails without a word", `exit 3`, "exit status 3, no message"},
	{"it panics", `echo 'panic: runtime error' >&2; exit 2`, `exit status 2, no message, stderr: "panic: runtime error"`},
	{"it crashes", `kill -SEGV $$`, "signal: segmentation fault"},
	{"it is killed", `kill -KILL $$`, "signal: killed"},
	{"it fails with garbage", `echo '<html>'; exit 1`, `exit status 1, stdout: "<html>"`},
	{"it succeeds with garbage", `echo '<html>'`, `it claims success, and its result is none`},
	{"it succeeds with half a result", `echo '{"cniVersion":"1.0.0","ips":[{'`, `it claims success, and its result is none`},
	{"it succeeds without a result", `:`, "it claims success, and gives no result"},
	{"it says null", `echo null`, "returned no address for eth0"},
	{"its list has a null", `echo '{"cniVersion":"0.4.0","ips":[null],"interfaces":[null]}'`, "its result has a null in a list"},
	{"its address is none", `echo '{"cniVersion":"1.0.0","ips":[{"address":"everywhere"}]}'`, "everywhere"},
	{"its result is of a version to come", `echo '{"cniVersion":"9.0.0"}'`, "9.0.0"},
	{"it says 100 MB", `head -c 104857600 /dev/zero | tr '\0' x`, "more than 1048576 bytes of output"},
	{"it complains 100 MB", `head -c 104857600 /dev/zero | tr '\0' x >&2; exit 1`, "exit status 1, no message"},
	{"it says 100 MB and does not end", `trap '' TERM PIPE; while :; do head -c 104857600 /dev/zero | tr '\0' x; done`, "more than 1048576 bytes of output"},
}

func (n badNetwork) badPlugin(t *testing.T, f badPlugin) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	n.install(t, f.add)
	pod := n.Pod("early")
	who := fmt.Sprintf("plugin type=%q failed (add)", badType)
	if strings.Contains(f.want, "no address") { // which of them should have given one is not known
		who = "the plugins"
	}
	n.refused(t, pod, "network "+n.Network()+": ", who, f.want)
	must(t, n.CRI.Ready(t.Context()))
	n.install(t, passes)
	n.runs(t, pod)
}

// saysNotReady has the plugin answer STATUS, which it is asked for in version 1.1 of the specification: first no, then not at
// all. NetworkReady says so, by its name, and whoever asks does not wait.
func (n badNetwork) saysNotReady(t *testing.T) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	status := func(does string) {
		t.Helper()
		script := "#!/bin/sh\nconf=$(cat)\ncase $CNI_COMMAND in\nADD)\n" + passes + "\n;;\nSTATUS)\n" + does + "\n;;\nesac\n"
		must(t, replaceFile(filepath.Join(n.bin, badType), []byte(script), 0o755))
	}
	conflist := strings.Replace(n.conflist(), `"cniVersion": "1.0.0"`, `"cniVersion": "1.1.0"`, 1)
	for _, f := range []struct{ does, want string }{
		{`echo '{"cniVersion":"1.1.0","code":50,"msg":"agent starts"}'; exit 1`, "is not ready: agent starts (code 50)"},
		{hangs, "is not ready: killed: context deadline exceeded (no answer to STATUS within 10s)"},
	} {
		status(f.does)
		must(t, os.Remove(n.file()))
		must(t, lab.Eventually(t.Context(), soon, "there is no network", func(ctx context.Context) error {
			if err := n.CRI.Ready(ctx); err == nil || !strings.Contains(err.Error(), "no network configuration") {
				return fmt.Errorf("it says %v", err)
			}
			return nil
		}))
		must(t, replaceFile(n.file(), []byte(conflist), 0o644))
		slowest := time.Duration(0)
		must(t, lab.Eventually(t.Context(), soon, "NetworkReady is false, and says why", func(ctx context.Context) error {
			began := time.Now()
			err := n.CRI.Ready(ctx)
			slowest = max(slowest, time.Since(began))
			if want := fmt.Sprintf("plugin type=%q %s", badType, f.want); err == nil || !strings.Contains(err.Error(), want) {
				return fmt.Errorf("it says %v, want %q", err, want)
			}
			return nil
		}))
		t.Logf("the slowest answer of Status took %v", slowest)
		if slowest > 3*time.Second {
			t.Error("Status waits for the plugin")
		}
		status(":")
		must(t, lab.Eventually(t.Context(), soon, "it is ready again", n.CRI.Ready))
		n.runs(t, n.Pod("early"))
	}
}

// hangs is what a plugin does that ends for nobody, with a child that does not either.
const hangs = `trap '' TERM INT HUP; (trap '' TERM; sleep 3600) & wait; sleep 3600`

// hangsInAdd has a caller who loses patience: the pod's name is free at once, whatever the plugin does.
func (n badNetwork) hangsInAdd(t *testing.T) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	n.install(t, hangs)
	pod := n.Pod("early")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if id, err := n.CRI.RunPod(ctx, pod); err == nil {
		t.Fatalf("%s runs", id)
	}
	n.install(t, passes)
	began := time.Now()
	must(t, lab.Eventually(t.Context(), soon, "the same pod runs", func(ctx context.Context) error {
		id, err := n.CRI.RunPod(ctx, pod)
		if err != nil {
			return err
		}
		return n.CRI.RemovePod(ctx, id)
	}))
	t.Logf("it ran %v after its caller had given up", time.Since(began))
	n.removeAll(t)
}

// removeAll removes what is listed: attempts that could not be undone at once.
func (n badNetwork) removeAll(t *testing.T) {
	t.Helper()
	began := time.Now()
	must(t, lab.Eventually(t.Context(), 2*soon, "all pods are removed", func(ctx context.Context) error {
		return n.CRI.RemovePods(ctx, func(*runtimeapi.PodSandbox) bool { return true })
	}))
	t.Logf("all that was left was removed within %v", time.Since(began))
}

func (n badNetwork) hangsInDel(t *testing.T) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	pod := n.Pod("late")
	id, err := n.CRI.RunPod(t.Context(), pod)
	must(t, err)
	n.installBoth(t, passes, hangs)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := n.CRI.RemovePod(ctx, id); err == nil {
		t.Error("it is removed")
	}
	n.install(t, passes)
	again := n.Pod("late")
	again.Metadata.Attempt++ // what a kubelet does next
	n.runs(t, again)
	n.removeAll(t)
}

func (n badNetwork) failsInDel(t *testing.T) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	pod := n.Pod("late")
	id, err := n.CRI.RunPod(t.Context(), pod)
	must(t, err)
	n.installBoth(t, passes, `echo '{"cniVersion":"1.0.0","code":100,"msg":"not now"}'; exit 1`)
	err = n.CRI.RemovePod(t.Context(), id)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("plugin type=%q failed (delete): not now (code 100)", badType)) {
		t.Errorf("%v", err)
	}
	again := n.Pod("late")
	again.Metadata.Attempt++
	id, err = n.CRI.RunPod(t.Context(), again)
	must(t, err)
	n.install(t, passes)
	must(t, n.CRI.RemovePod(t.Context(), id))
	n.removeAll(t)
}

// failsOnce has a caller who does not come back: what is left is released all the same.
func (n badNetwork) failsOnce(t *testing.T) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	before := addresses(t, n.Node)
	id, err := n.CRI.RunPod(t.Context(), n.Pod("late"))
	must(t, err)
	n.installBoth(t, passes, `echo '{"cniVersion":"1.0.0","code":100,"msg":"not now"}'; exit 1`)
	if _, err := n.CRI.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err == nil {
		t.Error("it is stopped")
	}
	n.install(t, passes)
	must(t, lab.Eventually(t.Context(), soon, "the pod waits for nothing", func(ctx context.Context) error {
		if w := n.waiting(ctx, t, id); w.For != "" {
			return fmt.Errorf("it waits for %+v", w)
		}
		return nil
	}))
	if got := addresses(t, n.Node); !slices.Equal(got, before) {
		t.Errorf("addresses: %v, before: %v", got, before)
	}
	n.removeAll(t)
}

// waiting is what the status of a pod says that it waits for.
type waiting struct {
	For   string
	Tries int
}

func (n badNetwork) waiting(ctx context.Context, t *testing.T, podID string) waiting {
	t.Helper()
	status, err := n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID, Verbose: true})
	must(t, err)
	var info struct{ Waiting waiting }
	must(t, json.Unmarshal([]byte(status.Info["info"]), &info))
	return info.Waiting
}

// uninstalled takes configuration and plugin away for good, as an add-on that is removed. The pod goes all the same, and what
// it held is released when that can be, by a later daemon.
func (n badNetwork) uninstalled(t *testing.T) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	ctx := t.Context()
	before := addresses(t, n.Node)
	pod := n.Pod("late")
	id, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	must(t, errors.Join(os.Remove(n.file()), os.Remove(filepath.Join(n.bin, badType))))
	why := fmt.Sprintf("no plugin %q in ", badType)
	if err := n.CRI.RemovePod(ctx, id); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("at first: %v", err)
	}
	if w := n.waiting(ctx, t, id); !strings.Contains(w.For, why) || w.Tries == 0 {
		t.Errorf("its status says that it waits for %+v", w)
	}
	began := time.Now()
	must(t, lab.Eventually(ctx, 3*time.Minute, "the pod is let go", func(ctx context.Context) error { return n.CRI.RemovePod(ctx, id) }))
	t.Logf("it was let go after %v", time.Since(began))
	for range 2 {
		if owed := n.owed(t); len(owed) != 1 || owed[0].Pod != fmt.Sprintf("pod %s/late (%.12s)", n.Network(), id) || !strings.Contains(owed[0].Error, why) {
			t.Errorf("owed: %+v", owed)
		}
		must(t, n.KillBerth())
		must(t, n.StartBerthUnready(ctx))
	}
	if got := addresses(t, n.Node); len(got) != len(before)+1 {
		t.Errorf("addresses: %v, before: %v", got, before)
	}
	must(t, n.KillBerth())
	n.install(t, passes)
	must(t, n.StartBerthUnready(ctx))
	must(t, lab.Eventually(ctx, soon, "nothing is owed", func(context.Context) error {
		if owed := n.owed(t); len(owed) > 0 {
			return fmt.Errorf("owed: %+v", owed)
		}
		return nil
	}))
	if got := addresses(t, n.Node); !slices.Equal(got, before) {
		t.Errorf("addresses: %v, before: %v", got, before)
	}
}

// owed is what crictl info says is to be released.
func (n badNetwork) owed(t *testing.T) (all []struct{ Pod, Error string }) {
	t.Helper()
	status, err := n.CRI.RuntimeServiceClient.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
	must(t, err)
	must(t, json.Unmarshal([]byte(status.Info["networksOwed"]), &all))
	return all
}

// badAnnotation is one that speaks of the network.
type badAnnotation struct{ key, value string }

var badAnnotations = []badAnnotation{
	{"kubernetes.io/ingress-bandwidth", "fast"},
	{"kubernetes.io/ingress-bandwidth", ""},
	{"kubernetes.io/ingress-bandwidth", "10Mbit"},
	{"kubernetes.io/egress-bandwidth", "-1M"},
	{"kubernetes.io/egress-bandwidth", "1e99"},
	{"kubernetes.io/egress-bandwidth", "1; rm -rf /"},
	{"kubernetes.io/egress-bandwidth", strings.Repeat("9", 100000)},
}

func (n badNetwork) badAnnotation(t *testing.T, f badAnnotation) {
	ledger(t, n.Node)
	pod := n.Pod("limited")
	pod.Annotations = map[string]string{f.key: f.value}
	id, err := n.CRI.RunPod(t.Context(), pod)
	if err == nil {
		must(t, n.CRI.RemovePod(t.Context(), id))
	}
	wantCode(t, err, codes.InvalidArgument, f.key)
	if err != nil && len(err.Error()) > 3000 {
		t.Errorf("the error has %d bytes", len(err.Error()))
	}
	pod.Annotations[f.key] = "10M"
	n.runs(t, pod)
}

// replaced has two configurations take turns by rename, as tools do: there always is one, and every pod gets one of both.
func (n badNetwork) replaced(t *testing.T) {
	n.busy(t, func(data []byte) error { return replaceFile(n.file(), data, 0o644) })
}

// writtenInPlace has them take turns as `cat >` does: now and then there is half of one.
func (n badNetwork) writtenInPlace(t *testing.T) {
	n.busy(t, func(data []byte) error { return os.WriteFile(n.file(), data, 0o644) })
}

func (n badNetwork) busy(t *testing.T, write func([]byte) error) {
	ledger(t, n.Node)
	t.Cleanup(func() { n.mend(t) })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		for i := 0; ctx.Err() == nil; i++ {
			text := n.conflist()
			if i%2 == 1 {
				text = strings.Replace(text, `"hairpinMode": true`, `"hairpinMode": false, "promiscMode": false`, 1)
			}
			if err := write([]byte(text)); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for i := range 5 {
		pod := n.Pod(fmt.Sprint("busy-", i))
		must(t, lab.Eventually(t.Context(), soon, "a pod runs", func(ctx context.Context) error {
			id, err := n.CRI.RunPod(ctx, pod)
			if err != nil {
				return err
			}
			return n.CRI.RemovePod(ctx, id)
		}))
	}
	cancel()
	must(t, <-done)
}
