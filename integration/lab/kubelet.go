package lab

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"
)

// Kubelet is a stock kubelet. Without an API server it runs the pods whose manifests lie in a directory.
type Kubelet struct {
	Process   *Process
	Manifests string // directory of static pods

	url      string
	client   *http.Client
	settings *keptSettings
}

// FeatureGates turns features of a kubelet on.
func FeatureGates(names ...string) func(config map[string]any) {
	return func(config map[string]any) {
		gates, _ := config["featureGates"].(map[string]bool)
		if gates == nil {
			gates = map[string]bool{}
			config["featureGates"] = gates
		}
		for _, name := range names {
			gates[name] = true
		}
	}
}

// StartKubelet starts the kubelet on the node's runtime and waits until it is healthy. What the test wants otherwise it
// changes in the kubelet's configuration.
func (n *Node) StartKubelet(ctx context.Context, change ...func(config map[string]any)) error {
	addr, err := freeAddress()
	if err != nil {
		return err
	}
	return n.startKubelet(ctx, addr, nil, change)
}

func (n *Node) startKubelet(ctx context.Context, addr string, args []string, change []func(map[string]any)) error {
	if n.Tools.Kubelet == "" {
		t, err := BuildTools(ctx, os.Stderr, "kubelet")
		if err != nil {
			return err
		}
		n.Tools.Kubelet = t.Kubelet
	}
	root := filepath.Join(n.Dir, "kubelet")
	k := &Kubelet{
		Manifests: filepath.Join(n.Dir, "manifests"), url: "https://" + addr,
		client: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}, // its own certificate, on loopback
	}
	config, err := n.kubeletConfig(addr, change)
	if err != nil {
		return err
	}
	file := filepath.Join(n.Dir, "kubelet.yaml")
	if err := os.WriteFile(file, config, 0o644); err != nil {
		return err
	}
	if k.settings, err = keepSettings(); err != nil {
		return err
	}
	begin := n.startApart
	if n.shared { // its containerd is this machine's
		begin = func(name, log, program string, args ...string) (*Process, error) {
			return start(name, log, nil, program, args...)
		}
	}
	args = append([]string{
		"--config", file, "--root-dir", root, "--cert-dir", filepath.Join(root, "pki"), "--hostname-override", n.Network(), "--v", "2",
	}, args...)
	p, err := begin("kubelet", filepath.Join(n.Dir, "kubelet.log"), n.Tools.Kubelet, args...)
	if err != nil {
		return errors.Join(err, k.settings.release())
	}
	k.Process, n.Kubelet = p, k
	return p.ready(ctx, 60*time.Second, func(ctx context.Context) error {
		_, err := k.Get(ctx, "/healthz")
		return err
	})
}

// kubeletConfig keeps the kubelet to the node's directory and cgroup and takes everything out that belongs to a whole
// machine: eviction, image garbage collection, firewall chains, enforcement of node limits.
func (n *Node) kubeletConfig(addr string, change []func(map[string]any)) ([]byte, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	config := map[string]any{
		"apiVersion":                      "kubelet.config.k8s.io/v1beta1",
		"kind":                            "KubeletConfiguration",
		"address":                         host,
		"port":                            json.Number(port),
		"healthzPort":                     0,
		"authentication":                  map[string]any{"anonymous": map[string]any{"enabled": true}, "webhook": map[string]any{"enabled": false}},
		"authorization":                   map[string]any{"mode": "AlwaysAllow"},
		"containerRuntimeEndpoint":        n.Endpoint,
		"staticPodPath":                   filepath.Join(n.Dir, "manifests"),
		"podLogsDir":                      filepath.Join(n.Dir, "logs"),
		"volumePluginDir":                 filepath.Join(n.Dir, "kubelet", "plugins"),
		"resolvConf":                      filepath.Join(n.Dir, "resolv.conf"),
		"podCIDR":                         n.Subnet(),
		"cgroupDriver":                    "cgroupfs",
		"cgroupRoot":                      n.Cgroup(),
		"failCgroupV1":                    false,
		"failSwapOn":                      false,
		"enforceNodeAllocatable":          []string{},
		"evictionHard":                    map[string]string{"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
		"imageGCHighThresholdPercent":     100,
		"imageGCLowThresholdPercent":      99,
		"localStorageCapacityIsolation":   false,
		"makeIPTablesUtilChains":          false,
		"enableControllerAttachDetach":    false,
		"serializeImagePulls":             false,
		"oomScoreAdj":                     0,
		"syncFrequency":                   "5s",
		"fileCheckFrequency":              "1s",
		"volumeStatsAggPeriod":            "1m",
		"crashLoopBackOff":                map[string]any{"maxContainerRestartPeriod": "2s"},
		"shutdownGracePeriod":             "0s",
		"shutdownGracePeriodCriticalPods": "0s",
	}
	for _, f := range change {
		f(config)
	}
	return yaml.Marshal(config)
}

func (n *Node) kubeletProcess() *Process {
	if n.Kubelet == nil {
		return nil
	}
	return n.Kubelet.Process
}

// Stop ends the kubelet; its pods run on. The machine's kernel settings are put back.
func (k *Kubelet) Stop() error {
	err := errors.Join(k.Process.Stop(), k.settings.release())
	k.client.CloseIdleConnections()
	return err
}

// Get asks the kubelet's own API, for example "/pods" or "/containerLogs/NAMESPACE/POD/CONTAINER".
func (k *Kubelet) Get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.url+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s: %s", path, resp.Status, strings.TrimSpace(string(body)))
	}
	return body, nil
}

// Apply writes a pod's manifest; the kubelet starts the pod. Name is the manifest's file name.
func (k *Kubelet) Apply(name string, manifest []byte) error {
	// The kubelet reads a file when it sees it: it must never see half of one, and it leaves names with a dot alone.
	part := filepath.Join(k.Manifests, "."+name+".part")
	if err := os.WriteFile(part, manifest, 0o644); err != nil {
		return err
	}
	return os.Rename(part, filepath.Join(k.Manifests, name+".yaml"))
}

// Delete removes a pod's manifest; the kubelet ends the pod gracefully.
func (k *Kubelet) Delete(name string) error {
	return os.Remove(filepath.Join(k.Manifests, name+".yaml"))
}

// errNoPod is the answer for a pod that the kubelet does not know.
var errNoPod = errors.New("the kubelet has no such pod")

// Pod asks for the pod of that name; a static pod's name ends with the node's, which is left out here.
func (k *Kubelet) Pod(ctx context.Context, name string) (*Pod, error) {
	body, err := k.Get(ctx, "/pods")
	if err != nil {
		return nil, err
	}
	var list struct{ Items []Pod }
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("/pods: %w", err)
	}
	for i, pod := range list.Items {
		if strings.HasPrefix(pod.Metadata.Name, name+"-berth-lab") {
			return &list.Items[i], nil
		}
	}
	return nil, fmt.Errorf("pod %s: %w", name, errNoPod)
}

// WaitPod waits until a pod is as the predicate wants it: nil for yes, otherwise what is missing.
func (k *Kubelet) WaitPod(ctx context.Context, name string, within time.Duration, want func(*Pod) error) (*Pod, error) {
	var pod *Pod
	err := Eventually(ctx, within, "pod "+name, func(ctx context.Context) error {
		var err error
		if pod, err = k.Pod(ctx, name); err != nil {
			return err
		}
		if err := want(pod); err != nil {
			return fmt.Errorf("%w (%s)", err, pod)
		}
		return nil
	})
	if err != nil {
		return pod, fmt.Errorf("%w\nthe kubelet said last: %s", err, k.Complaints(name))
	}
	return pod, nil
}

// WaitEnded waits until a pod, whose manifest was deleted, has ended: the kubelet's API no longer lists such a pod, so the
// runtime is asked. The dead sandbox itself is removed by the kubelet's garbage collection, once a minute.
func (n *Node) WaitEnded(ctx context.Context, name string, within time.Duration) error {
	return Eventually(ctx, within, "end of pod "+name, func(ctx context.Context) error {
		pods, err := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
			LabelSelector: map[string]string{"io.kubernetes.pod.name": name + "-" + n.Network()},
		}})
		if err != nil {
			return err
		}
		for _, pod := range pods.Items {
			if pod.State == runtimeapi.PodSandboxState_SANDBOX_READY {
				return fmt.Errorf("sandbox %.12s is ready", pod.Id)
			}
		}
		return nil
	})
}

// Complaints are the last errors in the kubelet's log that name the pod; with an empty name, the last errors.
func (k *Kubelet) Complaints(pod string) string {
	text, err := os.ReadFile(k.Process.Log)
	if err != nil {
		return err.Error()
	}
	var lines []string
	for _, line := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(line, "E") && strings.Contains(line, pod) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}

// Logs are the lines of a container's log, as the kubelet's API gives them.
func (k *Kubelet) Logs(ctx context.Context, p *Pod, container, query string) (string, error) {
	body, err := k.Get(ctx, fmt.Sprintf("/containerLogs/%s/%s/%s%s", p.Metadata.Namespace, p.Metadata.Name, container, query))
	return string(body), err
}
