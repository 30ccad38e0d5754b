//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
)

// cdiDevice is the file of one device, vendor.com/class=NAME, with the given edits in JSON.
func cdiDevice(t *testing.T, dir, name, edits string) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, name+".json"),
		[]byte(`{"cdiVersion":"0.7.0","kind":"vendor.com/class","devices":[{"name":"`+name+`","containerEdits":`+edits+`}]}`), 0o644))
}

func withCDI(names ...string) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) {
		for _, n := range names {
			c.CDIDevices = append(c.CDIDevices, &runtimeapi.CDIDevice{Name: "vendor.com/class=" + n})
		}
	}
}

// hook is one in JSON: the host's busybox runs a script. Without a timeout it has berth's.
func hook(f *fields, name, script string, more string) string {
	args, _ := json.Marshal([]string{"sh", "-c", script})
	return fmt.Sprintf(`{"hookName":%q,"path":%q,"args":%s%s}`, name, f.Tools.Busybox, args, more)
}

// TestCDI gives containers devices by the names that their vendors gave them.
func TestCDI(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("the directories of CDI are this node's berth's")
	}
	ledger(t, n)
	s := &security{Node: n, suite: t, reg: imagestest.NewRegistry(t), pods: map[podKind]*securityPod{}}
	program, err := os.ReadFile(n.Tools.Busybox)
	must(t, err)
	s.busybox = imagestest.Layer(busyboxEntries(program)...)
	f := &fields{s, false}
	t.Cleanup(func() { s.removePods(t) })
	for _, c := range cdiCases {
		t.Run(c.name, func(t *testing.T) { c.run(t, f) })
	}
}

var cdiCases = []struct {
	name string
	run  func(t *testing.T, f *fields)
}{
	{"environment, device, mount and group", func(t *testing.T, f *fields) {
		dir := f.volume(t)
		hostDevice(t, dir+"/node")
		must(t, os.WriteFile(dir+"/lib", []byte("a library\n"), 0o644))
		cdiDevice(t, f.CDIStatic(), "all", fmt.Sprintf(`{"env":["VENDOR=yes","A=device"],"additionalGids":[4400],
			"deviceNodes":[{"path":"/dev/vendor0","hostPath":%q,"permissions":"r"}],
			"mounts":[{"hostPath":%q,"containerPath":"/usr/lib/vendor","options":["ro","bind","nosuid","nodev"]}]}`, dir+"/node", dir+"/lib"))
		cfg := f.idleWith(withCDI("all"), func(c *runtimeapi.ContainerConfig) {
			c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("request")}}
			c.Linux.SecurityContext.RunAsUser = number(1000)
		})
		id := f.start(t, f.pod(t, plainPod), cfg)
		out, _ := f.exec(t, id, "echo $VENDOR $A; stat -c '%F %t:%T' /dev/vendor0; cat /usr/lib/vendor; grep -c ' /usr/lib/vendor ro,nosuid,nodev' /proc/self/mountinfo; id -G")
		if want := "yes device\ncharacter special file f0:63\na library\n1\n1000 4400 50000\n"; sortLast(out) != want {
			t.Errorf("it says %q, want %q", out, want)
		}
		if groups := f.status(t, id).User.Linux.SupplementalGroups; !slices.Equal(groups, []int64{1000, 4400, 50000}) {
			t.Errorf("status has the groups %v", groups)
		}
		f.sameMounts(t, id, nil)
		root := f.ctr("sh -c ': < /dev/vendor0' 2>&1 | grep -c 'not permitted'; sh -c ': > /dev/vendor0' 2>&1 | grep -c 'not permitted'", withCDI("all"))
		out, _, err := f.output(t, f.pod(t, plainPod), root)
		if lines := strings.Fields(out); err != nil || len(lines) != 2 || lines[1] != "1" {
			t.Errorf("permissions r: reading and writing are refused %q times, %v", lines, err)
		}
	}},
	{"two devices, one of them twice", func(t *testing.T, f *fields) {
		cdiDevice(t, f.CDIStatic(), "one", `{"env":["ONE=1"]}`)
		cdiDevice(t, f.CDIStatic(), "two", `{"env":["TWO=2"]}`)
		f.says(t, f.pod(t, plainPod), f.ctr("echo $ONE$TWO", withCDI("one", "two", "one")), "12\n")
	}},
	{"the later directory wins, at once", func(t *testing.T, f *fields) {
		cdiDevice(t, f.CDIStatic(), "where", `{"env":["WHERE=static"]}`)
		f.says(t, f.pod(t, plainPod), f.ctr("echo $WHERE", withCDI("where")), "static\n")
		cdiDevice(t, f.CDIDynamic(), "where", `{"env":["WHERE=dynamic"]}`)
		f.says(t, f.pod(t, plainPod), f.ctr("echo $WHERE", withCDI("where")), "dynamic\n")
		must(t, os.Remove(f.CDIDynamic()+"/where.json"))
		f.says(t, f.pod(t, plainPod), f.ctr("echo $WHERE", withCDI("where")), "static\n")
	}},
	{"a device that nobody knows", func(t *testing.T, f *fields) {
		f.refused(t, f.pod(t, plainPod), f.ctr("true", withCDI("no-such")), codes.FailedPrecondition, "config.CDI_devices", "vendor.com/class=no-such", f.CDIStatic())
	}},
	{"a device node that is gone", func(t *testing.T, f *fields) {
		cdiDevice(t, f.CDIStatic(), "gone", `{"deviceNodes":[{"path":"/dev/vendor0","hostPath":"/dev/no-such-node"}]}`)
		f.refused(t, f.pod(t, plainPod), f.ctr("true", withCDI("gone")), codes.FailedPrecondition, "config.CDI_devices", "/dev/no-such-node")
	}},
	{"a directory full of traps", func(t *testing.T, f *fields) {
		cdiDevice(t, f.CDIStatic(), "good", `{"env":["GOOD=yes"]}`)
		for name, make := range map[string]func(string) error{
			"fifo.json": func(p string) error { return unix.Mkfifo(p, 0o666) },
			"zero.yaml": func(p string) error { return os.Symlink("/dev/zero", p) },
			"kmsg.yaml": func(p string) error { return os.Symlink("/proc/kmsg", p) },
			"loop.yaml": func(p string) error { return os.Symlink("loop.yaml", p) },
			"huge.json": func(p string) error { return os.Truncate(touched(p), 1<<40) },
		} {
			path := filepath.Join(f.CDIStatic(), name)
			must(t, make(path))
			t.Cleanup(func() { _ = os.Remove(path) })
		}
		f.says(t, f.pod(t, plainPod), f.ctr("echo $GOOD", withCDI("good")), "yes\n")
		f.refused(t, f.pod(t, plainPod), f.ctr("true", withCDI("no-such")), codes.FailedPrecondition, "fifo.json", "huge.json", "zero.yaml", "kmsg.yaml")
	}},
	{"hooks of every kind, each once, with the container's state", func(t *testing.T, f *fields) {
		dir := f.volume(t)
		note := func(name string) string {
			return hook(f, name, fmt.Sprintf("cat > %s/%s.state; env > %s/%s.env; echo x >> %s/%s.times", dir, name, dir, name, dir, name), "")
		}
		started := `{"hookName":"startContainer","path":"/bin/sh","args":["sh","-c","cat > /tmp/state; cat /proc/$$/environ > /tmp/env"],"env":["ONLY=this"]}`
		cdiDevice(t, f.CDIStatic(), "hooks", `{"hooks":[`+strings.Join([]string{note("prestart"), note("createRuntime"), note("createContainer"), note("poststart"), note("poststop"), started}, ",")+`]}`)
		cfg := f.idle(f.image(t, func(i *imagestest.Image) {
			i.Config.Config.Env = append(i.Config.Config.Env, "LD_PRELOAD=./evil.so", "SECRET=image")
		}))
		withCDI("hooks")(cfg)
		id := f.start(t, f.pod(t, plainPod), cfg)
		// The start has returned once the container's init goes on, which runs the hook first.
		out, _ := f.exec(t, id, "i=0; until test -s /tmp/env || test $i = 100; do sleep 0.1; i=$((i+1)); done; cat /tmp/env; grep -c "+id+" /tmp/state")
		if !strings.Contains(out, "ONLY=this") || strings.Contains(out, "SECRET") || !strings.HasSuffix(out, "\x001\n") {
			t.Errorf("startContainer: %q", out)
		}
		if _, err := os.Stat(dir + "/poststop.state"); err == nil {
			t.Error("poststop has run while the container does")
		}
		f.remove(t, id)
		for _, name := range []string{"prestart", "createRuntime", "createContainer", "poststart", "poststop"} {
			data, err := os.ReadFile(filepath.Join(dir, name+".state"))
			must(t, err)
			var state struct {
				ID, Status, Bundle string
				Pid                int
			}
			if err := json.Unmarshal(data, &state); err != nil || state.ID != id || !strings.HasPrefix(state.Bundle, f.Run()) || (state.Pid > 0) == (name == "poststop") {
				t.Errorf("%s: %v: %s", name, err, data)
			}
			env, err := os.ReadFile(filepath.Join(dir, name+".env"))
			must(t, err)
			// CVE-2025-23266: neither the image's, nor the daemon's.
			if text := string(env); strings.Contains(text, "LD_PRELOAD") || strings.Contains(text, "SECRET") || strings.Contains(text, "HOME=") || !strings.Contains(text, "PATH=") {
				t.Errorf("%s has the environment %q", name, text)
			}
			if times, err := os.ReadFile(filepath.Join(dir, name+".times")); err != nil || string(times) != "x\n" {
				t.Errorf("%s has run %d times, %v", name, len(times)/2, err)
			}
		}
	}},
	{"a hook that fails undoes the container", func(t *testing.T, f *fields) {
		dir := f.volume(t)
		cdiDevice(t, f.CDIStatic(), "fails", `{"hooks":[`+hook(f, "createRuntime", "echo no such GPU >&2; exit 3", "")+`,`+hook(f, "poststop", "echo x >> "+dir+"/stopped", "")+`]}`)
		p := f.pod(t, plainPod)
		_, err := f.CRI.Start(t.Context(), p.id, p.cfg, f.ctr("true", withCDI("fails")))
		if err == nil || !strings.Contains(err.Error(), "no such GPU") {
			t.Errorf("error %v", err)
		}
		if text, err := os.ReadFile(dir + "/stopped"); err != nil || string(text) != "x\n" {
			t.Errorf("poststop: %q, %v", text, err)
		}
	}},
	{"a hook that hangs ends", func(t *testing.T, f *fields) {
		cdiDevice(t, f.CDIStatic(), "hangs", `{"hooks":[`+hook(f, "createRuntime", "exec sleep 86399", `,"timeout":1`)+`]}`)
		p := f.pod(t, plainPod)
		if _, err := f.CRI.Start(t.Context(), p.id, p.cfg, f.ctr("true", withCDI("hangs"))); err == nil || !strings.Contains(err.Error(), "timeout") {
			t.Errorf("error %v", err)
		}
		f.says(t, p, f.ctr("echo the pod goes on"), "the pod goes on\n")
	}},
	{"a poststop hook that hangs, fails or leaves children", func(t *testing.T, f *fields) {
		dir := f.volume(t)
		cdiDevice(t, f.CDIStatic(), "late", `{"hooks":[`+hook(f, "poststop", "exec sleep 86399", `,"timeout":1`)+`,`+
			hook(f, "poststop", "exit 1", "")+`,`+hook(f, "poststop", "sleep 3 & echo x > "+dir+"/last", "")+`]}`)
		f.says(t, f.pod(t, plainPod), f.ctr("echo runs", withCDI("late")), "runs\n")
		// The container goes with this case; the last hook has run by then.
		t.Cleanup(func() {
			if _, err := os.Stat(dir + "/last"); err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(func() {
			list, err := f.CRI.ListContainers(context.Background(), &runtimeapi.ListContainersRequest{})
			if err != nil {
				t.Error(err)
			}
			for _, c := range list.GetContainers() {
				f.remove(t, c.Id)
			}
		})
	}},
	{"poststop after a new daemon", func(t *testing.T, f *fields) {
		dir := f.volume(t)
		cdiDevice(t, f.CDIStatic(), "later", `{"hooks":[`+hook(f, "poststop", "echo x >> "+dir+"/stopped", "")+`]}`)
		p := f.newPod(t, plainPod, nil)
		id := f.start(t, p, f.idleWith(withCDI("later")))
		must(t, f.KillBerth())
		must(t, f.StartBerth(t.Context()))
		f.remove(t, id)
		if text, err := os.ReadFile(dir + "/stopped"); err != nil || string(text) != "x\n" {
			t.Errorf("%q, %v", text, err)
		}
	}},
}

// touched makes an empty file and returns its path.
func touched(path string) string {
	_ = os.WriteFile(path, nil, 0o644)
	return path
}

// sortLast sorts the words of the last line, which groups of a process are: their order is the kernel's.
func sortLast(text string) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	words := strings.Fields(lines[len(lines)-1])
	slices.Sort(words)
	lines[len(lines)-1] = strings.Join(words, " ")
	return strings.Join(lines, "\n") + "\n"
}
