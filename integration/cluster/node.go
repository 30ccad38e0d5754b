package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/network"
)

// files writes what a node's programs read, once.
func (n *Node) files() error {
	for _, dir := range []string{"var", "tmp", "cni", "certs.d"} {
		if err := os.MkdirAll(n.path(dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(n.path("tmp"), 0o1777); err != nil {
		return err
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	hosts := "127.0.0.1 localhost\n"
	for _, other := range n.c.Nodes {
		hosts += other.Address() + " " + other.Name + "\n"
	}
	if err := n.makeDisk(); err != nil {
		return err
	}
	config := n.kubeletConfig()
	if n.n <= len(n.c.kubelets) {
		maps.Copy(config, n.c.kubelets[n.n-1])
	}
	kubelet, err := yaml.Marshal(config)
	if err != nil {
		return err
	}
	for file, text := range map[string]string{
		"hosts": hosts, "hostname": n.Name + "\n", "machine-id": hex.EncodeToString(id) + "\n", "resolv.conf": "nameserver " + n.c.HostAddress() + "\n",
		"kubelet.yaml": string(kubelet), "berth.yaml": n.berthConfig(), "containerd.toml": n.containerdConfig(), "proxy.yaml": n.proxyConfig(),
	} {
		if err := os.WriteFile(n.path(file), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return n.hostsToml()
}

// makeDisk makes the node's disk. Its file takes as much as has been written to it.
func (n *Node) makeDisk() error {
	if n.Disk() == 0 {
		return nil
	}
	if err := os.WriteFile(n.path("var.disk"), nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(n.path("var.disk"), n.Disk()); err != nil {
		return err
	}
	_, err := run(context.Background(), "mkfs.ext4", "-q", "-m", "0", n.path("var.disk"))
	return err
}

func (n *Node) kubeletConfig() map[string]any {
	pki := func(name string) string { return n.c.path("pki", name) }
	return map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"address":        n.Address(),
		"healthzPort":    10248,
		"authentication": map[string]any{"anonymous": map[string]any{"enabled": false}, "webhook": map[string]any{"enabled": true}, "x509": map[string]any{"clientCAFile": pki("ca.crt")}},
		"authorization":  map[string]any{"mode": "Webhook"},
		"tlsCertFile":    pki(n.Name + "-serving.crt"), "tlsPrivateKeyFile": pki(n.Name + "-serving.key"),
		"containerRuntimeEndpoint": "unix://" + n.socket(),
		"clusterDNS":               []string{n.c.dns()}, "clusterDomain": "cluster.local",
		"resolvConf": n.path("resolv.conf"), "cgroupDriver": "cgroupfs", "cgroupRoot": n.cgroupRoot(), "failCgroupV1": false, "failSwapOn": false,
		// The machine is not the node's alone: limits of all pods together, its firewall, what it has of disk and memory.
		"enforceNodeAllocatable": []string{}, "makeIPTablesUtilChains": false,
		"evictionHard":              map[string]string{"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
		"nodeStatusReportFrequency": "1m", "nodeStatusUpdateFrequency": "5s", "syncFrequency": "10s", "serializeImagePulls": false, "oomScoreAdj": 0,
		"imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
	}
}

func (n *Node) berthConfig() string {
	return fmt.Sprintf(`certsD: %s
cniConf: %s
nodeRoutes: host-gw
kubeconfig: %s
nodeName: %s
cgroupDriver: cgroupfs
shim: %s
`, n.path("certs.d"), n.path("cni"), n.path("node-routes.kubeconfig"), n.Name, n.c.program("berth-shim"))
}

func (n *Node) proxyConfig() string {
	return fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: %s
clusterCIDR: %s
clientConnection: {kubeconfig: %s}
nodePortAddresses: %s
conntrack: {maxPerCore: 0, min: 0} # the machine's, not the namespace's
`, n.Name, n.c.PodCIDR(), n.path("proxy.kubeconfig"), map[Parts]string{Berth: "[primary, localhost]", Containerd: "[primary]"}[n.c.parts])
}

// namespaceScript makes a node of copies of this machine's mounts, in the namespaces that it runs in. What is a mount of another
// program's, and would be held by the copy, goes: pinned namespaces, and all below the directories that a node has of its own.
const namespaceScript = `
	mount --make-rprivate /
	mount --bind "$DIR" /mnt
	awk '{ for (i = 7; $i != "-"; i++); print $(i + 1) ":" $5 }' /proc/self/mountinfo | tac | while read -r mount; do
		case $mount in
		nsfs:* | *:/run/?* | *:/tmp/?* | *:/var/?*) umount -l "${mount#*:}" 2> /dev/null || true ;;
		esac
	done
	mount -t tmpfs -o mode=755 "berth-$NODE" /run
	mount --bind "/mnt/$NODE/tmp" /tmp
	if [ -f "/mnt/$NODE/var.disk" ]; then mount -o loop "/mnt/$NODE/var.disk" /var; else mount --bind "/mnt/$NODE/var" /var; fi
	if [ -d "/mnt/$NODE/etc" ]; then # one of Machines
		mount -t overlay -o "lowerdir=/etc,upperdir=/mnt/$NODE/etc,workdir=/mnt/$NODE/etc.work" "berth-$NODE" /etc
		mount --bind /mnt/bin /usr/local/bin
	fi
	mkdir -p /run/sys /run/lock /var/tmp /var/lib/kubelet /var/lib/berth /var/log/pods /var/log/containers "$DIR"
	chmod 1777 /var/tmp
	ln -sfn /run /var/run
	mount --move /mnt "$DIR"
	# A sysfs shows the network namespace that it is mounted in.
	mount --rbind /sys /run/sys
	mount -t sysfs sysfs /sys
	for dir in fs/cgroup kernel/security fs/selinux; do
		if grep -q " /run/sys/$dir " /proc/self/mountinfo; then mount --rbind "/run/sys/$dir" "/sys/$dir"; fi
	done
	umount -R -l /run/sys
	rmdir /run/sys
	for file in hosts hostname machine-id resolv.conf; do
		if [ -f "/etc/$file" ]; then mount --bind "$DIR/$NODE/$file" "$(readlink -f "/etc/$file")"; fi
	done
	mount --make-rshared /
	hostname "$NODE"
	ip link set lo up
	ip addr add "$ADDRESS/24" dev eth0
	ip link set eth0 up
	ip route add default via "$GATEWAY"
	echo 1 > /proc/sys/net/ipv4/ip_forward
`

// boot makes the node's namespaces, and its link to the bridge.
func (n *Node) boot(ctx context.Context) error {
	if n.VM() {
		return n.bootMachine(ctx)
	}
	for _, kind := range namespaces {
		if err := os.WriteFile(n.ns(kind), nil, 0o600); err != nil {
			return err
		}
	}
	if err := n.makeNamespaces(ctx); err != nil {
		return errors.Join(err, n.unpin()) // a node with namespaces is one that was booted
	}
	return nil
}

func (n *Node) makeNamespaces(ctx context.Context) error {
	if _, err := run(ctx, "unshare", "--mount="+n.ns("mnt"), "--net="+n.ns("net"), "--uts="+n.ns("uts"), "--propagation", "private", "true"); err != nil {
		return err
	}
	if err := n.plug(ctx); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(n.enter()[1:], "sh", "-euc", namespaceScript)...)
	cmd.Env = append(os.Environ(), "DIR="+n.c.Dir, "NODE="+n.Name, "ADDRESS="+n.Address(), "GATEWAY="+n.c.HostAddress())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("namespaces of %s: %w: %s", n.Name, err, out)
	}
	return nil
}

func (n *Node) plug(ctx context.Context) error {
	for _, command := range []string{
		fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s", n.link(), n.NetNS()),
		fmt.Sprintf("ip link set %s master %s up", n.link(), n.c.bridge()),
	} {
		words := strings.Fields(command)
		if _, err := run(ctx, words[0], words[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// enter are the words before a command that is to run on the node.
func (n *Node) enter() []string {
	return []string{"nsenter", "--mount=" + n.ns("mnt"), "--net=" + n.ns("net"), "--uts=" + n.ns("uts"), "--"}
}

// Command is one that runs on the node, as if from a console of it.
func (n *Node) Command(ctx context.Context, args ...string) *exec.Cmd {
	if n.VM() {
		return n.ask(ctx, args)
	}
	words := append(n.enter(), args...)
	return exec.CommandContext(ctx, words[0], words[1:]...)
}

// start starts a program on the node.
func (n *Node) start(name string, files []*os.File, program string, args ...string) (*process, error) {
	log := n.Log(name)
	if n.VM() {
		return n.startInMachine(name, log, n.c.program(program), args...)
	}
	return n.c.start(n.Name+"'s "+name, n.cgroup()+"/system", log, n.enter(), files, n.c.program(program), args...)
}

// Log is where the output of a program of the node is: "berth serve", "berth proxy" or "kubelet".
func (n *Node) Log(program string) string {
	return n.c.path("logs", n.Name+"."+strings.ReplaceAll(program, " ", "-")+".log")
}

// daemon is a program that runs on a node until somebody ends it.
type daemon struct {
	name    string
	command string // how its command line begins
	start   func(context.Context) error
}

// daemons are the node's, in the order of their start.
func (n *Node) daemons() []daemon {
	berth, kubelet := n.c.program("berth"), daemon{"kubelet", n.c.program("kubelet") + " ", n.StartKubelet}
	if n.c.parts == Containerd {
		return []daemon{
			{"containerd", n.c.program("containerd") + " ", n.startContainerd}, kubelet,
			{"kube-proxy", n.c.program("kube-proxy") + " ", n.startKubeProxy},
		}
	}
	return []daemon{{"berth serve", berth + " serve ", n.StartBerth}, kubelet, {"berth proxy", berth + " proxy ", n.StartProxy}}
}

// Start boots the node, unless it was booted, and starts those of its daemons that do not run. It does not wait for the node to be Ready.
func (n *Node) Start(ctx context.Context) error {
	booted := network.Pinned(n.NetNS())
	if n.VM() {
		booted = n.machineRuns()
	}
	if !booted {
		if err := n.boot(ctx); err != nil {
			return err
		}
	}
	for _, d := range n.daemons() {
		runs, err := n.runs(d)
		if err != nil {
			return err
		}
		if runs {
			continue
		}
		if err := d.start(ctx); err != nil {
			return err
		}
		n.c.logf("%s: %s is started", n.Name, d.name)
	}
	return nil
}

// StartBerth starts berth serve, and waits until it answers.
func (n *Node) StartBerth(ctx context.Context) error {
	p, err := n.start("berth serve", nil, "berth", "serve", "--config", n.path("berth.yaml"))
	if err != nil {
		return err
	}
	return p.ready(ctx, n.patience(time.Minute), n.runtimeAnswers)
}

func (n *Node) runtimeAnswers(ctx context.Context) error {
	out, err := n.Command(ctx, n.c.program("berth"), "images", "list").CombinedOutput()
	if err != nil {
		return fmt.Errorf("berth images list: %w: %s", err, out)
	}
	return nil
}

// StartKubelet starts the kubelet, and waits until it is healthy.
func (n *Node) StartKubelet(ctx context.Context) error {
	// A kubelet writes settings of the machine's kernel. It holds the lock of who may put them back.
	settings, err := lab.HoldSettings()
	if err != nil {
		return err
	}
	defer func() { _ = settings.Close() }()
	p, err := n.start("kubelet", []*os.File{settings}, "kubelet",
		"--config", n.path("kubelet.yaml"), "--kubeconfig", n.path("kubelet.kubeconfig"), "--hostname-override", n.Name, "--node-ip", n.Address(), "--v", "2")
	if err != nil {
		return err
	}
	return p.ready(ctx, n.patience(2*time.Minute), n.kubeletHealthy)
}

func (n *Node) kubeletHealthy(ctx context.Context) error {
	if n.VM() {
		return n.kubeletHealthyInMachine(ctx)
	}
	var c net.Conn
	err := network.InNamespaces([]string{n.NetNS()}, func() (err error) {
		c, err = net.DialTimeout("tcp", "127.0.0.1:10248", 5*time.Second) // a socket stays in the namespace that it was made in
		return err
	})
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	return healthyOn("http://127.0.0.1:10248/healthz", &http.Transport{
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return c, nil },
		DisableKeepAlives: true,
	})(ctx)
}

// StartProxy starts berth proxy, and waits until Services are programmed.
func (n *Node) StartProxy(ctx context.Context) error {
	return n.startProxy(ctx, "berth proxy", "berth", "proxy")
}

func (n *Node) startProxy(ctx context.Context, name, program string, args ...string) error {
	p, err := n.start(name, nil, program, append(args, "--config", n.path("proxy.yaml"))...)
	if err != nil {
		return err
	}
	return p.ready(ctx, n.patience(2*time.Minute), healthy("http://"+n.Address()+":10256/livez", nil))
}

// Kill is the node's power cut: all its processes end at once, shells on it as well, its namespaces go, and what was on its tmpfs. What was on its disk stays, and
// Start boots it again.
func (n *Node) Kill() error {
	if err := kill(n.Name, n.inCgroup, n.inside); err != nil {
		return err
	}
	return n.unpin()
}

// unpin removes the node's namespaces, whose processes have ended, with the link.
func (n *Node) unpin() error {
	var errs []error
	for _, kind := range namespaces {
		errs = append(errs, unmount(n.ns(kind)))
	}
	return errors.Join(append(errs, deleteLink(n.link()))...)
}

// unmount takes a mount away, if there is one.
func unmount(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// rights writes what berth's programs on the node show the API server.
func (n *Node) rights(routes, proxy string) error {
	return errors.Join(
		os.WriteFile(n.path("node-routes.kubeconfig"), []byte(routes), 0o600),
		os.WriteFile(n.path("proxy.kubeconfig"), []byte(proxy), 0o600))
}
