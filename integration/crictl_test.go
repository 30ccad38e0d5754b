//go:build integration

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// crictlNode drives a node as a person does.
type crictlNode struct{ *lab.Node }

// run runs crictl and wants it to succeed.
func (n crictlNode) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.Crictl(t.Context(), args...)
	must(t, err)
	return strings.TrimSpace(out)
}

// file writes a configuration as crictl reads it.
func (n crictlNode) file(t *testing.T, message any) string {
	t.Helper()
	text, err := json.Marshal(message) // crictl reads enumerations as numbers, as encoding/json writes them
	must(t, err)
	f, err := os.CreateTemp(t.TempDir(), "*.json")
	must(t, err)
	_, err = f.Write(text)
	must(t, err)
	must(t, f.Close())
	return f.Name()
}

// inspect reads one of crictl's JSON outputs.
func (n crictlNode) inspect(t *testing.T, into any, args ...string) {
	t.Helper()
	must(t, json.Unmarshal([]byte(n.run(t, args...)), into))
}

// TestCrictl walks the README's way: pull, run, look, exec, attach, forward, log, stop, remove.
func TestCrictl(t *testing.T) {
	n := crictlNode{newNode(t)}
	ctx := t.Context()
	n.run(t, "pull", testimages.Busybox)
	n.run(t, "pull", testimages.Httpd)
	n.run(t, "update-runtime-config", "--pod-cidr", "10.1.0.0/24")
	ledger(t, n.Node)

	pod := n.Pod("web")
	podID := n.run(t, "runp", n.file(t, pod))
	t.Cleanup(func() { _, _ = n.Crictl(context.Background(), "rmp", "-f", podID) }) // if the test ends early
	create := func(name string, edit func(*runtimeapi.ContainerConfig)) string {
		c := lab.Sleeper(name)
		if edit != nil {
			edit(c)
		}
		id := n.run(t, "create", podID, n.file(t, c), n.file(t, pod))
		n.run(t, "start", id)
		return id
	}
	web := create("httpd", func(c *runtimeapi.ContainerConfig) { c.Image.Image, c.Command = testimages.Httpd, nil })
	shell := create("shell", func(c *runtimeapi.ContainerConfig) {
		c.Command = []string{"sh", "-c", "while read -r line; do echo got $line; done"}
		c.Stdin = true
	})

	t.Run("pods and containers are listed and inspected", func(t *testing.T) {
		if got := n.run(t, "pods", "-q", "--state", "ready", "--name", "web", "--no-trunc"); got != podID {
			t.Errorf("pods: %q, want %q", got, podID)
		}
		if got := strings.Fields(n.run(t, "ps", "-q", "--no-trunc", "--pod", podID)); len(got) != 2 {
			t.Errorf("ps: %q", got)
		}
		var c struct {
			Status struct{ State string }
			Info   struct {
				Pid         int
				RuntimeSpec struct {
					Process struct {
						Args            []string
						NoNewPrivileges bool
					}
					Linux struct{ Namespaces []struct{ Type, Path string } }
				}
			}
		}
		n.inspect(t, &c, "inspect", "-o", "json", web)
		if c.Status.State != "CONTAINER_RUNNING" || c.Info.Pid < 2 {
			t.Errorf("inspect: %+v", c)
		}
		if got := strings.Join(c.Info.RuntimeSpec.Process.Args, " "); got != "/bin/start-httpd" {
			t.Errorf("info.runtimeSpec has process.args %q", got)
		}
		if len(c.Info.RuntimeSpec.Linux.Namespaces) < 5 {
			t.Errorf("info.runtimeSpec has namespaces %v", c.Info.RuntimeSpec.Linux.Namespaces)
		}
	})

	t.Run("the pod's address serves", func(t *testing.T) {
		ip, err := n.CRI.PodIP(ctx, podID)
		must(t, err)
		must(t, eventually(t, "http://"+ip+"/"))
	})

	t.Run("exec", func(t *testing.T) {
		if got := n.run(t, "exec", "-s", web, "echo", "sync"); got != "sync" {
			t.Errorf("exec -s: %q", got)
		}
		for _, transport := range []string{"spdy", "websocket"} {
			cmd := n.CrictlCommand(ctx, "exec", "--transport", transport, "-i", web, "sh", "-c", "cat; echo oops >&2; exit 7")
			cmd.Stdin = strings.NewReader("through\n")
			var out, errs bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			err := cmd.Run()
			if out.String() != "through\n" || !strings.Contains(errs.String(), "oops") {
				t.Errorf("exec over %s: stdout %q, stderr %q", transport, out.String(), errs.String())
			}
			if err == nil || !strings.Contains(errs.String(), "7") {
				t.Errorf("exec over %s: exit code 7 became %v: %s", transport, err, errs.String())
			}
		}
	})

	t.Run("attach", func(t *testing.T) {
		for _, transport := range []string{"spdy", "websocket"} {
			cmd := n.CrictlCommand(ctx, "attach", "--transport", transport, "-i", shell)
			in, err := cmd.StdinPipe()
			must(t, err)
			out, err := cmd.StdoutPipe()
			must(t, err)
			must(t, cmd.Start())
			_, err = fmt.Fprintf(in, "%s\n", transport)
			must(t, err)
			got := make([]byte, len("got "+transport+"\n"))
			_, err = io.ReadFull(out, got)
			if err != nil || string(got) != "got "+transport+"\n" {
				t.Errorf("attach over %s: %q (%v)", transport, got, err)
			}
			must(t, cmd.Process.Signal(syscall.SIGKILL)) // the client goes, the container stays
			_ = cmd.Wait()
		}
		status, err := n.CRI.ContainerState(ctx, shell)
		must(t, err)
		if status.State.String() != "CONTAINER_RUNNING" {
			t.Errorf("after its clients went the container is %v", status.State)
		}
	})

	t.Run("port-forward", func(t *testing.T) {
		for i, transport := range []string{"spdy", "websocket"} {
			port := 23000 + 2*n.Index + i
			cmd := n.CrictlCommand(ctx, "port-forward", "--transport", transport, podID, fmt.Sprintf("%d:80", port))
			must(t, cmd.Start())
			err := lab.Eventually(ctx, 20*time.Second, "page through "+transport, func(ctx context.Context) error {
				return wantPage(ctx, fmt.Sprintf("http://127.0.0.1:%d/", port), "It works!")
			})
			if err != nil {
				t.Error(err)
			}
			must(t, cmd.Process.Kill())
			_ = cmd.Wait()
		}
	})

	t.Run("logs and stats", func(t *testing.T) {
		if got := n.run(t, "logs", web); !strings.HasPrefix(got, "httpd starting") {
			t.Errorf("logs: %q", got)
		}
		var stats struct {
			Stats []struct {
				Memory struct{ WorkingSetBytes struct{ Value string } }
			}
		}
		n.inspect(t, &stats, "stats", "-o", "json", "--id", web)
		if len(stats.Stats) != 1 || len(stats.Stats[0].Memory.WorkingSetBytes.Value) < 5 {
			t.Errorf("stats: %+v", stats)
		}
	})

	t.Run("statistics and metrics of pods", func(t *testing.T) {
		var stats struct {
			Stats []struct {
				Attributes struct{ ID string }
				Linux      struct {
					Process struct{ ProcessCount struct{ Value string } }
				}
			}
		}
		n.inspect(t, &stats, "statsp", "-o", "json", "--id", podID)
		if len(stats.Stats) != 1 || stats.Stats[0].Attributes.ID != podID || stats.Stats[0].Linux.Process.ProcessCount.Value == "" {
			t.Errorf("statsp: %+v", stats)
		}
		if got := n.run(t, "metricdescs"); !strings.Contains(got, "container_memory_usage_bytes") {
			t.Errorf("metricdescs: %.200q", got)
		}
		if got := n.run(t, "metricsp"); !strings.Contains(got, podID) || !strings.Contains(got, "container_memory_usage_bytes") {
			t.Errorf("metricsp: %.200q", got)
		}
	})

	t.Run("update", func(t *testing.T) {
		n.run(t, "update", "--memory", "104857600", shell)
		status, err := n.CRI.ContainerState(ctx, shell)
		must(t, err)
		if got := status.GetResources().GetLinux().GetMemoryLimitInBytes(); got != 100<<20 {
			t.Errorf("the memory limit is %d", got)
		}
	})

	t.Run("what the runtime is", func(t *testing.T) {
		var info struct {
			Status struct{ Conditions []struct{ Type string } }
			Config map[string]any
		}
		n.inspect(t, &info, "info")
		if len(info.Status.Conditions) != 3 || info.Config["root"] != n.Root() || info.Config["cgroupDriver"] != "cgroupfs" {
			t.Errorf("info: %+v", info)
		}
		if got := n.run(t, "runtime-config"); !strings.Contains(strings.ToLower(got), "cgroupfs") {
			t.Errorf("runtime-config: %q", got)
		}
		if got := n.run(t, "info"); !strings.Contains(got, "10.1.0.0/24") {
			t.Errorf("info has no pod CIDR: %s", got)
		}
	})

	t.Run("events", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute) // an event that does not come must not hold the test up
		defer cancel()
		cmd := n.CrictlCommand(ctx, "events", "-o", "json")
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
		// It may not have subscribed yet: what it misses by that is kept for it, since nobody else reads.
		id := create("eventful", nil)
		n.run(t, "stop", "--timeout", "30", id)
		n.run(t, "rm", id)
		events := json.NewDecoder(out)
		for _, typ := range []string{"CREATED", "STARTED", "STOPPED", "DELETED"} {
			for {
				var e struct{ ContainerID, ContainerEventType string }
				if err := events.Decode(&e); err != nil {
					t.Fatalf("no %s event: %v", typ, err)
				}
				if e.ContainerID == id {
					if e.ContainerEventType != "CONTAINER_"+typ+"_EVENT" {
						t.Fatalf("%s where %s is due", e.ContainerEventType, typ)
					}
					break
				}
			}
		}
	})

	t.Run("stop and remove", func(t *testing.T) {
		n.run(t, "stop", "--timeout", "1", shell)
		n.run(t, "rm", shell)
		n.run(t, "stopp", podID)
		var c struct {
			Status struct {
				State    string
				ExitCode int
			}
		}
		n.inspect(t, &c, "inspect", "-o", "json", web)
		if c.Status.State != "CONTAINER_EXITED" {
			t.Errorf("after stopp: %+v", c.Status)
		}
		n.run(t, "rmp", podID)
		if got := n.run(t, "pods", "-q") + n.run(t, "ps", "-a", "-q"); got != "" {
			t.Errorf("left: %s", got)
		}
	})
}

// TestExamplesForCrictl runs the files of examples/crictl as README.md does.
func TestExamplesForCrictl(t *testing.T) {
	n := crictlNode{newNode(t)}
	if n.Foreign() {
		t.Skip("another runtime knows no mirror of docker.io")
	}
	n.run(t, "pull", "docker.io/library/busybox:1.37")
	ledger(t, n.Node)
	root, err := lab.RepoRoot()
	must(t, err)
	text, err := os.ReadFile(filepath.Join(root, "examples/crictl/pod.yaml"))
	must(t, err)
	// Only the place of the logs differs: a test writes nothing to /var/log.
	logs := filepath.Join(n.Dir, "logs", "hello")
	here := regexp.MustCompile(`(?m)^log_directory: .*$`).ReplaceAll(text, []byte("log_directory: "+logs))
	if bytes.Equal(here, text) {
		t.Fatal("examples/crictl/pod.yaml has no log_directory")
	}
	pod := filepath.Join(t.TempDir(), "pod.yaml")
	must(t, os.WriteFile(pod, here, 0o644))

	podID := n.run(t, "runp", pod)
	t.Cleanup(func() { _, _ = n.Crictl(context.Background(), "rmp", "-f", podID) }) // if the test ends early
	id := n.run(t, "create", podID, filepath.Join(root, "examples/crictl/container.yaml"), pod)
	n.run(t, "start", id)
	ip, err := n.CRI.PodIP(t.Context(), podID)
	must(t, err)
	must(t, lab.Eventually(t.Context(), soon, "the page", func(ctx context.Context) error {
		return wantPage(ctx, "http://"+ip+":8080/", "hello from berth")
	}))
	if got := n.run(t, "exec", "-s", id, "id", "-u"); got != "65534" {
		t.Errorf("user %q", got)
	}
	must(t, lab.Eventually(t.Context(), soon, "its log", func(ctx context.Context) error {
		got, err := n.CrictlCommand(ctx, "logs", id).CombinedOutput() // it was written to standard error
		if err == nil && !strings.Contains(string(got), "response:200") {
			err = fmt.Errorf("%q", got)
		}
		return err
	}))
	n.run(t, "rmp", "-f", podID)
}

// TestPullByDigest is critest's case of that name, with a digest of the images made here.
func TestPullByDigest(t *testing.T) {
	n := crictlNode{newNode(t)}
	digest := manifestDigest(t, n.Registry, "k8s-staging-cri-tools/test-image-digest", "test")
	ref := "gcr.io/k8s-staging-cri-tools/test-image-digest@" + digest
	n.run(t, "pull", ref)
	var image struct {
		Status struct {
			ID                    string
			RepoTags, RepoDigests []string
		}
	}
	n.inspect(t, &image, "inspecti", "-o", "json", ref)
	if len(image.Status.RepoTags) != 0 || len(image.Status.RepoDigests) != 1 || image.Status.RepoDigests[0] != ref {
		t.Errorf("image: %+v", image.Status)
	}
	n.run(t, "rmi", ref)
	if out, err := n.Crictl(t.Context(), "inspecti", ref); err == nil {
		t.Errorf("after removal the image is there: %s", out)
	}
	if out, err := n.Crictl(t.Context(), "pull", "gcr.io/k8s-staging-cri-tools/test-image-digest@sha256:"+strings.Repeat("0", 64)); err == nil {
		t.Errorf("an image with a digest that the registry has not was pulled: %s", out)
	}
}

// TestNetworkBecomesReadyWithoutRestart takes the network configuration away and puts it back.
func TestNetworkBecomesReadyWithoutRestart(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("the configuration of another runtime is not ours to change")
	}
	ledger(t, n)
	ctx := t.Context()
	file := filepath.Join(n.CNIConf(), "10-lab.conflist")
	must(t, os.Remove(file))
	err := lab.Eventually(ctx, 20*time.Second, "NetworkReady is false, with a reason", func(ctx context.Context) error {
		err := n.CRI.Ready(ctx)
		if err == nil || !strings.Contains(err.Error(), "NetworkReady") || !strings.Contains(err.Error(), n.CNIConf()) {
			return fmt.Errorf("status: %w", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	pod := n.Pod("early")
	if id, err := n.CRI.RunPod(ctx, pod); err == nil {
		t.Errorf("a pod started without a network: %s", id)
		must(t, n.CRI.RemovePod(ctx, id))
	}
	must(t, os.WriteFile(file, []byte(n.Conflist()), 0o644))
	must(t, lab.Eventually(ctx, 20*time.Second, "NetworkReady is true", n.CRI.Ready))
	id, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	must(t, n.CRI.RemovePod(ctx, id))
}

// TestSecondDaemonIsRefused starts `berth serve` twice on the same roots: the second names the first's process.
func TestSecondDaemonIsRefused(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	root, err := lab.RepoRoot()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), filepath.Join(root, "bin/berth"), "serve", "--cadvisor-socket", "disabled", "--root", n.Root(), "--run", n.Run(),
		"--socket", filepath.Join(n.Dir, "second.sock"), "--cni-conf", n.CNIConf(), "--cni-bin", n.Tools.CNI)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprint(n.Berth.PID())) {
		t.Errorf("%v: %s; want an error that names process %d", err, out, n.Berth.PID())
	}
	if lines := strings.Count(strings.TrimSpace(string(out)), "\n") + 1; lines != 1 {
		t.Errorf("the error has %d lines:\n%s", lines, out)
	}
	must(t, n.CRI.Ready(t.Context()))
}

// wantPage wants a page with that text.
func wantPage(ctx context.Context, url, want string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err == nil && !strings.Contains(string(body), want) {
		err = fmt.Errorf("%s: page %q", url, body)
	}
	return err
}

// manifestDigest asks the registry for the digest behind a tag.
func manifestDigest(t *testing.T, registry, repo, tag string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodHead, fmt.Sprintf("http://%s/v2/%s/manifests/%s", registry, repo, tag), nil)
	must(t, err)
	req.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json")
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	_ = resp.Body.Close()
	digest := resp.Header.Get("Docker-Content-Digest")
	if digest == "" {
		t.Fatalf("the registry tells no digest of %s:%s: %s", repo, tag, resp.Status)
	}
	return digest
}
