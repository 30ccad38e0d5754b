//go:build integration

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// Environment variables of fail points in shims: the daemon hands them on (cri/pods/launch.go).
const (
	envShimKill = "BERTH_SHIM_FAIL_AT"
	envShimList = "BERTH_SHIM_FAIL_LIST"
)

// binDir names a directory of berth and berth-shim other than bin/, for who works on them while others use those.
const binDir = "BERTH_TEST_BIN"

// killNode is a node whose daemon and shims are killed. A bystander lives on it all the time: a pod that nobody touches,
// whose container counts in its log.
type killNode struct {
	*lab.Node

	pod    *runtimeapi.PodSandboxConfig // the bystander
	podID  string
	ticker *ticks
	before lab.Snapshot
	exits  int // how many containers have been made to exit while the daemon was dead
}

// bystanderEnds is the last command of the bystander, which no other container has.
const bystanderEnds = "exit 99"

// newKillNode makes a node with its bystander, and notes what there is then. prepare, if any, is called before the daemon
// is started.
func newKillNode(ctx context.Context, t *testing.T, prepare ...func(*lab.Node) error) (_ *killNode, err error) {
	k, err := newBareNode(ctx, t, func(n *lab.Node) error {
		var errs []error
		for _, p := range prepare {
			errs = append(errs, p(n))
		}
		return errors.Join(errs...)
	})
	if err != nil || k.Foreign() {
		return k, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Close())
		}
	}()
	k.pod = k.Pod("bystander")
	if k.podID, err = k.CRI.RunPod(ctx, k.pod); err != nil {
		return nil, err
	}
	if k.ticker, err = startTicks(ctx, k.Node, k.podID, k.pod, ticking("ticker", bystanderEnds)); err != nil {
		return nil, err
	}
	k.before, err = k.snapshot()
	return k, err
}

// newBareNode makes a node without a bystander. prepare, if it is not nil, is called before the daemon is started.
func newBareNode(ctx context.Context, t *testing.T, prepare func(*lab.Node) error) (_ *killNode, err error) {
	n, err := lab.New(lab.Options{Tools: tools, Bin: os.Getenv(binDir), Log: t.Logf})
	if err != nil {
		return nil, err
	}
	k := &killNode{Node: n}
	if n.Foreign() {
		return k, nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Close())
		}
	}()
	if prepare != nil {
		if err := prepare(n); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(n.StartRegistry(ctx), n.StartBerth(ctx)); err != nil {
		return nil, err
	}
	k.before, err = k.snapshot()
	return k, err
}

// killTestNode makes a node for one test, which skips where fail points cannot be.
func killTestNode(t *testing.T, k *killNode, err error) *killNode {
	t.Helper()
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() && k.Berth != nil {
			t.Logf("from the log of berth serve:\n%s", k.said())
		}
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	if k.Foreign() {
		t.Skip("another runtime cannot be killed here")
	}
	return k
}

// said is what the daemons have logged that is worth reading after a failure: warnings, and the end.
func (k *killNode) said() string {
	all := strings.Split(k.Berth.Tail(5000), "\n")
	end := max(0, len(all)-40)
	var lines []string
	for i, line := range all {
		if i >= end || strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// Close takes the node down; the bystander ends with it.
func (k *killNode) Close() error {
	k.Unarm()
	return k.Node.Close()
}

// Unarm starts a daemon without a fail point, if none runs, so that closing the node can remove what is left.
func (k *killNode) Unarm() {
	if k.Berth == nil || k.Berth.Alive() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_ = k.StartBerth(ctx) // closing tells what that leaves undone
}

// snapshot is the ledger, less what comes and goes by itself: the processes of the bystander, which is looked at otherwise,
// the daemon's exec server, and what other daemons on the machine do below /berth.
func (k *killNode) snapshot() (lab.Snapshot, error) {
	all, err := k.Snapshot()
	for line := range all {
		if strings.HasPrefix(line, "cgroup ") && strings.Contains(line, "/berth/") || strings.HasPrefix(line, "process ") &&
			(strings.HasSuffix(line, ": "+tick) || strings.HasSuffix(line, ": berth-shim exec") || strings.Contains(line, bystanderEnds)) {
			delete(all, line)
		}
	}
	return all, err
}

// settle waits until nothing is there that was not when the node was made.
func (k *killNode) settle(ctx context.Context) error {
	deadline := time.Now().Add(15 * time.Second)
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		// The ledger reads all of /proc, which is not for things that are still on their way out.
		for end := time.Now().Add(5 * time.Second); k.underWay() && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		after, err := k.snapshot()
		if err != nil {
			return err
		}
		var leaks []string
		for line := range after {
			if !k.before[line] {
				leaks = append(leaks, line)
			}
		}
		if len(leaks) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			sort.Strings(leaks)
			return fmt.Errorf("leak:\n  %s", strings.Join(leaks, "\n  "))
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// underWay tells whether there is more in a few directories than the bystander's.
func (k *killNode) underWay() bool {
	most := 0
	if k.podID != "" {
		most = 1
	}
	for _, dir := range []string{"run/pods", "run/containers", "root/images/rootfs", "root/pods", "root/containers"} {
		entries, err := os.ReadDir(filepath.Join(k.Dir, dir))
		if err == nil && len(entries) > most {
			return true
		}
	}
	return false
}

// died waits for the daemon to have killed itself, and tells whether it has.
func (k *killNode) died(within time.Duration) bool {
	select {
	case <-k.Berth.Done():
		return true
	case <-time.After(within):
		return false
	}
}

// unharmed checks that the bystander has neither stopped nor lost a line, and goes on.
func (k *killNode) unharmed(ctx context.Context) error {
	resp, err := k.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: k.podID})
	if err != nil {
		return fmt.Errorf("bystander: %w", err)
	}
	if resp.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return errors.New("the bystander's pod is not ready")
	}
	if err := k.ticker.goesOn(ctx); err != nil {
		return fmt.Errorf("bystander: %w", err)
	}
	return nil
}

// leaver is a container in the bystander's pod that exits on SIGUSR1, with a code of its own.
type leaver struct {
	id   string
	cfg  *runtimeapi.ContainerConfig
	pid  int
	code int32
}

func (k *killNode) newLeaver(ctx context.Context) (*leaver, error) {
	k.exits++
	l := &leaver{code: int32(1 + k.exits%100)}
	l.cfg = lab.Sh("leaver", fmt.Sprintf("trap 'echo last words; exit %d' USR1; echo here; while :; do sleep 0.02; done", l.code))
	l.cfg.Metadata.Attempt = uint32(k.exits)
	l.cfg.LogPath = fmt.Sprintf("leaver/%d.log", k.exits)
	var err error
	if l.id, err = k.CRI.Start(ctx, k.podID, k.pod, l.cfg); err != nil {
		return nil, err
	}
	if l.pid, err = containerPID(ctx, k.Node, l.id); err != nil {
		return nil, err
	}
	// The trap has to be set before the signal comes.
	return l, lab.Eventually(ctx, 10*time.Second, "leaver's first line", func(context.Context) error {
		text, err := os.ReadFile(filepath.Join(k.pod.LogDirectory, l.cfg.LogPath))
		if err == nil && !bytes.Contains(text, []byte("here")) {
			err = errors.New("not there")
		}
		return err
	})
}

// leave has it exit, and waits until it has.
func (l *leaver) leave(ctx context.Context) error {
	if err := syscall.Kill(l.pid, syscall.SIGUSR1); err != nil {
		return fmt.Errorf("leaver: %w", err)
	}
	return awaitEnd(ctx, l.pid)
}

// left checks its exit and its log, and removes it.
func (k *killNode) left(ctx context.Context, l *leaver) error {
	status, err := k.CRI.WaitExit(ctx, l.id, 10*time.Second)
	if err != nil {
		return err
	}
	if status.ExitCode != l.code || status.FinishedAt == 0 || status.Reason == "" {
		return fmt.Errorf("a container that exited with %d while the daemon was dead is told as %d, %q at %d", l.code, status.ExitCode, status.Reason, status.FinishedAt)
	}
	lines, err := lab.Log(k.pod, l.cfg)
	if err != nil {
		return err
	}
	if len(lines) != 2 || lines[1].Text != "last words" {
		return fmt.Errorf("the log of a container that exited while the daemon was dead is %q", lines)
	}
	_, err = k.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: l.id})
	return err
}

// tick is what the counting containers do between two lines.
const tick = "sleep 0.02"

// ticking is a container that counts, a line for each number, until SIGTERM, upon which it says so and does the last thing.
func ticking(name, last string) *runtimeapi.ContainerConfig {
	return lab.Sh(name, "trap 'echo bye; "+last+"' TERM; i=0; while :; do echo $i; i=$((i+1)); "+tick+"; done")
}

// ticks follows a counting container: its process and its log.
type ticks struct {
	node    *lab.Node
	id      string
	pid     int
	log     string
	started int64
	at      int64 // how far the log was read
	next    int   // the number expected then
	bye     bool
}

// startTicks creates and starts a counting container.
func startTicks(ctx context.Context, n *lab.Node, podID string, pod *runtimeapi.PodSandboxConfig, cfg *runtimeapi.ContainerConfig) (*ticks, error) {
	id, err := n.CRI.Start(ctx, podID, pod, cfg)
	if err != nil {
		return nil, err
	}
	return followTicks(ctx, n, id, filepath.Join(pod.LogDirectory, cfg.LogPath))
}

// followTicks follows one that runs.
func followTicks(ctx context.Context, n *lab.Node, id, log string) (*ticks, error) {
	status, err := n.CRI.ContainerState(ctx, id)
	if err != nil {
		return nil, err
	}
	t := &ticks{node: n, id: id, started: status.StartedAt, log: log}
	if t.pid, err = containerPID(ctx, n, id); err != nil {
		return nil, err
	}
	return t, nil
}

// read reads what is new in the log and checks that no number is missing.
func (t *ticks) read() error {
	f, err := os.Open(t.log)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() < t.at {
		return fmt.Errorf("the log %s has shrunk", t.log)
	}
	data, err := io.ReadAll(io.NewSectionReader(f, t.at, info.Size()-t.at))
	if err != nil {
		return err
	}
	for {
		line, rest, whole := bytes.Cut(data, []byte("\n"))
		if !whole {
			return nil
		}
		data = rest
		parts := strings.SplitN(string(line), " ", 4)
		if len(parts) != 4 || parts[1] != "stdout" || parts[2] != "F" {
			return fmt.Errorf("log line %q", line)
		}
		switch number, err := strconv.Atoi(parts[3]); {
		case parts[3] == "bye": // twice, where a repeated call has sent the signal twice
			t.bye = true
		case err != nil || t.bye || number != t.next:
			return fmt.Errorf("log line %q comes where %d was expected (said bye: %t)", line, t.next, t.bye)
		default:
			t.next++
		}
		t.at += int64(len(line)) + 1
	}
}

// goesOn checks that the container is the one that was started, runs, and logs.
func (t *ticks) goesOn(ctx context.Context) error {
	status, err := t.node.CRI.ContainerState(ctx, t.id)
	if err != nil {
		return err
	}
	if status.State != runtimeapi.ContainerState_CONTAINER_RUNNING || status.StartedAt != t.started {
		return fmt.Errorf("container %.12s is %v, started at %d; it was started at %d and nobody stopped it (%s: %s)",
			t.id, status.State, status.StartedAt, t.started, status.Reason, status.Message)
	}
	pid, err := containerPID(ctx, t.node, t.id)
	if err != nil {
		return err
	}
	if pid != t.pid || syscall.Kill(pid, 0) != nil {
		return fmt.Errorf("container %.12s had process %d, and now %d", t.id, t.pid, pid)
	}
	if err := t.read(); err != nil {
		return err
	}
	from := t.next
	deadline := time.Now().Add(10 * time.Second)
	for t.next == from {
		if time.Now().After(deadline) {
			return fmt.Errorf("container %.12s logs no more", t.id)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := t.read(); err != nil {
			return err
		}
	}
	return nil
}

// said checks that the log of a container that was stopped is whole, to its last word.
func (t *ticks) said() error {
	if err := t.read(); err != nil {
		return err
	}
	if !t.bye {
		return fmt.Errorf("the log of container %.12s ends with %d and lacks its last line", t.id, t.next-1)
	}
	return nil
}

// containerPID asks for the process of a container.
func containerPID(ctx context.Context, n *lab.Node, id string) (int, error) {
	resp, err := n.CRI.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return 0, err
	}
	return infoPID(resp.Info)
}

// shimPID asks for the shim of a pod.
func shimPID(ctx context.Context, n *lab.Node, podID string) (int, error) {
	resp, err := n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID, Verbose: true})
	if err != nil {
		return 0, err
	}
	return infoPID(resp.Info)
}

func infoPID(info map[string]string) (int, error) {
	var v struct{ PID int }
	if err := json.Unmarshal([]byte(info["info"]), &v); err != nil {
		return 0, fmt.Errorf("verbose info: %w", err)
	}
	if v.PID <= 0 {
		return 0, fmt.Errorf("no pid in %.200q", info["info"])
	}
	return v.PID, nil
}

// awaitEnd waits until a process is gone, or a zombie.
func awaitEnd(ctx context.Context, pid int) error {
	return lab.Eventually(ctx, 10*time.Second, fmt.Sprintf("end of process %d", pid), func(context.Context) error {
		if ended(pid) {
			return nil
		}
		return errors.New("it runs")
	})
}

// ended tells whether a process is gone, or a zombie.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || bytes.HasPrefix(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" Z"))
}

// points reads a list of fail points, in the order in which they were passed first.
func points(file string) ([]string, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []string
	seen := map[string]bool{}
	for _, name := range strings.Fields(string(text)) {
		if !seen[name] {
			seen[name] = true
			list = append(list, name)
		}
	}
	return list, nil
}

// listTo has the daemon, or its shims, list the fail points that they pass.
func listTo(variable, file string) string { return variable + "=" + file }
