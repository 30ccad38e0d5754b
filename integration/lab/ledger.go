package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
)

// Snapshot is what of a node exists on the machine at one moment: a set of lines, each of which names one thing.
type Snapshot map[string]bool

// Snapshot looks at everything a runtime can leave behind: processes, mounts, namespaces, links, cgroups, firewall rules,
// addresses and files. Only what belongs to this node counts, so that others may use the machine meanwhile. Image content
// does not count, since images are there to stay; nor do the processes that this package started.
func (n *Node) Snapshot() (Snapshot, error) {
	s := Snapshot{}
	for _, look := range []func(Snapshot) error{n.lookProcesses, n.lookMounts, n.lookLinks, n.lookCgroups, n.lookFirewall, n.lookFiles} {
		if err := look(s); err != nil {
			return nil, fmt.Errorf("ledger: %w", err)
		}
	}
	return s, nil
}

// Diff lists what is in one snapshot only: "+" came, "-" went.
func (s Snapshot) Diff(after Snapshot) []string {
	var lines []string
	for line := range after {
		if !s[line] {
			lines = append(lines, "+ "+line)
		}
	}
	for line := range s {
		if !after[line] {
			lines = append(lines, "- "+line)
		}
	}
	sort.Strings(lines)
	return lines
}

// Settle waits until everything is as it was in an earlier snapshot. What is still different after ten seconds is the
// error. (The kernel removes cgroups, links and mounts a moment after their last user went.)
func (n *Node) Settle(ctx context.Context, before Snapshot) error {
	return n.SettleWithin(ctx, before, 10*time.Second)
}

// SettleWithin is Settle with a time of one's own: a kubelet, for one, removes dead sandboxes only once a minute.
func (n *Node) SettleWithin(ctx context.Context, before Snapshot, within time.Duration) error {
	return Eventually(ctx, within, "everything is as it was before", func(context.Context) error {
		after, err := n.Snapshot()
		if err != nil {
			return err
		}
		if diff := before.Diff(after); len(diff) > 0 {
			return errors.New("leak:\n  " + strings.Join(diff, "\n  "))
		}
		return nil
	})
}

// Processes lists what runs for the node and was not started by this package, by process id with their command lines: shims,
// and the processes of containers.
func (n *Node) Processes() (map[int]string, error) { return n.processesLeft() }

// processesLeft lists the processes that belong to the node and that this package did not start: whose command line, open
// files or root file system lie in its directory, or which are in its cgroup or in a network namespace that is pinned there.
func (n *Node) processesLeft() (map[int]string, error) {
	started := map[int]bool{os.Getpid(): true}
	for _, p := range append([]*Process{n.Berth, n.kubeletProcess()}, n.processes...) {
		if p != nil {
			started[p.PID()] = true
		}
	}
	pinned := n.pinnedNamespaces()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	left := map[int]string{}
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil || started[pid] {
			continue
		}
		if n.execHelper(e.Name()) {
			continue
		}
		if name, ok := n.ownsProcess(e.Name(), pinned); ok {
			left[pid] = name
		}
	}
	return left, nil
}

// execHelper tells whether a process is the one that `berth serve` keeps for execs, or a plugin that it has started: it is
// a part of the daemon, and has another process id after each start. One whose daemon is gone is not.
func (n *Node) execHelper(pid string) bool {
	if n.Berth == nil || !n.Berth.Alive() {
		return false
	}
	cmdline, err := os.ReadFile("/proc/" + pid + "/cmdline")
	if err != nil || string(cmdline) != "berth-shim\x00exec\x00" && !strings.HasPrefix(string(cmdline), n.NRIPlugins()+"/") {
		return false
	}
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(after) // state, parent, ...
	return len(fields) > 1 && fields[1] == fmt.Sprint(n.Berth.PID())
}

func (n *Node) pinnedNamespaces() map[string]bool {
	pinned := map[string]bool{}
	mounts, err := mountTable()
	if err != nil {
		return pinned
	}
	for _, m := range mounts {
		if m.fstype == "nsfs" && strings.HasPrefix(m.point, n.Dir+"/") && strings.HasPrefix(m.root, "net:") {
			pinned[m.root] = true
		}
	}
	return pinned
}

// ownsProcess decides about one process, and names it. A process that ends meanwhile is none of the node's.
func (n *Node) ownsProcess(pid string, pinned map[string]bool) (string, bool) {
	dir := "/proc/" + pid
	cmdline, err := os.ReadFile(dir + "/cmdline")
	if err != nil {
		return "", false
	}
	name := strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))
	if name == "" { // a kernel thread, or a zombie
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil || !strings.Contains(string(stat), "(berth") {
			return "", false
		}
		if i := strings.LastIndexByte(string(stat), ')'); i < 0 || !strings.HasPrefix(string(stat)[i:], ") Z "+fmt.Sprint(os.Getpid())+" ") {
			return "", false
		}
		return "zombie", true
	}
	if strings.Contains(name, n.Dir+"/") {
		return name, true
	}
	if text, err := os.ReadFile(dir + "/cgroup"); err == nil && strings.Contains(string(text), ":"+n.Cgroup()+"/") {
		return name, true
	}
	if ns, err := os.Readlink(dir + "/ns/net"); err == nil && pinned[ns] {
		return name, true
	}
	if mounts, err := mountsOf(pid); err == nil && len(mounts) > 0 {
		for _, m := range mounts {
			if m.point == "/" && strings.Contains(m.super, n.Dir+"/") {
				return name, true
			}
		}
	}
	for _, link := range []string{"/cwd", "/exe", "/root"} {
		if target, err := os.Readlink(dir + link); err == nil && strings.HasPrefix(target, n.Dir+"/") {
			return name, true
		}
	}
	fds, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return "", false
	}
	for _, fd := range fds {
		if target, err := os.Readlink(dir + "/fd/" + fd.Name()); err == nil && strings.HasPrefix(target, n.Dir+"/") {
			return name, true
		}
	}
	return "", false
}

func (n *Node) lookProcesses(s Snapshot) error {
	left, err := n.processesLeft()
	for pid, name := range left {
		s[fmt.Sprintf("process %d: %.120s", pid, name)] = true
	}
	return err
}

func (n *Node) lookMounts(s Snapshot) error {
	mounts, err := mountTable()
	for _, m := range mounts {
		if strings.HasPrefix(m.point, n.Dir+"/") || strings.Contains(m.super, n.Dir+"/") {
			s[fmt.Sprintf("mount %s on %s", m.fstype, m.point)] = true
		}
	}
	return err
}

// lookLinks notes the ports of the node's bridge, and veths that nobody owns: one whose pod is gone, or which was not yet
// put into the bridge. The bridge itself stays with the node, as the bridge plugin wants it. Where the machine is shared,
// links without a bridge may be another's, just being made.
func (n *Node) lookLinks(s Snapshot) error {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	bridges, err := n.bridges()
	if err != nil {
		return err
	}
	onBridge := func(a *netlink.LinkAttrs) bool {
		return slices.ContainsFunc(bridges, func(b netlink.Link) bool { return b.Attrs().Index == a.MasterIndex })
	}
	for _, l := range links {
		a := l.Attrs()
		// ifb0 and ifb1 come with the kernel module; the bandwidth plugin's own are named bwp....
		if l.Type() == "veth" && (a.MasterIndex == 0 && !n.beside || onBridge(a)) || l.Type() == "ifb" && !n.beside && !strings.HasPrefix(a.Name, "ifb") {
			s[fmt.Sprintf("link %s (%s)", a.Name, l.Type())] = true
		}
	}
	return nil
}

// lookCgroups notes what is below the node's cgroup, and below /berth, where pods go that name no parent: unless
// the machine is shared, since nothing tells apart there whose they are.
func (n *Node) lookCgroups(s Snapshot) error {
	tops := []string{n.Cgroup()}
	if !n.beside {
		tops = append(tops, "/berth")
	}
	for _, top := range tops {
		if err := s.LookCgroups(top); err != nil {
			return err
		}
	}
	return nil
}

// LookCgroups notes what is below a cgroup. It may stay itself, and so may the kubelet's of the quality-of-service classes.
func (s Snapshot) LookCgroups(top string) error {
	dirs, err := cgroupDirs(top)
	for _, dir := range dirs {
		switch _, below, _ := strings.Cut(dir, top); below {
		case "", "/kubepods", "/kubepods/besteffort", "/kubepods/burstable":
		default:
			s["cgroup "+dir] = true
		}
	}
	return err
}

// lookFiles notes the files of the runtime, of the address pool and of the kubelet's legacy links. Logs are the kubelet's
// (or the test's) to remove.
func (n *Node) lookFiles(s Snapshot) error {
	if err := s.LookBerth(n.Root(), n.Run()); err != nil {
		return err
	}
	err := s.lookBelow(filepath.Join(n.Dir, "ipam"), "ipam", func(rel string, _ fs.DirEntry) error {
		// ipam/NETWORK/{lock,last_reserved_ip.0} are host-local's own.
		base := filepath.Base(rel)
		if base == "lock" || strings.HasPrefix(base, "last_reserved_ip") || base == n.Network() {
			return errStays
		}
		return nil
	})
	if err != nil {
		return err
	}
	links, err := n.logLinks()
	for _, link := range links {
		s["link "+link] = true
	}
	return err
}

// errStays is said of a file that is no pod's.
var errStays = errors.New("it stays")

// LookBerth notes the files in the root and in the run directory of a `berth serve`. Image content is there to stay, and a
// directory counts when it is something's, not when it is one of those that every daemon makes.
func (s Snapshot) LookBerth(root, run string) error {
	if err := s.lookBelow(root, "root", func(rel string, d fs.DirEntry) error {
		base, dir := filepath.Base(rel), filepath.Dir(rel)
		switch {
		case rel == "root/images/layers" || rel == "root/images/records": // images are there to stay
			return fs.SkipDir
		case rel == "root/cni" || dir == "root/cni" && (d.IsDir() || base == "configured"): // made with the first pod, and network
			return errStays
		// What was to be added, and is gone, is kept for a minute, for the sake of power cuts (network/intent.go).
		case dir == "root/cni/intents" && strings.HasSuffix(base, ".done"):
			return errStays
		// The default network's are there.
		case dir == "root/cni/networks" || filepath.Dir(dir) == "root/cni/networks" && net.ParseIP(base) == nil:
			return errStays
		}
		return nil
	}); err != nil {
		return err
	}
	return s.lookBelow(run, "run", func(rel string, _ fs.DirEntry) error {
		switch rel {
		case "run/seccomp": // the last profiles that were compiled are there to stay
			return fs.SkipDir
		case "run/cni":
			return errStays
		}
		return nil
	})
}

// lookBelow notes a directory by another name, and all below it that does not stay.
func (s Snapshot) lookBelow(top, name string, stays func(rel string, d fs.DirEntry) error) error {
	return filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		rel := name + strings.TrimPrefix(path, top)
		switch err := stays(rel, d); {
		case errors.Is(err, errStays):
		case err != nil:
			return err
		default:
			s["file "+rel] = true
		}
		return nil
	})
}

// killAll ends processes until none is listed any more.
func killAll(list func() (map[int]string, error)) error {
	for try := 0; ; try++ {
		left, err := list()
		if err != nil || len(left) == 0 {
			return err
		}
		if try == 50 {
			return fmt.Errorf("processes outlive SIGKILL: %v", left)
		}
		for pid := range left {
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill() // it may have ended by itself
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
}
