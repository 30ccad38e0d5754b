//go:build integration

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// toolNode drives `berth images` and `berth registry` as an operator does.
type toolNode struct{ *lab.Node }

// try runs a tool: what it prints, and its exit code.
func (n toolNode) try(t *testing.T, args ...string) (out, errs string, code int) {
	t.Helper()
	cmd := n.Tool(t.Context(), args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	} else {
		must(t, err)
	}
	return o.String(), e.String(), code
}

// run wants it to succeed.
func (n toolNode) run(t *testing.T, args ...string) string {
	t.Helper()
	out, errs, code := n.try(t, args...)
	if code != 0 {
		t.Fatalf("berth %s: exit code %d: %s", strings.Join(args, " "), code, errs)
	}
	return strings.TrimSpace(out)
}

func (n toolNode) inspect(t *testing.T, into any, args ...string) {
	t.Helper()
	must(t, json.Unmarshal([]byte(n.run(t, append(args, "--output", "json")...)), into))
}

// spooled wants so many files of work under way.
func (n toolNode) spooled(want int) error {
	entries, err := os.ReadDir(filepath.Join(n.Root(), "images", "tmp"))
	if err == nil && len(entries) != want {
		err = fmt.Errorf("%d files are there, want %d", len(entries), want)
	}
	return err
}

// metrics scrapes the daemon's admin socket.
func (n toolNode) metrics(t *testing.T) string {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", n.AdminSocket())
	}}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://berth/metrics", nil)
	must(t, err)
	resp, err := c.Do(req)
	must(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	must(t, err)
	return string(text)
}

// TestImagesTool walks an operator's way through `berth images` and `berth registry`, beside crictl on the same store.
func TestImagesTool(t *testing.T) {
	n := toolNode{startNode(t, lab.Options{Tools: tools, Log: t.Logf, Serve: []string{"--when-registry-down", "local"}})}
	if n.Foreign() {
		t.Skip("another runtime has other tools")
	}
	ctx := t.Context()

	id := n.run(t, "images", "pull", testimages.Busybox) // by hosts.toml, as the kubelet's pulls (containerd#8053)
	t.Run("pull and list show what crictl shows", func(t *testing.T) {
		var list struct {
			Images []struct {
				ID       string
				RepoTags []string
			}
		}
		n.inspect(t, &list, "images", "list")
		crictl := crictlNode(n).run(t, "images", "-q", "--no-trunc")
		if len(list.Images) != 1 || list.Images[0].ID != id || crictl != id || list.Images[0].RepoTags[0] != testimages.Busybox {
			t.Errorf("%s was pulled, crictl lists %s, berth images list %+v", id, crictl, list)
		}
		if got := n.run(t, "images", "list", "-q", "busybox"); got != id {
			t.Errorf("list -q busybox: %s", got)
		}
	})

	t.Run("progress is lines where there is no terminal", func(t *testing.T) {
		_, errs, code := n.try(t, "images", "pull", testimages.Httpd)
		if code != 0 || !strings.HasSuffix(errs, " on disk\n") || strings.Contains(errs, "\x1b") {
			t.Errorf("exit code %d: %s", code, errs)
		}
		if got := n.run(t, "images", "pulls"); strings.Count(got, "\n") != 0 {
			t.Errorf("pulls under way afterwards: %s", got)
		}
	})

	t.Run("archives", func(t *testing.T) {
		httpd := n.run(t, "images", "pull", "-q", testimages.Httpd)
		tar, dir := filepath.Join(n.Dir, "httpd.tar"), filepath.Join(n.Dir, "layout")
		n.run(t, "images", "export", "--file", tar, testimages.Httpd)
		n.run(t, "images", "export", "--dir", dir, testimages.Httpd)
		for _, from := range []string{tar, dir} {
			n.run(t, "images", "remove", testimages.Httpd)
			if got, want := n.run(t, "images", "import", from), "imported "+testimages.Httpd+" ("+httpd+")"; got != want {
				t.Errorf("import: %q, want %q", got, want)
			}
			// What was imported is pinned, and the kubelet is told so.
			if got := crictlNode(n).run(t, "inspecti", "-o", "go-template", "--template", "{{.status.pinned}}", testimages.Httpd); got != "true" {
				t.Errorf("crictl says pinned: %s", got)
			}
			if _, errs, code := n.try(t, "images", "remove", testimages.Httpd); code != 1 || !strings.Contains(errs, "pinned") {
				t.Errorf("remove of what is pinned: exit code %d: %s", code, errs)
			}
			if from == dir {
				if got, want := n.run(t, "images", "unpin", testimages.Httpd), "unpinned "+testimages.Httpd+" ("+httpd+")"; got != want {
					t.Errorf("unpin: %q, want %q", got, want)
				}
				if got := crictlNode(n).run(t, "inspecti", "-o", "go-template", "--template", "{{.status.pinned}}", testimages.Httpd); got != "false" {
					t.Errorf("crictl says of what is unpinned, pinned: %s", got)
				}
				n.run(t, "images", "remove", testimages.Httpd)
			} else {
				n.run(t, "images", "remove", "--force", testimages.Httpd)
			}
			n.run(t, "images", "pull", "-q", testimages.Httpd)
		}
		// An import whose client is killed leaves nothing.
		before := n.run(t, "images", "list", "-q")
		cmd := n.Tool(ctx, "images", "import", "-")
		in, err := cmd.StdinPipe()
		must(t, err)
		must(t, cmd.Start())
		data, err := os.ReadFile(tar)
		must(t, err)
		_, err = in.Write(data[:len(data)/2])
		must(t, err)
		must(t, lab.Eventually(ctx, 20*time.Second, "the archive is spooled", func(context.Context) error { return n.spooled(1) }))
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		must(t, lab.Eventually(ctx, 20*time.Second, "it is gone", func(context.Context) error { return n.spooled(0) }))
		if got := n.run(t, "images", "list", "-q"); got != before {
			t.Errorf("images are %q, were %q", got, before)
		}
		if got := n.run(t, "images", "verify", "--deep"); !strings.HasSuffix(got, ": 0 findings") {
			t.Errorf("verify: %s", got)
		}
	})

	t.Run("a container's image stays", func(t *testing.T) {
		pod := n.Pod("uses")
		podID, err := n.CRI.RunPod(ctx, pod)
		must(t, err)
		ctr, err := n.CRI.Start(ctx, podID, pod, lab.Sleeper("c"))
		must(t, err)
		_, errs, code := n.try(t, "images", "remove", testimages.Busybox)
		if code != 1 || !strings.Contains(errs, "in use by container "+ctr[:13]) || strings.Count(errs, "\n") != 1 {
			t.Errorf("remove: exit code %d: %q", code, errs)
		}
		var d struct{ Containers []string }
		n.inspect(t, &d, "images", "inspect", id)
		if len(d.Containers) != 1 || d.Containers[0] != ctr {
			t.Errorf("inspect: containers are %q, want %s", d.Containers, ctr)
		}
		must(t, n.CRI.RemovePod(ctx, podID))
		if got := n.run(t, "images", "remove", testimages.Busybox); !strings.Contains(got, id) {
			t.Errorf("remove without the container: %q", got)
		}
		if got := crictlNode(n).run(t, "images", "-q", "--no-trunc"); strings.Contains(got, id) {
			t.Errorf("crictl still lists %s", got)
		}
	})

	t.Run("registry explain", func(t *testing.T) {
		var e struct {
			Hosts []struct {
				URL, File, Answer string
				Line              int
				OK                bool
			}
		}
		n.inspect(t, &e, "registry", "explain", testimages.Busybox)
		file := filepath.Join(n.CertsD(), "registry.k8s.io", "hosts.toml")
		if len(e.Hosts) != 2 || e.Hosts[0].File != file || e.Hosts[0].Line != 3 || e.Hosts[1].Line != 1 || !e.Hosts[0].OK {
			t.Errorf("%+v, want line 3 and then line 1 of %s", e.Hosts, file)
		}
	})

	t.Run("the local image while the registry is down", func(t *testing.T) {
		file := filepath.Join(n.CertsD(), "registry.k8s.io", "hosts.toml")
		was, err := os.ReadFile(file)
		must(t, err)
		must(t, os.WriteFile(file, []byte("server = \"http://127.0.0.1:1\"\n"), 0o644))
		defer func() { must(t, os.WriteFile(file, was, 0o644)) }()
		if got := n.run(t, "images", "pull", testimages.Httpd); !strings.HasPrefix(got, "sha256:") {
			t.Errorf("pull: %q", got)
		}
		if _, errs, code := n.try(t, "images", "pull", testimages.Nginx); code != 1 || !strings.Contains(errs, "127.0.0.1:1") {
			t.Errorf("pull of what is not here: exit code %d: %s", code, errs)
		}
		m := n.metrics(t)
		for _, want := range []string{"berth_image_pulls_local_total 1\n", `berth_image_pulls_total{result="failed"} 1` + "\n"} {
			if !strings.Contains(m, want) {
				t.Errorf("metrics have no %q:\n%s", want, m)
			}
		}
		if log := n.Berth.Tail(50); !strings.Contains(log, "level=WARN") || !strings.Contains(log, testimages.Httpd) {
			t.Errorf("no warning in the log:\n%s", log)
		}
	})

	t.Run("a pull that lasts is in the log", func(t *testing.T) {
		reg := imagestest.NewRegistry(t)
		reg.Push("slow", "1", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "x"))))
		gate := make(chan struct{})
		reg.Hook(func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				<-gate
			}
			return false
		})
		ref, done := reg.Host()+"/slow:1", make(chan error, 1)
		go func() {
			_, err := n.CRI.Pull(ctx, ref)
			done <- err
		}()
		// Every ten seconds, of pulls that are as old as that.
		err := lab.Eventually(ctx, 60*time.Second, "the line is in the log", func(context.Context) error {
			for line := range strings.Lines(n.Berth.Tail(50)) {
				if strings.Contains(line, `msg="image is being pulled"`) && strings.Contains(line, "image="+ref) && strings.Contains(line, "layersHere=0") {
					return nil
				}
			}
			return errors.New("it is not")
		})
		close(gate)
		must(t, errors.Join(err, <-done))
	})

	t.Run("exit codes", func(t *testing.T) {
		if _, errs, code := n.try(t, "images", "lst"); code != 2 || strings.Count(errs, "\n") != 1 {
			t.Errorf("a wrong command: exit code %d: %s", code, errs)
		}
		cmd := n.Tool(ctx, "images", "list", "--address", "/no/such/socket")
		out, err := cmd.CombinedOutput()
		if err == nil || cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "is berth serve running? tried /no/such/socket") {
			t.Errorf("no daemon: %v: %s", err, out)
		}
	})

	t.Run("CVE-2020-15257: nobody else may", func(t *testing.T) {
		for path, want := range map[string]os.FileMode{"admin": 0o700, "admin/admin.sock": 0o600} {
			info, err := os.Stat(filepath.Join(n.Run(), path))
			must(t, err)
			if got := info.Mode().Perm(); got != want {
				t.Errorf("%s has mode %04o, want %04o", path, got, want)
			}
		}
		// A copy that nobody may execute, too.
		program := filepath.Join(n.Dir, "berth")
		data, err := os.ReadFile(n.Tool(ctx).Path)
		must(t, err)
		must(t, os.WriteFile(program, data, 0o755))
		cmd := exec.CommandContext(ctx, program, "images", "list", "--run", n.Run())
		cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "permission denied") {
			t.Errorf("as nobody: %v: %s", err, out)
		}
	})
}
