package network

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
)

// IfName is the name of a pod's interface.
const IfName = "eth0"

// Pod is what plugins are told of a pod. Teardown wants the same as Setup had.
type Pod struct {
	ID, Name, Namespace, UID string
	// NetNS is where the network namespace is pinned. For Teardown it may be empty, or gone.
	NetNS        string
	PortMappings []PortMapping
	// CgroupParent, Annotations and DNS are for plugins with the capabilities cgroupPath, bandwidth and dns.
	CgroupParent string
	Annotations  map[string]string
	DNS          *DNS
	// Conflist is the configuration to use, from Manager.Conflist or Result.Conflist; empty means the current one.
	Conflist []byte
}

// Result of a Setup.
type Result struct {
	// IPs are the addresses of the pod's interface, IPv4 first.
	IPs []netip.Addr
	// Conflist is what was used, to be kept for Teardown.
	Conflist []byte
	// Raw is the result of the plugins, in the version of the CNI specification that is current.
	Raw json.RawMessage
}

func (p Pod) String() string {
	id := p.ID
	if len(id) > 12 {
		id = id[:12]
	}
	return fmt.Sprintf("pod %s/%s (%s)", p.Namespace, p.Name, id)
}

// Setup sets the loopback interface up and runs the plugins (ADD). It may have done a part when it fails: call Teardown.
func (m *Manager) Setup(ctx context.Context, p Pod) (*Result, error) {
	c, err := m.conflistOf(p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	rt, err := runtimeConf(p, c)
	if err != nil {
		return nil, fmt.Errorf("%s: network %s: %w", p, c.Name, err)
	}
	if err := InNamespaces([]string{p.NetNS}, loopbackUp); err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	ctx, done, err := m.alone(ctx, p.ID)
	if err != nil {
		return nil, fmt.Errorf("%s: network %s: %w", p, c.Name, err)
	}
	defer done()
	if isDefaultName(c.Name) {
		if _, err := m.elsewhere(c.Name); err != nil {
			return nil, fmt.Errorf("%s: network %s: %w", p, c.Name, err)
		}
	}
	if err := m.intend(p, c); err != nil {
		return nil, fmt.Errorf("%s: network %s: %w", p, c.Name, err)
	}
	var refused refusals
	res, err := m.cni.AddNetworkList(withRefusals(ctx, &refused), c.NetworkConfigList, rt)
	if err != nil {
		m.noteRefused(p.ID, refused.add)
		return nil, fmt.Errorf("%s: network %s: %w", p, c.Name, withContext(ctx, err))
	}
	out, err := newResult(res, rt)
	if err == nil {
		err = m.checkAddresses(c.Name, out.IPs)
	}
	if err == nil && isDefaultName(c.Name) {
		err = m.mark(c.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: network %s: %w", p, c.Name, err)
	}
	if err := m.leadPorts(p, c, out.IPs); err != nil {
		return nil, fmt.Errorf("%s: network %s: %w", p, c.Name, err)
	}
	out.Conflist = slices.Clone(c.Bytes)
	return out, nil
}

func (m *Manager) conflistOf(p Pod) (*conflist, error) {
	if len(p.Conflist) == 0 {
		return m.current()
	}
	c, err := parseConflist(p.Conflist, nil)
	if err != nil {
		return nil, fmt.Errorf("network configuration of the pod: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// Teardown runs the plugins (DEL) for every network that the pod was, or may have been, added to. It returns nil where
// there is nothing to do, and may be called again after an error.
func (m *Manager) Teardown(ctx context.Context, p Pod) error {
	if _, err := cniArgs(p); err != nil {
		return nil //nolint:nilerr // Setup refuses such a pod before it runs anything
	}
	// Before the cache is read: they write there.
	ctx, done, err := m.alone(ctx, p.ID)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	defer done()
	if err := m.table.Remove(p.ID); err != nil { // before its addresses are somebody else's
		return fmt.Errorf("%s: %w", p, err)
	}
	if len(p.Conflist) == 0 { // its record is lost
		if i, ok := m.intended(p.ID); ok {
			i.Pod.NetNS = cmp.Or(p.NetNS, i.Pod.NetNS)
			p = i.Pod
		}
	}
	networks, err := m.networksOf(p)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	if !slices.ContainsFunc(networks, portsByPlugin) {
		m.claims.Free(p.ID)
	}
	if !Pinned(p.NetNS) {
		p.NetNS = "" // after a reboot, say: plugins then release what is outside of it
	}
	var errs []error
	for _, c := range networks {
		rt, err := runtimeConf(p, c)
		if err != nil {
			// Setup refused the pod with this configuration, but perhaps not with an earlier one.
			rt, err = runtimeConf(Pod{ID: p.ID, Name: p.Name, Namespace: p.Namespace, UID: p.UID, NetNS: p.NetNS}, c)
		}
		if err == nil {
			m.dropTornCache(c, rt)
			err = m.cni.DelNetworkList(withRefusals(ctx, &refusals{del: m.refused(p.ID, c)}), c.NetworkConfigList, rt)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: network %s: %w", p, c.Name, withContext(ctx, err)))
		}
	}
	if len(errs) == 0 && len(networks) > 0 {
		m.fulfilled(p.ID)
	}
	if len(errs) == 0 {
		m.claims.Free(p.ID)
	}
	return errors.Join(errs...)
}

// networksOf collects the configurations that the pod may have been added with: the one that its record or intent has, those
// that cached results have, and else the current one, since plugins that were interrupted leave no result.
func (m *Manager) networksOf(p Pod) ([]*conflist, error) {
	byName := map[string]*conflist{}
	cached, err := m.cached(p.ID)
	if err != nil {
		return nil, err
	}
	for _, c := range cached {
		byName[c.Name] = c
	}
	if len(p.Conflist) > 0 {
		c, err := parseConflist(p.Conflist, nil)
		if err != nil {
			return nil, fmt.Errorf("network configuration of the pod: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		byName[c.Name] = c
	}
	if len(byName) == 0 {
		m.refresh()
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.conflist == nil {
			return nil, nil // nothing on this node could have added it
		}
		byName[m.conflist.Name] = m.conflist
	}
	var all []*conflist
	for _, c := range byName {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *conflist) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

func runtimeConf(p Pod, c *conflist) (*libcni.RuntimeConf, error) {
	args, err := cniArgs(p)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(p, c)
	if err != nil {
		return nil, err
	}
	return &libcni.RuntimeConf{ContainerID: p.ID, NetNS: p.NetNS, IfName: IfName, Args: args, CapabilityArgs: caps}, nil
}

// cniArgs makes CNI_ARGS, which has no quoting: a semicolon in a name would begin another argument.
func cniArgs(p Pod) ([][2]string, error) {
	if err := utils.ValidateContainerID(p.ID); err != nil {
		return nil, fmt.Errorf("pod id %q: %w: %w", p.ID, err, errdefs.ErrInvalidArgument)
	}
	args := [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", p.Namespace},
		{"K8S_POD_NAME", p.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
		{"K8S_POD_UID", p.UID},
	}
	for _, a := range args {
		if strings.ContainsAny(a[1], ";=") || hasControl(a[1]) {
			return nil, fmt.Errorf("%s %q cannot be passed to plugins: %w", a[0], a[1], errdefs.ErrInvalidArgument)
		}
	}
	return args, nil
}

func newResult(res cnitypes.Result, rt *libcni.RuntimeConf) (*Result, error) {
	r, err := types100.NewResultFromResult(res)
	if err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	var ips []netip.Addr
	for _, ip := range r.IPs {
		if ip == nil || !ofPod(r, ip, rt) {
			continue
		}
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok && !slices.Contains(ips, addr.Unmap()) {
			ips = append(ips, addr.Unmap())
		}
	}
	if len(ips) == 0 {
		// Without one the kubelet would make the sandbox again and again.
		return nil, fmt.Errorf("the plugins returned no address for %s", rt.IfName)
	}
	slices.SortStableFunc(ips, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return &Result{IPs: ips, Raw: raw}, nil
}

// ofPod says whether an address is on the pod's interface; old versions of the specification do not tell.
func ofPod(r *types100.Result, ip *types100.IPConfig, rt *libcni.RuntimeConf) bool {
	if ip.Interface == nil || *ip.Interface < 0 || *ip.Interface >= len(r.Interfaces) {
		return true
	}
	i := r.Interfaces[*ip.Interface]
	return i == nil || i.Sandbox != "" && (i.Name == "" || i.Name == rt.IfName)
}

// withContext makes sure that an error which comes of the end of the context says so: some are turned into text on the
// way.
func withContext(ctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w: %w", err, cause)
	}
	return err
}
