package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

const (
	name  = "web"
	image = "registry.example/examples/web:1"
	bound = 60 * time.Second // for what a busy machine does in a second or two
)

// start brings up the node: registry with the example's image, runtime, kubelet.
func (d *demo) start(ctx context.Context) error {
	n := d.node
	if err := n.StartEmptyRegistry(ctx); err != nil {
		return err
	}
	d.say("registry (distribution) on %s", n.Registry)
	root, err := lab.RepoRoot()
	if err != nil {
		return err
	}
	b, err := n.Builder()
	if err != nil {
		return err
	}
	if err := b.PushApp(ctx, filepath.Join(root, "examples/web")); err != nil {
		return err
	}
	d.say("image built from examples/web and pushed")
	if err := n.StartBerth(ctx); err != nil {
		return err
	}
	d.say("berth serve: process %d, %s", n.Berth.PID(), n.Endpoint)
	if err := n.StartKubelet(ctx); err != nil {
		return err
	}
	d.say("kubelet without an API server: process %d", n.Kubelet.Process.PID())
	return nil
}

// pod is the running pod of the demo.
type pod struct {
	*demo
	k       *lab.Kubelet
	address string
}

// runPod hands examples/pod.yaml to the kubelet and waits until its page answers.
func (d *demo) runPod(ctx context.Context) (*pod, error) {
	root, err := lab.RepoRoot()
	if err != nil {
		return nil, err
	}
	manifest, err := os.ReadFile(filepath.Join(root, "examples/pod.yaml"))
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := d.node.Kubelet.Apply(name, manifest); err != nil {
		return nil, err
	}
	d.say("examples/pod.yaml given to the kubelet")
	err = lab.Eventually(ctx, bound, "pull of "+image, func(ctx context.Context) error {
		resp, err := d.node.CRI.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
		if err == nil && resp.Image == nil {
			err = errors.New("it is not there")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	d.say("image pulled, %.2f s after that", time.Since(began).Seconds())
	p := &pod{demo: d, k: d.node.Kubelet}
	status, err := p.k.WaitPod(ctx, name, bound, lab.Running)
	if err != nil {
		return nil, err
	}
	if len(status.Status.ContainerStatuses) != 3 {
		return nil, fmt.Errorf("the pod has %d containers, not three", len(status.Status.ContainerStatuses))
	}
	p.address = status.Status.PodIP
	d.say("three containers running and ready, %.2f s after that", time.Since(began).Seconds())
	text, err := fetch(ctx, p.url(8080, "/"))
	if err != nil {
		return nil, err
	}
	if !strings.Contains(text, "<h1>Ahoy from ") {
		return nil, fmt.Errorf("%s is an unexpected page: %q", p.url(8080, "/"), text)
	}
	d.say("the page answers on the pod's address: %s", p.url(8080, "/"))
	return p, nil
}

func (p *pod) url(port int, path string) string {
	return fmt.Sprintf("http://%s:%d%s", p.address, port, path)
}

// companions shows what the other two containers see of the application: its log through the shared volume, its counters
// through the shared network.
func (p *pod) companions(ctx context.Context) error {
	line, err := p.lastCollected(ctx, "request=1 ")
	if err != nil {
		return err
	}
	p.say("the log collector saw, through the shared volume: %s", line)
	text, err := fetch(ctx, p.url(9090, "/metrics"))
	if err != nil {
		return err
	}
	for _, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "web_requests_total ") {
			p.say("the metrics exporter saw, through the shared network: %s", line)
			return nil
		}
	}
	return fmt.Errorf("the metrics lack web_requests_total: %q", text)
}

// lastCollected waits for a line of the collector with that text and returns the last one.
func (p *pod) lastCollected(ctx context.Context, want string) (string, error) {
	var last string
	err := lab.Eventually(ctx, bound, fmt.Sprintf("line with %q of the log collector", want), func(ctx context.Context) error {
		status, err := p.k.Pod(ctx, name)
		if err != nil {
			return err
		}
		text, err := p.k.Logs(ctx, status, "log-collector", "")
		if err != nil {
			return err
		}
		for _, line := range strings.Split(text, "\n") {
			if strings.Contains(line, want) {
				last = line
			}
		}
		if last == "" {
			return fmt.Errorf("it has %d other bytes", len(text))
		}
		return nil
	})
	return last, err
}

// killApplication kills the application's process behind everybody's back; the kubelet restarts its container.
func (p *pod) killApplication(ctx context.Context) error {
	status, err := p.k.Pod(ctx, name)
	if err != nil {
		return err
	}
	id := strings.TrimPrefix(status.Container("app").ContainerID, "berth://")
	pid, err := p.pid(ctx, id)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill the application, process %d: %w", pid, err)
	}
	p.say("application killed (process %d)", pid)
	_, err = p.k.WaitPod(ctx, name, bound, func(status *lab.Pod) error {
		if c := status.Container("app"); c.RestartCount != 1 || c.LastState.Terminated == nil || c.LastState.Terminated.ExitCode != 137 {
			return errors.New("it was not restarted")
		}
		return lab.Running(status)
	})
	if err != nil {
		return err
	}
	p.say("restarted by the kubelet and ready, %.2f s later; its exit code was 137", time.Since(began).Seconds())
	return nil
}

// pid asks the runtime for the process of a container.
func (p *pod) pid(ctx context.Context, id string) (int, error) {
	if _, after, ok := strings.Cut(id, "://"); ok {
		id = after
	}
	resp, err := p.node.CRI.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return 0, err
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(resp.Info["info"]), &info); err != nil {
		return 0, fmt.Errorf("verbose status of %s: %w", id, err)
	}
	if info.Pid < 2 {
		return 0, fmt.Errorf("verbose status of %s names process %d", id, info.Pid)
	}
	return info.Pid, nil
}

// killDaemon kills `berth serve` and starts it again, while requests go on.
func (p *pod) killDaemon(ctx context.Context) error {
	before, err := p.k.Pod(ctx, name)
	if err != nil {
		return err
	}
	load := startLoad(ctx, p.url(8080, "/"))
	defer load.cancel()
	time.Sleep(500 * time.Millisecond)
	if err := p.node.KillBerth(); err != nil {
		return err
	}
	p.say("berth serve killed with SIGKILL, requests go on")
	select {
	case <-time.After(3 * time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	began := time.Now()
	if err := p.node.StartBerth(ctx); err != nil {
		return err
	}
	p.say("berth serve started again: process %d, answers after %.2f s", p.node.Berth.PID(), time.Since(began).Seconds())
	time.Sleep(3 * time.Second) // the kubelet looks once a second, and would restart what it takes for dead
	after, err := p.k.WaitPod(ctx, name, bound, lab.Running)
	if err != nil {
		return err
	}
	for _, c := range before.Status.ContainerStatuses {
		if now := after.Container(c.Name); now.ContainerID != c.ContainerID || now.RestartCount != c.RestartCount {
			return fmt.Errorf("container %s was not left alone: %+v became %+v", c.Name, c, now)
		}
	}
	done, failure := load.stop()
	if failure != nil {
		return fmt.Errorf("a request failed while berth serve was down: %w", failure)
	}
	if done < 100 {
		return fmt.Errorf("only %d requests were made while berth serve was down", done)
	}
	p.say("%d requests meanwhile, none failed; the kubelet sees the same three containers", done)
	if _, err := p.lastCollected(ctx, fmt.Sprintf("request=%d ", done)); err != nil {
		return err
	}
	p.say("no log line is missing: the collector's has request %d", done)
	return nil
}

// remove deletes the manifest, and waits until the kubelet has removed the pod and the runtime has let go of everything.
func (p *pod) remove(ctx context.Context, before lab.Snapshot) error {
	began := time.Now()
	if err := p.k.Delete(name); err != nil {
		return err
	}
	if err := p.node.WaitEnded(ctx, name, bound); err != nil {
		return err
	}
	p.say("pod stopped, %.2f s after its manifest went; the kubelet collects dead pods once a minute ...", time.Since(began).Seconds())
	if err := p.node.SettleWithin(ctx, before, 150*time.Second); err != nil {
		return err
	}
	pods, err := p.node.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	if len(pods.Items) > 0 {
		return fmt.Errorf("the runtime still has %d pods", len(pods.Items))
	}
	p.say("pod removed: no process, mount, namespace, link, cgroup, firewall rule, address or file of it is left")
	return nil
}

// fetch gets a page. Each call makes a connection of its own, as new clients do.
func fetch(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return string(body), nil
}
