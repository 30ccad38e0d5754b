//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
	"github.com/berth-run/berth/internal/step"
)

// TestTraps are twelve mistakes that other runtimes have made and mended, one test each.
func TestTraps(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("how other runtimes fare is theirs")
	}
	_, err := n.CRI.Pull(t.Context(), testimages.Busybox)
	must(t, err)
	for i, trap := range []struct {
		name string
		test func(*testing.T, *lab.Node)
	}{
		{"undo that fails keeps the sandbox, and no address is lost", trapFailedUndo},
		{"teardown of a sandbox whose network namespace is gone", trapNamespaceGone},
		{"the stop signal is sent once", trapOneSignal},
		{"the first status after a kill for memory says so", trapOOM},
		{"exec whose output a daemon holds", trapDaemonisedExec},
		{"exec with endless output", trapEndlessExec},
		{"start and remove at once", trapStartAndRemove},
		{"port-forward reaches the pod alone, by IPv6, too", trapPortForward},
		{"log lines at the edges of buffers", trapLogLines},
		{"restart of the daemon with half of everything", trapRestart},
		{"privileged containers leave the host's cgroup mounts alone", trapCgroupMounts},
		{"a cancelled call blocks no name", trapCancelledCreate},
	} {
		t.Run(fmt.Sprintf("%02d %s", i+1, trap.name), func(t *testing.T) {
			ledger(t, n)
			trap.test(t, n)
		})
	}
}

// runTrap starts a pod with a container; both are removed at the end of the test.
func runTrap(t *testing.T, n *lab.Node, name string, cfg *runtimeapi.ContainerConfig) (pod *runtimeapi.PodSandboxConfig, podID, id string) {
	t.Helper()
	ctx := t.Context()
	pod = n.Pod(name)
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { _ = n.CRI.RemovePod(context.Background(), podID) })
	if cfg != nil {
		id, err = n.CRI.Start(ctx, podID, pod, cfg)
		must(t, err)
	}
	return pod, podID, id
}

// addresses lists what the node's host-local has handed out.
func addresses(t *testing.T, n *lab.Node) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.Dir, "ipam", n.Network()))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	must(t, err)
	var list []string
	for _, e := range entries {
		if net.ParseIP(e.Name()) != nil {
			list = append(list, e.Name())
		}
	}
	return list
}

// trapFailedUndo has a CNI plugin that fails ADD after the bridge has given an address, and fails the DEL that undoes it.
func trapFailedUndo(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	bin := filepath.Join(n.Dir, "trap-bin")
	must(t, os.MkdirAll(bin, 0o755))
	flag := filepath.Join(n.Dir, "del-fails")
	plugin := fmt.Sprintf(`#!/bin/sh
cat > /dev/null
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
DEL) [ ! -e %[1]s ] || { echo '{"cniVersion":"1.0.0","code":100,"msg":"trap: DEL fails"}'; exit 1; } ;;
*) echo '{"cniVersion":"1.0.0","code":100,"msg":"trap: ADD fails"}'; exit 1 ;;
esac
`, flag)
	must(t, os.WriteFile(filepath.Join(bin, "berth-lab-trap"), []byte(plugin), 0o755))
	must(t, os.WriteFile(flag, nil, 0o644))
	tools, file := n.Tools, filepath.Join(n.CNIConf(), "10-lab.conflist")
	restart := func(conflist, cni string) {
		t.Helper()
		must(t, n.Berth.Stop())
		must(t, os.WriteFile(file, []byte(conflist), 0o644))
		changed := *tools
		changed.CNI = cni
		n.Tools = &changed
		must(t, n.StartBerth(ctx))
	}
	defer func() {
		_ = os.Remove(flag)
		restart(n.Conflist(), tools.CNI)
		n.Tools = tools
	}()
	restart(strings.Replace(n.Conflist(), `{"type": "bandwidth", "capabilities": {"bandwidth": true}}`, `{"type": "berth-lab-trap"}`, 1), tools.CNI+":"+bin)

	before := addresses(t, n)
	pod := n.Pod("trapped")
	_, err := n.CRI.RunPod(ctx, pod)
	if err == nil || !strings.Contains(err.Error(), "trap: ADD fails") {
		t.Fatalf("RunPodSandbox: %v", err)
	}
	list, err := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	if len(list.Items) != 1 || list.Items[0].State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || list.Items[0].Metadata.Uid != pod.Metadata.Uid {
		t.Fatalf("listed: %v", list.Items)
	}
	id := list.Items[0].Id
	if _, err := n.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err == nil {
		t.Error("StopPodSandbox succeeds although DEL fails")
	}
	must(t, os.Remove(flag))
	must(t, n.CRI.RemovePod(ctx, id))
	if after := addresses(t, n); !slices.Equal(before, after) {
		t.Errorf("addresses: %v, before: %v", after, before)
	}
}

func trapNamespaceGone(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	pod, otherID, _ := runTrap(t, n, "other", nil)
	others := filepath.Join(n.Run(), "pods", otherID, "ns", "net")
	defer func() { // it has its address still
		id, err := n.CRI.Start(ctx, otherID, pod, lab.Sleeper("looks"))
		must(t, err)
		ip, err := n.CRI.PodIP(ctx, otherID)
		must(t, err)
		if out, err := n.CRI.Exec(ctx, id, "ip", "addr", "show", "dev", "eth0"); err != nil || !strings.Contains(out, ip+"/") {
			t.Errorf("the other pod: %s, %v, want %s", out, err, ip)
		}
	}()
	before := addresses(t, n)
	for name, spoil := range map[string]func(netns string) error{
		"the pin is a plain file": func(netns string) error { return unix.Unmount(netns, unix.MNT_DETACH) },
		"the pin is gone": func(netns string) error {
			return errors.Join(unix.Unmount(netns, unix.MNT_DETACH), os.Remove(netns))
		},
		"another pod's namespace is pinned there": func(netns string) error {
			return errors.Join(unix.Unmount(netns, unix.MNT_DETACH), unix.Mount(others, netns, "", unix.MS_BIND, ""))
		},
	} {
		_, podID, _ := runTrap(t, n, "no-netns", nil)
		must(t, spoil(filepath.Join(n.Run(), "pods", podID, "ns", "net")))
		if _, err := n.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: podID}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		_, err := n.CRI.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: podID})
		must(t, err)
	}
	if after := addresses(t, n); !slices.Equal(before, after) {
		t.Errorf("addresses: %v, before: %v", after, before)
	}
}

func trapOneSignal(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	cfg := lab.Sh("counter", "trap 'echo TERM' TERM; echo ready; while :; do sleep 0.1; done")
	pod, _, id := runTrap(t, n, "signals", cfg)
	count := func(word string) (found int) {
		lines, _ := lab.Log(pod, cfg)
		for _, l := range lines {
			if l.Text == word {
				found++
			}
		}
		return found
	}
	must(t, lab.Eventually(ctx, time.Minute, "the trap is set", func(context.Context) error {
		if count("ready") != 1 {
			return errors.New("not yet")
		}
		return nil
	}))
	var wg sync.WaitGroup
	for _, grace := range []int64{8, 8, math.MaxInt64} { // any number of seconds is a pod's to choose
		wg.Go(func() {
			if _, err := n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace}); err != nil {
				t.Errorf("stop within %d seconds: %v", grace, err)
			}
		})
	}
	wg.Wait()
	if got := count("TERM"); got != 1 {
		t.Errorf("the container got %d signals", got)
	}
}

func trapOOM(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	pod, podID, _ := runTrap(t, n, "oom", nil)
	const runs, atOnce = 12, 2
	slots := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i := range runs {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			cfg := lab.Container(fmt.Sprint("eater-", i), "dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1")
			cfg.Linux.Resources.MemoryLimitInBytes = 16 << 20
			id, err := n.CRI.Start(ctx, podID, pod, cfg)
			if err != nil {
				t.Error(err)
				return
			}
			// The first status that says Exited is the one that WaitExit returns.
			if s, err := n.CRI.WaitExit(ctx, id, time.Minute); err != nil || s.Reason != "OOMKilled" || s.ExitCode != 137 {
				t.Errorf("run %d: %v, %v", i, s, err)
			}
		})
	}
	wg.Wait()
}

func trapDaemonisedExec(t *testing.T, n *lab.Node) {
	_, _, id := runTrap(t, n, "daemon", lab.Sleeper("main"))
	resp, err := n.CRI.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
		ContainerId: id, Cmd: []string{"sh", "-c", "sleep 86400 & echo started"}, Timeout: 120,
	})
	if err != nil || resp.ExitCode != 0 || string(resp.Stdout) != "started\n" {
		t.Errorf("%v, %v", resp, err)
	}
}

func trapEndlessExec(t *testing.T, n *lab.Node) {
	_, _, id := runTrap(t, n, "endless", lab.Sleeper("main"))
	rss := func() int { return peakKiB(t, n.Berth.PID()) >> 10 }
	before := rss()
	resp, err := n.CRI.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
		ContainerId: id, Cmd: []string{"sh", "-c", "yes & sleep 5; kill $!"}, Timeout: 120,
	})
	must(t, err) // the answer is one that can be read
	if len(resp.Stdout) == 0 || len(resp.Stdout) > 16<<20 || !strings.HasPrefix(string(resp.Stdout), "y\ny\n") {
		t.Errorf("%d bytes of output", len(resp.Stdout))
	}
	// What is kept, its copy in the message, and the message on the wire; 5 s of yes are gigabytes.
	if grown := rss() - before; grown > 100 {
		t.Errorf("berth serve has grown by %d MiB", grown)
	}
}

func trapStartAndRemove(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	const races, pods = 100, 4
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		started int
	)
	for p := range pods {
		pod, podID, _ := runTrap(t, n, fmt.Sprint("race-", p), nil)
		wg.Go(func() {
			for i := range races / pods {
				id, err := n.CRI.Create(ctx, podID, pod, lab.Sleeper(fmt.Sprint("c", i)))
				if err != nil {
					t.Error(err)
					return
				}
				var both sync.WaitGroup
				var startErr, removeErr error
				delay := time.Duration(rand.Int64N(int64(10 * time.Millisecond)))
				both.Go(func() {
					_, startErr = n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
				})
				both.Go(func() {
					time.Sleep(delay)
					_, removeErr = n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
				})
				both.Wait()
				if removeErr != nil {
					t.Errorf("remove: %v", removeErr)
				}
				// Either it was started and then removed, or there was nothing to start.
				if c := status.Code(startErr); c != codes.OK && c != codes.NotFound && c != codes.FailedPrecondition {
					t.Errorf("start: %v", startErr)
				}
				if _, err := n.CRI.ContainerState(ctx, id); status.Code(errors.Unwrap(err)) != codes.NotFound {
					t.Errorf("after the removal: %v", err)
				}
				mu.Lock()
				if startErr == nil {
					started++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	t.Logf("%d of %d were started before they were removed", started, races)
}

// trapPortForward has servers of the same ports in the pod and on the host.
func trapPortForward(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	listen := func(network, address string) net.Listener {
		t.Helper()
		l, err := net.Listen(network, address)
		must(t, err)
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, "from the host") })}
		go func() { _ = server.Serve(l) }()
		t.Cleanup(func() { _ = server.Close() })
		return l
	}
	if l, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		t.Skipf("this machine has no IPv6: %v", err)
	} else {
		_ = l.Close()
	}
	l6 := listen("tcp6", "[::1]:0")
	port := l6.Addr().(*net.TCPAddr).Port
	hostOnly := listen("tcp4", "127.0.0.1:0").Addr().(*net.TCPAddr).Port
	script := fmt.Sprintf("mkdir /tmp/www && echo from the pod > /tmp/www/index.html && exec httpd -f -p '[::1]:%d' -h /tmp/www", port)
	_, podID, _ := runTrap(t, n, "forward", lab.Sh("httpd", script))

	local := func() int {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		must(t, err)
		defer func() { _ = l.Close() }()
		return l.Addr().(*net.TCPAddr).Port
	}
	six, none := local(), local()
	cmd := n.CrictlCommand(ctx, "port-forward", podID, fmt.Sprintf("%d:%d", six, port), fmt.Sprintf("%d:%d", none, hostOnly))
	must(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	must(t, lab.Eventually(ctx, time.Minute, "page of the pod", func(ctx context.Context) error {
		return wantPage(ctx, fmt.Sprintf("http://127.0.0.1:%d/", six), "from the pod")
	}))
	// The pod has no server there. Whatever the forward does, it must not find the host's.
	if err := wantPage(ctx, fmt.Sprintf("http://127.0.0.1:%d/", none), ""); err == nil {
		t.Error("a port that only the host serves is forwarded")
	}
}

// trapLogLines reads back with the reader of the kubelet (k8s.io/cri-client/pkg/logs), which is crictl's, too.
func trapLogLines(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	var script, want strings.Builder
	for _, size := range []int{0, 1, 4094, 4095, 4096, 8191, 16383, 16384, 16385, 65535, 65536, 100000} {
		fmt.Fprintf(&script, "head -c %d /dev/zero | tr '\\0' x; printf '\\r\\n'; ", size)
		want.WriteString(strings.Repeat("x", size) + "\r\n")
	}
	script.WriteString("printf 'no newline'")
	want.WriteString("no newline")
	_, _, id := runTrap(t, n, "log", lab.Sh("writer", script.String()))
	_, err := n.CRI.WaitExit(ctx, id, time.Minute)
	must(t, err)
	got, err := n.Crictl(ctx, "logs", id)
	must(t, err)
	if got != want.String() {
		at := 0
		for at < min(len(got), want.Len()) && got[at] == want.String()[at] {
			at++
		}
		t.Errorf("%d bytes, want %d; they differ from byte %d on: %.40q, want %.40q", len(got), want.Len(), at, got[at:], want.String()[at:])
	}
}

// trapRestart kills the daemon while a container is half made, and has more go wrong while it is away.
func trapRestart(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	pod, podID, _ := runTrap(t, n, "restart", nil)
	ids, pids := map[string]string{}, map[string]int{}
	for _, name := range []string{"stays", "killed"} {
		id, err := n.CRI.Start(ctx, podID, pod, lab.Sleeper(name))
		must(t, err)
		ids[name] = id
		pids[name], err = containerPID(ctx, n, id)
		must(t, err)
	}
	lostPod, lostPodID, lostID := runTrap(t, n, "lost", lab.Sleeper("main"))
	shim, err := shimPID(ctx, n, lostPodID)
	must(t, err)

	must(t, n.KillBerth())
	must(t, n.StartBerth(ctx, step.EnvKill+"=CreateContainer.create.after"))
	half := lab.Sleeper("half")
	if _, err := n.CRI.Create(ctx, podID, pod, half); err == nil {
		t.Fatal("the daemon outlived its fail point")
	}
	<-n.Berth.Done()
	must(t, syscall.Kill(pids["killed"], syscall.SIGKILL))
	must(t, awaitEnd(ctx, pids["killed"]))
	must(t, syscall.Kill(shim, syscall.SIGKILL))
	must(t, awaitEnd(ctx, shim))
	orphan := strings.Repeat("0f", 32)
	for _, dir := range []string{"pods", "containers", "state"} {
		must(t, os.MkdirAll(filepath.Join(n.Run(), dir, orphan, "rootfs"), 0o700))
	}
	must(t, n.StartBerth(ctx))

	list, err := n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: podID}})
	must(t, err)
	var names []string
	for _, c := range list.Containers {
		names = append(names, c.Metadata.Name)
	}
	slices.Sort(names)
	if !slices.Equal(names, []string{"killed", "stays"}) {
		t.Errorf("listed: %v", names)
	}
	for name, id := range map[string]string{"killed": ids["killed"], "of the shim that died": lostID} {
		if s, err := n.CRI.WaitExit(ctx, id, time.Minute); err != nil || s.ExitCode != 137 || s.Reason == "" || s.FinishedAt == 0 {
			t.Errorf("the container %s: %v, %v", name, s, err)
		}
	}
	if s, err := n.CRI.ContainerState(ctx, ids["stays"]); err != nil || s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container that was left alone: %v, %v", s, err)
	}
	for _, dir := range []string{"pods", "containers", "state"} {
		if _, err := os.Stat(filepath.Join(n.Run(), dir, orphan)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: what no record names is there: %v", dir, err)
		}
	}
	_, err = n.CRI.Start(ctx, podID, pod, half)
	must(t, err)
	must(t, n.CRI.RemovePod(ctx, lostPodID))
	lostPodID, err = n.CRI.RunPod(ctx, lostPod)
	must(t, err)
	must(t, n.CRI.RemovePod(ctx, lostPodID))
}

// trapCgroupMounts looks for mount options of the host that a container takes away by mounting cgroup2 itself, which the
// kernel lets whoever is in the host's cgroup namespace do.
func trapCgroupMounts(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	mounts := func() (list []string) {
		text, err := os.ReadFile("/proc/self/mountinfo")
		must(t, err)
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if i := slices.Index(f, "-"); i > 0 && strings.HasPrefix(f[i+1], "cgroup") && strings.HasPrefix(f[4], "/sys/fs/cgroup") {
				list = append(list, f[4]+" "+f[5]+" "+strings.Join(f[i+1:], " "))
			}
		}
		slices.Sort(list)
		return list
	}
	before := mounts()
	if len(before) == 0 {
		t.Fatal("the host has no cgroup mounts")
	}
	pod := n.Pod("privileged")
	pod.Linux.SecurityContext.Privileged = true
	cfg := lab.Sleeper("main")
	cfg.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true, NamespaceOptions: pod.Linux.SecurityContext.NamespaceOptions}
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	defer func() { must(t, n.CRI.RemovePod(context.WithoutCancel(ctx), podID)) }()
	id, err := n.CRI.Start(ctx, podID, pod, cfg)
	must(t, err)
	_, err = n.CRI.Exec(ctx, id, "true") // an exec is in it by now, too
	must(t, err)
	if after := mounts(); !slices.Equal(before, after) {
		t.Errorf("the host's cgroup mounts are\n%s\nand were\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
}

func trapCancelledCreate(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	pod, podID, _ := runTrap(t, n, "cancel", nil)
	cancelled := 0
	for i := range 12 {
		cfg := lab.Sleeper(fmt.Sprint("c", i))
		short, cancel := context.WithTimeout(ctx, time.Duration(1+i*i)*time.Millisecond)
		_, err := n.CRI.Create(short, podID, pod, cfg)
		cancel()
		if err != nil {
			cancelled++
		}
		// The same name and attempt, at once.
		id, err := n.CRI.Start(ctx, podID, pod, cfg)
		if err != nil && status.Code(errors.Unwrap(err)) == codes.AlreadyExists && cancelled == 0 {
			continue // the first call had succeeded
		}
		if err != nil {
			t.Fatalf("after a call that was given up after %d ms: %v", 1+i*i, err)
		}
		if s, err := n.CRI.ContainerState(ctx, id); err != nil || s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("%v, %v", s, err)
		}
	}
	if cancelled == 0 {
		t.Skip("no call was cancelled: this machine is too fast")
	}
	t.Logf("%d of 12 calls were given up", cancelled)
}
