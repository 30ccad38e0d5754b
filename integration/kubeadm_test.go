//go:build integration

package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"sigs.k8s.io/yaml"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// missedByKubeadm are the checks of kubeadm's that a node of this test may fail, with how it says so. kubeadm 1.37 wants this one to be
// skipped by name on machines with cgroup v1.
var missedByKubeadm = map[string]string{
	"SystemVerification": "cgroups v1 support is deprecated",
}

// TestKubeadm makes a cluster of two nodes as docs/kubeadm.md says, with kubeadm itself: the control plane is static pods on berth.
func TestKubeadm(t *testing.T) {
	if os.Getenv("BERTH_KUBEADM") == "" {
		t.Skip("make test-kubeadm runs it")
	}
	c := newCluster(t, cluster.Machines, cluster.Options{Index: clusterIndex(t, 7)})
	k := kubeadmStory{story: story{t, c}}
	of := func(t *testing.T) *kubeadmStory {
		k.t = t
		return &k
	}
	inOrder(t, of, []chapter[*kubeadmStory]{
		{"preflight", (*kubeadmStory).preflight},
		{"init: the control plane is static pods on berth", (*kubeadmStory).begin},
		{"kube-proxy's ConfigMap serves berth proxy as it is", (*kubeadmStory).proxy},
		{"join", (*kubeadmStory).join},
		{"an application is reached by address and name", (*kubeadmStory).application},
		{"a killed API server is started again in place", (*kubeadmStory).killAPIServer},
		{"reset leaves no pod", (*kubeadmStory).reset},
	})
}

// kubeadmStory is the story of a cluster that kubeadm makes. Each step is one of docs/kubeadm.md.
type kubeadmStory struct {
	story
	ignore []string // of preflight
}

const (
	kubeadmConfig = "/var/tmp/init.yaml"
	adminConfig   = "/etc/kubernetes/admin.conf"
)

// preflight installs the nodes, and has kubeadm look at them.
func (k *kubeadmStory) preflight() {
	ctx := k.t.Context()
	berth, err := os.ReadFile(k.example("kubeadm/berth.yaml"))
	must(k.t, err)
	for _, n := range k.c.Nodes {
		// Where the registry is, and which part of the machine is the node's, is the lab's matter.
		must(k.t, n.WriteFile(ctx, "/etc/berth/config.yaml", string(berth)))
		must(k.t, n.WriteFile(ctx, "/etc/berth/config.d/lab.yaml", "certsD: "+n.CertsD()+"\n"))
		must(k.t, n.WriteFile(ctx, "/etc/default/kubelet", "KUBELET_EXTRA_ARGS=--cgroup-root="+n.Cgroup()+"\n"))
		must(k.t, n.StartUnit(ctx, "berth"))
	}
	first := k.c.Nodes[0]
	must(k.t, first.WriteFile(ctx, kubeadmConfig, k.config()))
	k.push(strings.Fields(k.on(first, "kubeadm", "config", "images", "list", "--config", kubeadmConfig)))

	// Told of no socket, kubeadm takes the one that is for cAdvisor to be containerd's.
	const guessing = "/var/tmp/guessing.yaml"
	must(k.t, first.WriteFile(ctx, guessing, strings.Replace(k.config(), "criSocket: unix:///run/berth/berth.sock", "name: node-1", 1)))
	out, err := first.Command(ctx, "kubeadm", "init", "phase", "preflight", "--config", guessing).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "its CRI is served at unix:///run/berth/berth.sock") {
		k.t.Errorf("preflight without a socket: %v\n%s", err, out)
	}

	out, err = first.Command(ctx, "kubeadm", "init", "phase", "preflight", "--config", kubeadmConfig).CombinedOutput()
	k.t.Logf("kubeadm init phase preflight: %v\n%s", err, out)
	for _, found := range regexp.MustCompile(`\[ERROR ([A-Za-z0-9-]+)\]: (.*)`).FindAllStringSubmatch(string(out), -1) {
		if why := missedByKubeadm[found[1]]; why == "" || !strings.HasPrefix(found[2], why) {
			k.t.Errorf("%s is wrong with the node: %s", found[1], found[2])
		}
		k.ignore = append(k.ignore, found[1])
	}
	if err != nil && len(k.ignore) == 0 {
		k.t.Errorf("preflight: %v", err)
	}
	if strings.Contains(string(out), "sandbox image") {
		k.t.Error("kubeadm finds fault with a pause image, and berth has none")
	}
}

// example is a file of examples/.
func (k *kubeadmStory) example(name string) string {
	root, err := lab.RepoRoot()
	must(k.t, err)
	return filepath.Join(root, "examples", name)
}

// config is the example, with this cluster's ranges and the versions of what was built.
func (k *kubeadmStory) config() string {
	text, err := os.ReadFile(k.example("kubeadm/init.yaml"))
	must(k.t, err)
	var out []string
	for _, document := range strings.Split(string(text), "\n---\n") {
		var object map[string]any
		must(k.t, yaml.Unmarshal([]byte(document), &object))
		if object["kind"] == "ClusterConfiguration" {
			object["networking"] = map[string]any{"podSubnet": k.c.PodCIDR(), "serviceSubnet": k.c.ServiceCIDR()}
			object["etcd"] = map[string]any{"local": map[string]any{"imageTag": "3.7.3-0"}}
			object["dns"] = map[string]any{"imageTag": "v1.15.0"}
			// /usr is the machine's.
			object["controllerManager"] = map[string]any{"extraArgs": []map[string]any{{"name": "flex-volume-plugin-dir", "value": "/var/lib/kubelet/volumeplugins"}}}
		}
		document, err := yaml.Marshal(object)
		must(k.t, err)
		out = append(out, string(document))
	}
	kubelet := "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nvolumePluginDir: /var/lib/kubelet/volumeplugins\n"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		kubelet += "failCgroupV1: false\n"
	}
	return strings.Join(append(out, kubelet), "---\n")
}

// push makes the images that kubeadm wants, of the programs that are built of their modules.
func (k *kubeadmStory) push(images []string) {
	b, err := k.c.Builder()
	must(k.t, err)
	b.Log = k.t.Logf
	programs := map[string]string{
		"kube-apiserver": tools.APIServer, "kube-controller-manager": tools.ControllerManager, "kube-scheduler": tools.Scheduler,
		"etcd": tools.Etcd, "coredns": tools.DNS,
	}
	for _, image := range images {
		_, rest, _ := strings.Cut(image, "/")
		repo, tag, _ := strings.Cut(rest, ":")
		name := path.Base(repo)
		if name == "pause" { // one of the lab's; kubeadm pulls it, and nothing uses it
			continue
		}
		if programs[name] == "" {
			k.t.Fatalf("kubeadm wants the image %s, of which there is no program", image)
		}
		text, err := os.ReadFile(programs[name])
		must(k.t, err)
		layer, err := testimages.Layer(testimages.Program("usr/local/bin/"+name, text))
		must(k.t, err)
		_, err = b.Push(k.t.Context(), testimages.Image{
			Repo: repo, Tags: []string{tag}, Layers: [][]byte{layer},
			Config: ocispec.ImageConfig{Env: []string{"PATH=/usr/local/bin"}, Entrypoint: []string{"/usr/local/bin/" + name}},
		})
		must(k.t, err)
	}
}

// on runs a command on a node, and is what it prints.
func (k *kubeadmStory) on(n *cluster.Node, command ...string) string {
	k.t.Helper()
	cmd := n.Command(k.t.Context(), command...)
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		k.t.Fatalf("%s on %s: %v\n%s%s", strings.Join(command, " "), n.Name, err, out, errOut.String())
	}
	return string(out)
}

// kubeadm runs kubeadm on a node, which has no init system: its kubelet is started when kubeadm wants it to be.
func (k *kubeadmStory) kubeadm(n *cluster.Node, args ...string) string {
	k.t.Helper()
	cmd := n.Command(k.t.Context(), append([]string{"kubeadm"}, args...)...)
	out, err := cmd.StdoutPipe()
	must(k.t, err)
	cmd.Stderr = cmd.Stdout
	must(k.t, cmd.Start())
	var text strings.Builder
	var failed error
	for lines := bufio.NewScanner(out); lines.Scan(); {
		text.WriteString(lines.Text() + "\n")
		if lines.Text() == "[kubelet-start] Starting the kubelet" {
			failed = n.StartUnit(k.t.Context(), "kubelet")
		}
	}
	err = errors.Join(cmd.Wait(), failed)
	k.t.Logf("kubeadm %s on %s: %v\n%s", strings.Join(args, " "), n.Name, err, text.String())
	if err != nil {
		k.t.FailNow()
	}
	return text.String()
}

func (k *kubeadmStory) ignored() []string {
	if len(k.ignore) == 0 {
		return nil
	}
	return []string{"--ignore-preflight-errors", strings.Join(k.ignore, ",")}
}

func (k *kubeadmStory) begin() {
	ctx, first := k.t.Context(), k.c.Nodes[0]
	k.kubeadm(first, append([]string{"init", "--config", kubeadmConfig}, k.ignored()...)...)
	admin, err := first.ReadFile(ctx, adminConfig)
	must(k.t, err)
	must(k.t, k.c.Adopt(admin))
	k.untilReady("component=kube-apiserver", "component=kube-controller-manager", "component=kube-scheduler", "component=etcd")
	if runtime := k.kubectl("get", "node", first.Name, "-o", "jsonpath={.status.nodeInfo.containerRuntimeVersion}"); !strings.HasPrefix(runtime, "berth://") {
		k.t.Errorf("the node's runtime is %q", runtime)
	}
	instance, err := first.ReadFile(ctx, "/var/lib/kubelet/instance-config.yaml")
	must(k.t, err)
	if !strings.Contains(instance, `containerRuntimeEndpoint: "unix:///run/berth/berth.sock"`) {
		k.t.Errorf("what kubeadm keeps of the node: %s", instance)
	}
}

// untilReady waits until there are pods of each of these labels in kube-system, and all of them are ready.
func (k *kubeadmStory) untilReady(labels ...string) {
	k.t.Helper()
	for _, label := range labels {
		k.eventually(4*time.Minute, "pods with "+label+" are ready", func(ctx context.Context) error {
			out, err := k.c.Kubectl(ctx, "--namespace", "kube-system", "get", "pods", "-l", label, "-o", `jsonpath={range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status} {end}`)
			if err != nil {
				return err
			}
			pods := strings.Fields(out)
			if len(pods) == 0 || slices.ContainsFunc(pods, func(p string) bool { return !strings.HasSuffix(p, "=True") }) {
				return fmt.Errorf("there are %v", pods)
			}
			return nil
		})
	}
}

// proxy gives berth's programs their rights, and the proxy what kubeadm has for kube-proxy; then there are Services, and so CoreDNS.
func (k *kubeadmStory) proxy() {
	first := k.c.Nodes[0]
	k.kubectl("apply", "-f", k.example("noderoutes/rbac.yaml"))
	k.routes(first)
	k.on(first, "sh", "-euc", "export HOME=/var/tmp; kubeadm init phase addon kube-proxy --config "+kubeadmConfig+" --print-manifest | kubectl --kubeconfig "+adminConfig+" apply -l app=kube-proxy -f -")
	if out := k.kubectl("--namespace", "kube-system", "get", "daemonsets,configmaps", "-o", "name"); strings.Contains(out, "daemonset") || !strings.Contains(out, "configmap/kube-proxy\n") {
		k.t.Fatalf("there should be kube-proxy's ConfigMap and no DaemonSet: %s", out)
	}
	k.importProxy(first)
	k.kubectl("apply", "-f", k.example("proxy/berth-proxy.yaml"))
	k.untilReady("app=berth-proxy", "k8s-app=kube-dns")
	must(k.t, first.WaitReady(k.t.Context(), time.Minute))
}

// importProxy gives a node the image that berth-proxy.yaml names, which no registry has.
func (k *kubeadmStory) importProxy(n *cluster.Node) {
	manifest, err := os.ReadFile(k.example("proxy/berth-proxy.yaml"))
	must(k.t, err)
	image := regexp.MustCompile(`\bimage: (\S+)`).FindStringSubmatch(string(manifest))
	if image == nil {
		k.t.Fatalf("berth-proxy.yaml names no image")
	}
	const archive = "/var/tmp/berth.tar"
	k.on(n, "sh", k.example("proxy/image.sh"), "/usr/local/bin/berth", image[1], archive)
	k.on(n, "berth", "images", "import", archive)
}

// routes gives a node's berth its kubeconfig.
func (k *kubeadmStory) routes(n *cluster.Node) {
	text := k.on(k.c.Nodes[0], "env", "HOME=/var/tmp", "KUBECONFIG="+adminConfig, "sh", k.example("noderoutes/kubeconfig.sh"))
	must(k.t, n.WriteFile(k.t.Context(), "/etc/berth/kubeconfig", text))
}

func (k *kubeadmStory) join() {
	first, second := k.c.Nodes[0], k.c.Nodes[1]
	command := strings.Fields(k.on(first, "kubeadm", "token", "create", "--print-join-command", "--kubeconfig", adminConfig))
	if len(command) < 3 || command[0] != "kubeadm" || command[1] != "join" {
		k.t.Fatalf("kubeadm token create --print-join-command: %v", command)
	}
	k.kubeadm(second, append(append(command[1:], "--cri-socket", "unix:///run/berth/berth.sock"), k.ignored()...)...)
	k.importProxy(second)
	k.routes(second)
	must(k.t, second.WaitReady(k.t.Context(), 2*time.Minute))
	k.untilReady("app=berth-proxy")
	must(k.t, k.c.HostRoutes(k.t.Context()))
}

func (k *kubeadmStory) application() {
	k.kubectl("taint", "nodes", k.c.Nodes[0].Name, "node-role.kubernetes.io/control-plane-")
	k.deploy()
	k.service()
	k.podToPod()
	for _, client := range k.ready("client", 2, time.Minute, nil) {
		k.answers("the Service's name, from a pod on "+client.Spec.NodeName, k.ready("web", 2, time.Minute, nil), k.fromPod(client, "web.default.svc.cluster.local"))
	}
}

func (k *kubeadmStory) killAPIServer() {
	restarts := func(ctx context.Context) (string, error) {
		return k.c.Kubectl(ctx, "--namespace", "kube-system", "get", "pods", "-l", "component=kube-apiserver", "-o", "jsonpath={.items[0].status.containerStatuses[0].restartCount}")
	}
	before, err := restarts(k.t.Context())
	must(k.t, err)
	k.on(k.c.Nodes[0], "sh", "-euc", `for p in /proc/[0-9]*; do
		if [ "$(readlink "$p/exe")" = /usr/local/bin/kube-apiserver ] && grep -q "$0" "$p/cgroup"; then kill -9 "${p#/proc/}"; fi
	done`, k.c.Nodes[0].Cgroup())
	k.eventually(3*time.Minute, "another start of the API server", func(ctx context.Context) error {
		now, err := restarts(ctx)
		if err == nil && now == before {
			err = fmt.Errorf("it was started %s times again, as before", now)
		}
		return err
	})
	k.untilReady("component=kube-apiserver")
}

// reset takes the nodes from the cluster as kubeadm does: by the CRI.
func (k *kubeadmStory) reset() {
	for _, n := range []*cluster.Node{k.c.Nodes[1], k.c.Nodes[0]} {
		const records = "/var/lib/berth/pods"
		if k.on(n, "ls", records) == "" {
			k.t.Errorf("%s has no records of pods before", n.Name)
		}
		must(k.t, n.StopUnit(k.t.Context(), "kubelet"))
		k.kubeadm(n, "reset", "--force", "--cri-socket", "unix:///run/berth/berth.sock")
		if left := k.on(n, "ls", records); left != "" {
			k.t.Errorf("%s has records of pods:\n%s", n.Name, left)
		}
		if left := k.on(n, "sh", "-c", "ls -A /etc/kubernetes/manifests /var/lib/etcd /var/lib/kubelet 2> /dev/null | grep -v : || :"); strings.TrimSpace(left) != "" {
			k.t.Errorf("%s has files of the cluster:\n%s", n.Name, left)
		}
		k.remove(n)
	}
}

// remove takes berth from a node that has been reset, but for its programs, which the nodes share.
func (k *kubeadmStory) remove(n *cluster.Node) {
	k.on(n, "berth", "proxy", "--cleanup")
	must(k.t, n.StopUnit(k.t.Context(), "berth"))
	k.on(n, "sh", "-euc", `rm -rf /etc/berth /var/lib/berth /run/berth
		ip route flush proto 98; ip -6 route flush proto 98
		for link in $(ip -o link show | grep -o 'berth[.-][^:@]*'); do ip link delete "$link"; done
		for table in berth-routes berth-hostports; do nft delete table inet $table || :; done`)
	if left := k.on(n, "sh", "-c", "ip -o link show | grep berth; ip route show proto 98; nft list tables | grep berth; ls -d /etc/berth /var/lib/berth /run/berth 2> /dev/null; :"); left != "" {
		k.t.Errorf("%s has of berth:\n%s", n.Name, left)
	}
}
