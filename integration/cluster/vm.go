package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/berth-run/berth/integration/lab"
)

// VM says whether the node is a virtual machine of integration/vm: it has a kernel of its own with cgroup v2, and a clock of its own.
// Its disk goes with it when it is killed.
func (n *Node) VM() bool { return n.n > len(n.c.Nodes)-n.c.vms }

// cgroupRoot is where the kubelet makes the cgroups of pods.
func (n *Node) cgroupRoot() string {
	if n.VM() {
		return "/"
	}
	return n.cgroup()
}

// patience is how long to wait for a program of the node: qemu emulates the processor of one that is a virtual machine.
func (n *Node) patience(within time.Duration) time.Duration {
	if n.VM() {
		return 10 * within
	}
	return within
}

// machineScript makes a node of the machine. What the node writes much is on its disk, and programs that are started from what both
// machines share would have each page of theirs fetched.
const machineScript = `
	mkdir -p /disk/bin
	cp "$DIR"/bin/kubelet "$DIR"/bin/berth "$DIR"/bin/berth-shim /disk/bin/
	mount --bind /disk/bin "$DIR/bin"
	for dir in /var/lib/kubelet /var/lib/berth /var/lib/cni /var/log/pods /var/log/containers; do
		mkdir -p "/disk$dir" "$dir"
		mount --bind "/disk$dir" "$dir"
	done
	mount --make-rshared /
	for file in hosts hostname machine-id resolv.conf; do cp --remove-destination "$DIR/$NODE/$file" "/etc/$file"; done
	hostname "$NODE"
	mkdir -p /sys/fs/cgroup/system
	ip addr add "$ADDRESS/24" dev eth0
	ip link set eth0 up
	ip route add default via "$GATEWAY"
	echo 1 > /proc/sys/net/ipv4/ip_forward
`

// machineRuns says whether it was booted: its link goes with it.
func (n *Node) machineRuns() bool {
	_, err := netlink.LinkByName(n.link())
	return err == nil
}

// runsInMachine says whether a daemon does.
func (n *Node) runsInMachine(d daemon) (bool, error) {
	out, err := n.Command(context.Background(), "pgrep", "--full", "^"+regexp.QuoteMeta(d.command)).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 { // there is none
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("processes of %s: %w: %s", n.Name, err, out)
	}
	return true, nil
}

// bootMachine starts the machine with its link to the bridge, and waits until it is a node.
func (n *Node) bootMachine(ctx context.Context) error {
	if err := n.startMachine(ctx); err != nil {
		return errors.Join(err, n.Kill())
	}
	return nil
}

func (n *Node) startMachine(ctx context.Context) error {
	root, err := lab.RepoRoot()
	if err != nil {
		return err
	}
	for _, command := range []string{
		"ip tuntap add " + n.link() + " mode tap",
		fmt.Sprintf("ip link set %s master %s up", n.link(), n.c.bridge()),
	} {
		words := strings.Fields(command)
		if _, err := run(ctx, words[0], words[1:]...); err != nil {
			return err
		}
	}
	dir := filepath.Join(root, "integration/vm")
	log := n.Log("machine")
	if err := os.RemoveAll(log); err != nil { // of when it ran before
		return err
	}
	p, err := n.c.start(n.Name+"'s machine", n.cgroup()+"/system", log, []string{"env", "TMPDIR=" + n.path("tmp")}, nil, filepath.Join(dir, "run.sh"),
		"-t", "86400", "-o", n.c.Dir, "-n", n.link(), "-c", n.console(), filepath.Join(dir, "console.sh"))
	if err != nil {
		return err
	}
	err = p.ready(ctx, n.patience(time.Minute), func(context.Context) error {
		text, err := os.ReadFile(log)
		if err == nil && !bytes.Contains(text, []byte("console: ready")) {
			err = errors.New("it has not booted")
		}
		return err
	})
	if err != nil {
		return err
	}
	cmd := n.Command(ctx, "env", "DIR="+n.c.Dir, "NODE="+n.Name, "ADDRESS="+n.Address(), "GATEWAY="+n.c.HostAddress(), "sh", "-euc", machineScript)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("machine of %s: %w: %s", n.Name, err, out)
	}
	return nil
}

// SetClock sets the machine's clock. Connections to the control plane do not live on: that a certificate is of another time is seen by those
// who connect. Nothing that is said by the new clock comes through an old one.
func (n *Node) SetClock(ctx context.Context, to time.Time) error {
	if !n.VM() {
		return fmt.Errorf("%s shares this machine's clock", n.Name)
	}
	if _, err := run(ctx, "ip", "link", "set", n.link(), "down"); err != nil {
		return err
	}
	out, err := n.Command(ctx, "sh", "-euc", `date -s "@$0" > /dev/null; ss -K --tcp dst "$1" > /dev/null`, fmt.Sprint(to.Unix()), n.c.HostAddress()).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("set the clock of %s: %w: %s", n.Name, err, out)
	}
	_, up := run(context.WithoutCancel(ctx), "ip", "link", "set", n.link(), "up")
	return errors.Join(err, up)
}

// console are the pipes by which the machine is asked.
func (n *Node) console() string { return n.path("console") }

// ask runs a command in the machine.
func (n *Node) ask(ctx context.Context, args []string) *exec.Cmd {
	root, err := lab.RepoRoot()
	cmd := exec.CommandContext(ctx, filepath.Join(root, "integration/vm/ask.sh"), append([]string{n.console()}, args...)...)
	if err != nil {
		cmd.Err = err
	}
	return cmd
}

// startInMachine starts a program there. How it ended is not told: who waits for it waits in vain.
func (n *Node) startInMachine(name, log, program string, args ...string) (*process, error) {
	words := append([]string{"sh", "-c", `(echo 0 > /sys/fs/cgroup/system/cgroup.procs; exec setsid "$@" >> "$0" 2>&1 < /dev/null) > /dev/null 2>&1 &`, log, program}, args...)
	if out, err := n.ask(context.Background(), words).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("start %s's %s: %w: %s", n.Name, name, err, out)
	}
	return &process{name: n.Name + "'s " + name, log: log}, nil
}

func (n *Node) kubeletHealthyInMachine(ctx context.Context) error {
	out, err := n.Command(ctx, "timeout", "30", "bash", "-c", `exec 3<> /dev/tcp/127.0.0.1/10248; printf 'GET /healthz HTTP/1.0\r\n\r\n' >&3; cat <&3`).CombinedOutput()
	if err == nil && !bytes.HasPrefix(out, []byte("HTTP/1.0 200 ")) {
		err = errors.New("it is not healthy")
	}
	if err != nil {
		return fmt.Errorf("http://127.0.0.1:10248/healthz: %w: %.200s", err, out)
	}
	return nil
}
