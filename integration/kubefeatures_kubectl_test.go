//go:build integration

package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

var kubectlFeatures = []kubeFeature{
	{"kubectl exec", func(t *testing.T, n kubeNode) { overBoth(t, n, kubectlExec) }},
	{"kubectl attach", func(t *testing.T, n kubeNode) { overBoth(t, n, kubectlAttach) }},
	{"kubectl port-forward", func(t *testing.T, n kubeNode) { overBoth(t, n, kubectlPortForward) }},
	{"kubectl cp of a large tree", kubectlCopy},
	{"kubectl logs -f", kubectlLogs},
}

// stream is a protocol that kubectl speaks: what it is told in its environment, and a name for pods.
type stream struct {
	name string
	env  []string
}

// overBoth runs a test over WebSocket and over SPDY.
func overBoth(t *testing.T, n kubeNode, run func(*testing.T, kubeNode, stream)) {
	for _, s := range []stream{
		{"websocket", []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true", "KUBECTL_PORT_FORWARD_WEBSOCKETS=true"}},
		{"spdy", []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", "KUBECTL_PORT_FORWARD_WEBSOCKETS=false"}},
	} {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			run(t, n, s)
		})
	}
}

// kubectl is a command that ends with the test, at the latest after a while.
func (n kubeNode) kubectl(t *testing.T, s stream, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(t.Context(), 2*soon)
	t.Cleanup(cancel)
	cmd := n.cp.KubectlCommand(ctx, args...)
	cmd.Env = append(cmd.Env, s.env...)
	return cmd
}

// kubectlExec sends four megabytes through a container and back, and wants both outputs and the exit code apart.
func kubectlExec(t *testing.T, n kubeNode, s stream) {
	name := "exec-" + s.name
	n.apply(t, name, `
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: `+sleeper+`}
`, lab.Running)
	sent := make([]byte, 4<<20)
	fill(1, sent)
	cmd := n.kubectl(t, s, "exec", "-i", name, "--", "sh", "-c", "cat; echo to stderr >&2; exit 3")
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(sent), &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("kubectl exec: %v, want exit code 3: %s", err, errs.String())
	}
	if !bytes.Equal(out.Bytes(), sent) {
		t.Errorf("%d bytes came back of %d, or others", out.Len(), len(sent))
	}
	if got := errs.String(); got != "to stderr\ncommand terminated with exit code 3\n" {
		t.Errorf("standard error is %q", got)
	}
}

// kubectlAttach talks with a shell that reads its standard input until that ends.
func kubectlAttach(t *testing.T, n kubeNode, s stream) {
	name := "attach-" + s.name
	n.apply(t, name, `
  restartPolicy: Never
  containers:
  - name: c
    image: `+testimages.Busybox+`
    stdin: true
    stdinOnce: true
    command: [sh, -c, "while read line; do echo you said $line; done; echo bye; exit 4"]
`, lab.Running)
	cmd := n.kubectl(t, s, "attach", "-i", name)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	must(t, cmd.Start())
	lines := bufio.NewReader(out)
	for _, word := range []string{"one", "two"} {
		_, err := fmt.Fprintln(in, word)
		must(t, err)
		if got, err := lines.ReadString('\n'); err != nil || got != "you said "+word+"\n" {
			t.Fatalf("read %q: %v: %s", got, err, errs.String())
		}
	}
	must(t, in.Close())
	rest, err := io.ReadAll(lines)
	if err != nil || string(rest) != "bye\n" {
		t.Errorf("at the end: %q: %v", rest, err)
	}
	_ = cmd.Wait() // its exit code is kubectl's own affair; the container's is in the status
	n.wait(t, name, func(p *lab.Pod) error {
		if end := p.Container("c").State.Terminated; end == nil || end.ExitCode != 4 {
			return errors.New("want it ended with 4")
		}
		return nil
	})
}

// kubectlPortForward asks a server that listens on the pod's loopback only, twice over one forwarding.
func kubectlPortForward(t *testing.T, n kubeNode, s stream) {
	name := "forward-" + s.name
	n.apply(t, name, `
  containers:
  - {name: c, image: "`+testimages.Httpd+`", command: [httpd, -f, -p, "127.0.0.1:8080", -h, /srv]}
`, lab.Running)
	cmd := n.kubectl(t, s, "port-forward", "--address", "127.0.0.1", "pod/"+name, ":8080")
	out, err := cmd.StdoutPipe()
	must(t, err)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	must(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	var port int
	if _, scan := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d", &port); err != nil || scan != nil {
		t.Fatalf("kubectl port-forward says %q: %v: %s", line, err, errs.String())
	}
	for range 2 {
		must(t, eventually(t, fmt.Sprintf("http://127.0.0.1:%d/", port)))
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
}

// kubectlLogs follows a log over the end of its container.
func kubectlLogs(t *testing.T, n kubeNode) {
	const name = "follow"
	dir := filepath.Join(n.Dir, "follow")
	must(t, os.Mkdir(dir, 0o755))
	n.apply(t, name, `
  restartPolicy: Never
  volumes: [{name: v, hostPath: {path: "`+dir+`"}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: [sh, -c, "echo first; until [ -f /v/go ]; do sleep 0.1; done; for i in $(seq 1 500); do echo line $i; done; printf end"]
    volumeMounts: [{name: v, mountPath: /v}]
`, lab.Running)
	cmd := n.kubectl(t, stream{}, "logs", "-f", name)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := bufio.NewReader(out)
	if got, err := lines.ReadString('\n'); err != nil || got != "first\n" {
		t.Fatalf("read %q: %v", got, err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "go"), nil, 0o644))
	rest, err := io.ReadAll(lines)
	must(t, err)
	must(t, cmd.Wait())
	var want strings.Builder
	for i := 1; i <= 500; i++ {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	if got := string(rest); got != want.String()+"end" {
		t.Errorf("after the first line came %d bytes, ending with %q", len(got), got[max(0, len(got)-40):])
	}
}

// kubectlCopy copies 1,200 files of 120 MB into a container and out again.
func kubectlCopy(t *testing.T, n kubeNode) {
	const name, files, size = "copy", 1200, 100_000
	n.apply(t, name, `
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: `+sleeper+`, volumeMounts: [{name: v, mountPath: /v}]}
`, lab.Running)
	dir, err := os.MkdirTemp(n.Dir, "copy-")
	must(t, err)
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	content := make([]byte, size)
	for i := range files {
		file := filepath.Join(there, fmt.Sprintf("d%d/e%d/file %d", i%10, i%7, i))
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		fill(uint64(i), content)
		must(t, os.WriteFile(file, content, 0o644))
	}
	began := time.Now()
	// The API server can reset a connection to kubectl that it closes while a ping of kubectl's is unread, and what kubectl
	// has not read by then is lost, on a busy machine. Retries go on where the last try ended.
	for _, args := range [][]string{{"cp", there, name + ":/v/tree"}, {"cp", "--retries", "10", name + ":/v/tree", back}} {
		cmd := n.kubectl(t, stream{}, args...)
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("kubectl %v: %v: %s", args, err, text)
		}
		t.Logf("kubectl %s %s: after %v", args[0], args[1], time.Since(began).Round(time.Millisecond))
	}
	sent, err := treeSum(there)
	must(t, err)
	got, err := treeSum(back)
	must(t, err)
	if sent != got {
		t.Errorf("what came back is not what was sent: %s, sent %s", got, sent)
	}
	must(t, os.RemoveAll(dir))
}

// fill is content that does not compress and is the same for the same seed.
func fill(seed uint64, p []byte) {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	_, _ = rand.NewChaCha8(key).Read(p) // never fails
}

// treeSum is a digest of the names and contents of all files below a directory, with their number.
func treeSum(dir string) (string, error) {
	sum, files := sha256.New(), 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		fmt.Fprintf(sum, "%s %d\n", strings.TrimPrefix(path, dir), len(data))
		sum.Write(data)
		return nil
	})
	return fmt.Sprintf("%d files, %x", files, sum.Sum(nil)), err
}
