package cni_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/pkg/utils"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/network"
	"github.com/berth-run/berth/network/cni"
)

// The differential tests are the contract of this package: what the reference plugins do and what is done here, on the same
// configurations, each in namespaces of its own, must be the same: results, errors, caches, files, and all of the kernel's
// state. BERTH_CNI_CONFIGS says how many configurations are generated, BERTH_CNI_SEED where to begin. Not generated, and not the
// same: files of addresses that are empty after a power cut, which host-local keeps for ever (leases_test.go).

// world is one side of a test: a namespace that plays the node, those of pods, and directories.
type world struct {
	t     *testing.T
	dir   string
	host  string
	cni   *libcni.CNIConfig
	exec  invoke.Exec
	veths map[string]string
	left  map[int]bool // pods whose rules of masquerading may be left, see forgiven
	asked []string     // what others were asked by the last step
}

func binDir(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	dir := os.Getenv("BERTH_CNI_BIN")
	if dir == "" {
		dir = "../../bin/cni"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "bridge")); err != nil {
		t.Skip("no reference plugins: make build, or BERTH_CNI_BIN")
	}
	return dir
}

// inProcess answers in process what is answered there.
type inProcess struct {
	*invoke.DefaultExec
	plugins  *cni.Plugins
	programs int // how often that was left to a program
}

const answered = "in-process:"

func (e *inProcess) FindInPath(typ string, dirs []string) (string, error) {
	if cni.Known(typ) {
		return answered + typ, nil
	}
	return e.DefaultExec.FindInPath(typ, dirs)
}

func (e *inProcess) ExecPlugin(ctx context.Context, program string, stdin []byte, environ []string) ([]byte, error) {
	typ, ok := strings.CutPrefix(program, answered)
	if !ok {
		return e.DefaultExec.ExecPlugin(ctx, program, stdin, environ)
	}
	out, err := e.plugins.Run(ctx, typ, stdin, environ, e)
	if errors.Is(err, cni.ErrProgram) {
		e.programs++
		for _, kv := range environ {
			if dirs, ok := strings.CutPrefix(kv, "CNI_PATH="); ok {
				return e.DefaultExec.ExecPlugin(ctx, filepath.Join(dirs, typ), stdin, environ)
			}
		}
	}
	return out, err
}

func reference() *invoke.DefaultExec {
	return &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: io.Discard}}
}

func newWorld(t *testing.T, bin string, exec invoke.Exec) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), exec: exec, veths: map[string]string{}, left: map[int]bool{}}
	w.host = w.namespace("host")
	w.cni = libcni.NewCNIConfigWithCacheDir([]string{bin}, w.dir+"/cache", exec)
	return w
}

// both are the reference's world and ours.
func both(t *testing.T) (ref, ours *world, exec *inProcess) {
	t.Helper()
	bin := binDir(t)
	exec = &inProcess{DefaultExec: reference(), plugins: cni.New(slog.New(slog.NewTextHandler(t.Output(), nil)))}
	t.Cleanup(exec.plugins.Close)
	return newWorld(t, bin, reference()), newWorld(t, bin, exec), exec
}

func (w *world) namespace(name string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := network.Pin(network.NamespaceSet{Net: path}); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := network.Unpin(path); err != nil {
			w.t.Error(err)
		}
	})
	return path
}

func (w *world) pod(n int) string { return fmt.Sprintf("%s/pod%d", w.dir, n) }

// step is one call.
type step struct {
	do      string // ADD DEL CHECK GC STATUS VERSION, or what happens otherwise
	pod     int
	noNetNS bool
}

// scenario is a configuration and what is done with it. DIR in the configuration is the directory of the world.
type scenario struct {
	name  string
	conf  string
	caps  map[string]any
	args  [][2]string
	steps []step

	around func(*world, func()) // runs each step, if it is not nil
}

func (s scenario) String() string {
	caps, _ := json.Marshal(s.caps)
	return fmt.Sprintf("%s: %s caps=%s args=%v steps=%v", s.name, s.conf, caps, s.args, s.steps)
}

func (w *world) runtimeConf(s scenario, st step) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{ContainerID: fmt.Sprintf("pod%d", st.pod), IfName: "eth0", NetNS: w.pod(st.pod), Args: s.args, CapabilityArgs: s.caps}
	if st.noNetNS {
		rt.NetNS = ""
	}
	return rt
}

// run does a step, and tells the outcome.
func (w *world) run(s scenario, st step) string {
	list, err := libcni.NetworkConfFromBytes([]byte(strings.ReplaceAll(s.conf, "DIR", w.dir)))
	if err != nil {
		w.t.Fatalf("%s: %v", s, err)
	}
	var out string
	if err := network.InNamespaces([]string{w.host}, func() error {
		call := func() { out = w.do(s, st, list) }
		if s.around != nil {
			s.around(w, call)
		} else {
			call()
		}
		w.meet()
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
	return out
}

func (w *world) do(s scenario, st step, list *libcni.NetworkConfigList) string {
	ctx := context.Background()
	rt := w.runtimeConf(s, st)
	var res types.Result
	var err error
	switch st.do {
	case "ADD":
		if _, serr := os.Stat(rt.NetNS); serr != nil && !st.noNetNS {
			w.namespace(fmt.Sprintf("pod%d", st.pod))
		}
		res, err = w.cni.AddNetworkList(ctx, list, rt)
	case "DEL":
		err = w.cni.DelNetworkList(ctx, list, rt)
	case "CHECK":
		err = w.cni.CheckNetworkList(ctx, list, rt)
	case "GC":
		err = w.cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: rt.ContainerID, IfName: rt.IfName}}})
	case "STATUS":
		err = w.cni.GetStatusNetworkList(ctx, list)
	case "VERSION":
		var versions []string
		for _, p := range list.Plugins {
			v, verr := w.cni.GetVersionInfo(ctx, p.Network.Type)
			if verr != nil {
				return outcome(nil, verr)
			}
			versions = append(versions, v.SupportedVersions()...)
		}
		return fmt.Sprint(versions)
	case "lose": // the namespace
		err = network.Unpin(rt.NetNS)
	case "sh":
		w.t.Fatal("unknown step")
	default:
		err = extraSteps[st.do](w, rt)
	}
	return outcome(res, err)
}

// extraSteps happen between calls, in the node's namespace.
var extraSteps = map[string]func(*world, *libcni.RuntimeConf) error{
	"bridge down": func(*world, *libcni.RuntimeConf) error {
		l, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(l)
	},
	"bridge address": func(*world, *libcni.RuntimeConf) error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		if err := netlink.LinkAdd(br); err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("10.99.0.1/24")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(br, addr)
	},
	"pods' rules go": func(*world, *libcni.RuntimeConf) error {
		return errors.Join(run("iptables -F CNI-FORWARD"), run("ip6tables -F CNI-FORWARD"))
	},
	"IPv4 filter is empty": func(*world, *libcni.RuntimeConf) error { return run("iptables -F", "iptables -X") },
	"IPv6 filter is empty": func(*world, *libcni.RuntimeConf) error { return run("ip6tables -F", "ip6tables -X") },
	"filter has its own": func(*world, *libcni.RuntimeConf) error {
		return run("iptables -P FORWARD DROP", "iptables -A FORWARD -i x+ -j ACCEPT", "iptables -N CNI-ADMIN", "iptables -A CNI-ADMIN -j RETURN", "ip6tables -A FORWARD -j ACCEPT")
	},
	"bridge is a dummy": func(*world, *libcni.RuntimeConf) error {
		return netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "br0"}})
	},
	"eth0 goes": func(w *world, rt *libcni.RuntimeConf) error {
		return network.InNamespaces([]string{rt.NetNS}, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.LinkDel(l)
		})
	},
	"eth0 is there": func(w *world, rt *libcni.RuntimeConf) error {
		path := w.namespace(filepath.Base(rt.NetNS))
		return network.InNamespaces([]string{path}, func() error {
			return netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}})
		})
	},
	"leases go": func(w *world, _ *libcni.RuntimeConf) error { return os.RemoveAll(w.dir + "/ipam") },
	"torn last_reserved_ip": func(w *world, _ *libcni.RuntimeConf) error {
		return os.Truncate(w.dir+"/ipam/net/last_reserved_ip.0", 0)
	},
	"old lease": func(w *world, _ *libcni.RuntimeConf) error {
		if err := os.MkdirAll(w.dir+"/ipam/net", 0o755); err != nil {
			return err
		}
		return os.WriteFile(w.dir+"/ipam/net/10.88.0.77", []byte("pod0"), 0o600)
	},
}

// run runs commands of space-separated words. That a chain is not there is no error.
func run(commands ...string) error {
	for _, c := range commands {
		args := strings.Fields(c)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil && !strings.Contains(string(out), "No chain/target/match by that name") {
			return fmt.Errorf("%s: %w: %s", c, err, out)
		}
	}
	return nil
}

// outcome shows a result or an error as the specification has it.
func outcome(res types.Result, err error) string {
	var spec *types.Error
	switch {
	case errors.As(err, &spec):
		return fmt.Sprintf("error %d %q %q", spec.Code, spec.Msg, spec.Details)
	case err != nil:
		return "error " + err.Error()
	case res == nil:
		return "done"
	}
	data, merr := json.MarshalIndent(res, "", " ")
	if merr != nil {
		return merr.Error()
	}
	return string(data)
}

// state is all that there is: of the node, of its pods, and files.
func (w *world) state(pods int) string {
	var all []string
	spaces := []string{w.host}
	for n := range pods {
		if network.Pinned(w.pod(n)) {
			spaces = append(spaces, w.pod(n))
		}
	}
	for _, path := range spaces {
		lines, err := w.settledState(path)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, l := range lines {
			all = append(all, filepath.Base(path)+" "+l)
		}
	}
	return strings.Join(append(all, w.files()...), "\n")
}

// settledState is that of a namespace, asked again while links go that were there when they were listed.
func (w *world) settledState(path string) (lines []string, err error) {
	for range 20 {
		err = network.InNamespaces([]string{path}, func() (err error) {
			lines, err = namespaceState(w.forgiven)
			return err
		})
		if err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return lines, err
}

// forgiven says whether a chain or a rule is one that the reference leaves where its DEL does not find the addresses of the
// pod, be it that the namespace is not named, or that it or the interface has gone. Ours finds the rules by the pod. Those
// against spoofing are left as well.
func (w *world) forgiven(line string) bool {
	for pod := range w.left {
		id := fmt.Sprintf("pod%d", pod)
		for _, mark := range []string{fmt.Sprintf(`name: \"net\" id: \"%s\"`, id), ", id: " + id, " " + utils.FormatChainName("net", id), " cni-br-iface-" + id + "-eth0", "macspoofchk-" + id + "-eth0"} {
			if strings.Contains(line, mark) {
				return true
			}
		}
	}
	return false
}

func (w *world) files() []string {
	var all []string
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || network.Pinned(path) {
			return err
		}
		rel, _ := filepath.Rel(w.dir, path)
		if !strings.Contains(rel, "/") {
			return nil // a namespace
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		content := string(data)
		var cache map[string]any
		if json.Unmarshal(data, &cache) == nil {
			delete(cache, "config") // in which the directories are in base64
			data, _ = json.Marshal(cache)
			content = string(data)
		}
		all = append(all, fmt.Sprintf("file %s %v %q", rel, st.Mode(), content))
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

func namespaceState(drop func(string) bool) ([]string, error) {
	var all []string
	add := func(format string, a ...any) { all = append(all, fmt.Sprintf(format, a...)) }
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, l := range links {
		a := l.Attrs()
		add("link %d %s %s %s mtu=%d %v %x %v master=%s promisc=%d txqlen=%d rx=%d tx=%d group=%d alias=%q", a.Index, a.Name, l.Type(), a.HardwareAddr, a.MTU,
			a.Flags&^net.FlagRunning, a.RawFlags&unix.IFF_ALLMULTI, a.OperState, names[a.MasterIndex], a.Promisc, a.TxQLen, a.NumRxQueues, a.NumTxQueues, a.Group, a.Alias)
		if br, ok := l.(*netlink.Bridge); ok {
			add("bridge %s vlans=%v", a.Name, *br.VlanFiltering)
		}
		if a.MasterIndex != 0 {
			p, err := netlink.LinkGetProtinfo(l)
			if err != nil {
				return nil, err
			}
			add("port %s %s isolated=%v", a.Name, p.String(), p.Isolated)
		}
		qdiscs, err := netlink.QdiscList(l)
		if err != nil {
			return nil, err
		}
		for _, q := range qdiscs {
			line := fmt.Sprintf("qdisc %s %s %x:%x", a.Name, q.Type(), q.Attrs().Handle, q.Attrs().Parent)
			if tbf, ok := q.(*netlink.Tbf); ok {
				line += fmt.Sprintf(" limit=%d rate=%d buffer=%d peak=%d minburst=%d", tbf.Limit, tbf.Rate, tbf.Buffer, tbf.Peakrate, tbf.Minburst)
			}
			add("%s", line)
			filters, err := netlink.FilterList(l, q.Attrs().Handle)
			if err != nil {
				return nil, err
			}
			for _, f := range filters {
				line := fmt.Sprintf("filter %s %s parent=%x prio=%d proto=%x", a.Name, f.Type(), f.Attrs().Parent, f.Attrs().Priority, f.Attrs().Protocol)
				if u32, ok := f.(*netlink.U32); ok {
					line += fmt.Sprintf(" class=%x to=%s actions=%d", u32.ClassId, names[u32.RedirIndex], len(u32.Actions))
				}
				add("%s", line)
			}
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		for _, ad := range addrs {
			add("addr %s %s flags=%x scope=%d label=%s brd=%s", a.Name, ad.IPNet, ad.Flags, ad.Scope, ad.Label, ad.Broadcast)
		}
		for _, f := range []string{
			"ipv4/conf/%s/arp_filter", "ipv4/conf/%s/forwarding", "ipv4/conf/%s/route_localnet", "ipv4/conf/%s/arp_notify", "ipv4/conf/%s/rp_filter", "ipv4/conf/%s/proxy_arp",
			"ipv6/conf/%s/forwarding", "ipv6/conf/%s/accept_ra", "ipv6/conf/%s/accept_dad", "ipv6/conf/%s/enhanced_dad",
			"ipv6/conf/%s/disable_ipv6", "ipv6/conf/%s/keep_addr_on_down",
		} {
			data, err := os.ReadFile("/proc/sys/net/" + fmt.Sprintf(f, a.Name))
			add("sysctl %s %s %v", fmt.Sprintf(f, a.Name), strings.TrimSpace(string(data)), err != nil)
		}
	}
	for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/all/route_localnet", "ipv4/conf/all/log_martians", "core/somaxconn"} {
		data, _ := os.ReadFile("/proc/sys/net/" + f)
		add("sysctl %s %s", f, strings.TrimSpace(string(data)))
	}
	vlans, err := netlink.BridgeVlanList()
	if err != nil {
		return nil, err
	}
	for index, vs := range vlans {
		for _, v := range vs {
			add("vlan %s %d %x", names[int(index)], v.Vid, v.Flags)
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: 0}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			add("route %v via %v dev %s src %v table %d scope %v proto %v prio %d type %d mtu %d advmss %d hops %v", r.Dst, r.Gw, names[r.LinkIndex], r.Src, r.Table, r.Scope, r.Protocol, r.Priority, r.Type, r.MTU, r.AdvMSS, r.MultiPath)
		}
	}
	neighs, err := netlink.NeighList(0, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	for _, n := range neighs {
		if n.State&netlink.NUD_PERMANENT != 0 {
			add("neigh %s %s %s", n.IP, n.HardwareAddr, names[n.LinkIndex])
		}
	}
	slices.Sort(all)
	rules, err := cni.RuleSet(drop)
	return append(all, rules...), err
}

var (
	vethName  = regexp.MustCompile(`veth[0-9a-f]{7,8}`)
	macAddr   = regexp.MustCompile(`([0-9a-f]{2}:){5}[0-9a-f]{2}`)
	spoofing  = regexp.MustCompile(`(cni-br-iface-\S+-mac rule \d+: payload).*(immediate)`)
	linkLocal = regexp.MustCompile(`fe80::[0-9a-f:]+`)
)

// same replaces what is random, or of this world alone. Interfaces with random names are called by their indexes.
func (w *world) same(s string) string {
	s = strings.ReplaceAll(s, w.dir, "DIR")
	for what, re := range map[string]*regexp.Regexp{"MAC": macAddr, "LINKLOCAL": linkLocal} {
		s = re.ReplaceAllString(s, what)
	}
	s = spoofing.ReplaceAllString(s, "$1 MAC $2")
	return vethName.ReplaceAllStringFunc(s, func(name string) string {
		if w.veths[name] == "" {
			return "VETH?"
		}
		return w.veths[name]
	})
}

// meet notes the interfaces that there are now.
func (w *world) meet() {
	links, err := netlink.LinkList()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, l := range links {
		w.veths[l.Attrs().Name] = fmt.Sprintf("VETH%d", l.Attrs().Index)
	}
}

// compare runs a scenario in both worlds, and tells the first difference.
func compare(t *testing.T, ref, ours *world, s scenario) {
	t.Helper()
	pods := 0
	for _, st := range s.steps {
		pods = max(pods, st.pod+1)
	}
	for i, st := range s.steps {
		want, got := atOnce(ref, ours, func(w *world) string { return w.same(w.run(s, st)) })
		switch {
		case st.do == "DEL" && want == "done":
			ref.left[st.pod] = true
		case (st.do == "DEL" || st.do == "GC") && strings.Contains(want, "CHAIN_DEL failed (Device or resource busy)") && got == "done":
			// The reference cannot undo masquerading for two addresses of a family: with those of the first it deletes the
			// chain that the rule of the second jumps to. Nothing is the same from here on.
			return
		case st.do == "ADD":
			delete(ref.left, st.pod)
		case st.do == "CHECK" && noMac.MatchString(want+got):
			// A bridge that is no gateway has the lowest of the random MAC addresses of its ports.
			want = got
		}
		if want, got := spelling(want)+fmt.Sprint(ref.asked), spelling(got)+fmt.Sprint(ours.asked); want != got {
			t.Errorf("%s\nstep %d %v\nreference: %s\nours:      %s", s, i, st, want, got)
			return
		}
		if diff := settle(ref, ours, pods); diff != "" {
			t.Errorf("%s\nstep %d %v (%s): the states differ:\n%s", s, i, st, got, diff)
			return
		}
	}
}

var noMac = regexp.MustCompile(`Bridge interface \S+ Mac doesn't match`)

// atOnce does the same in both worlds: what takes time there is to wait for the kernel.
func atOnce(ref, ours *world, f func(*world) string) (want, got string) {
	var wg sync.WaitGroup
	wg.Go(func() { want = f(ref) })
	got = f(ours)
	wg.Wait()
	return want, got
}

// settle compares states until they are the same: addresses of the kernel's own come late.
func settle(ref, ours *world, pods int) string {
	var d string
	for range 60 {
		if d = diff(atOnce(ref, ours, func(w *world) string { return w.same(w.state(pods)) })); d == "" {
			return ""
		}
		time.Sleep(50 * time.Millisecond)
	}
	return d
}

// diff shows the lines that only one of both has, but for those that may differ.
func diff(want, got string) string {
	a, b := lines(want), lines(got)
	var out strings.Builder
	for l, n := range a {
		if b[l] != n {
			fmt.Fprintf(&out, "- %d× %s\n", n, zeros.ReplaceAllString(l, "…"))
		}
	}
	for l, n := range b {
		if a[l] != n {
			fmt.Fprintf(&out, "+ %d× %s\n", n, zeros.ReplaceAllString(l, "…"))
		}
	}
	return out.String()
}

var zeros = regexp.MustCompile(`(\\x00){5,}`)

func lines(s string) map[string]int {
	all := map[string]int{}
	for l := range strings.SplitSeq(s, "\n") {
		all[l]++
	}
	return all
}

var goType = regexp.MustCompile(`Go struct field \w*\.|of type [^\s"]+`)

// wantedAddrs are in the order in which Go goes through a map, which is another one each time.
var wantedAddrs = regexp.MustCompile(`(failed to allocate all requested IPs:)([ 0-9a-f.:]+)`)

// ofSomeFamily is a rule of the first family that lacks one: the reference goes through these as a map has them, too.
var ofSomeFamily = regexp.MustCompile(`expected rule \[-[ds] [0-9a-f.:/]+`)

// spelling leaves out what is no behaviour: names of Go types in the messages of encoding/json, and the order of addresses.
func spelling(outcome string) string {
	outcome = ofSomeFamily.ReplaceAllString(outcome, "expected rule [ADDRESS")
	outcome = wantedAddrs.ReplaceAllStringFunc(outcome, func(msg string) string {
		parts := wantedAddrs.FindStringSubmatch(msg)
		return parts[1] + strings.Join(slices.Sorted(strings.FieldsSeq(parts[2])), " ")
	})
	return goType.ReplaceAllString(outcome, "GOTYPE ")
}
