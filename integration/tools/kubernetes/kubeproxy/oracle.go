// Package kubeproxy is compiled by kubeproxy.sh as a part of kube-proxy's own packages k8s.io/kubernetes/pkg/proxy/nftables and iptables,
// beside their tests: what is not declared here, in a file of that name or in integration/kubeproxy/wire.go is theirs. It has kube-proxy
// make its rules for a cluster; nftables.go says what these do with packets.
package nftables

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy"
	kubeproxyconfig "k8s.io/kubernetes/pkg/proxy/apis/config"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"
	proxyutiltest "k8s.io/kubernetes/pkg/proxy/util/testing"
	utilnode "k8s.io/kubernetes/pkg/util/node"
	netutils "k8s.io/utils/net"
)

// TestBerthOracle answers the questions that come by descriptor 3 on descriptor 4 until there are no more.
func TestBerthOracle(t *testing.T) {
	if os.Getenv("BERTH_ORACLE") == "" {
		t.Skip("nobody asks")
	}
	in, out := os.NewFile(3, "questions"), os.NewFile(4, "answers")
	questions, answers := json.NewDecoder(in), json.NewEncoder(out)
	var o oracle
	for {
		var q ClusterQuestion
		if err := questions.Decode(&q); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		if err := answers.Encode(o.answer(t, &q)); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			// Of a rule that the tracer does not know nothing can be said: whoever asks is told once, and reads why on standard output.
			t.FailNow()
		}
	}
}

// oracle is kube-proxy on a node: one proxier for each family.
type oracle struct {
	started  *ClusterQuestion
	families []*family
}

type family struct {
	proxier *Proxier
	kernel
	services map[string]*v1.Service
	slices   map[string]*discovery.EndpointSlice
	zone     string
	cidrs    []string
}

func (o *oracle) answer(t *testing.T, q *ClusterQuestion) (a ClusterAnswer) {
	defer func() {
		if t.Failed() {
			a.Error = "a rule of kube-proxy's cannot be followed: see what its test program prints"
		}
	}()
	if o.started == nil || !sameStart(o.started, q) {
		if err := o.start(q); err != nil {
			return ClusterAnswer{Error: err.Error()}
		}
	}
	o.started = q
	for _, f := range o.families {
		if err := f.update(q); err != nil {
			return ClusterAnswer{Error: err.Error()}
		}
	}
	for i := range q.Packets {
		p := &q.Packets[i]
		fate := PacketFate{Action: "pass"}
		for _, f := range o.families {
			if (f.proxier.ipFamily == v1.IPv6Protocol) == strings.Contains(p.Dst, ":") {
				fate = f.trace(t, p, q.NodeIPs)
			}
		}
		a.Fates = append(a.Fates, fate)
	}
	if q.Rules {
		for _, f := range o.families {
			a.Rules += f.dump()
		}
	}
	return a
}

// sameStart is whether a kube-proxy goes on running: it ends when the Node's addresses or pod CIDRs change.
func sameStart(a, b *ClusterQuestion) bool {
	facts := func(q *ClusterQuestion) any {
		ips, cidrs := nodeFacts(q.Node)
		return []any{q.Config, q.NodeIPs, ips, cidrs}
	}
	return reflect.DeepEqual(facts(a), facts(b))
}

func nodeFacts(n *v1.Node) ([]net.IP, []string) {
	if n == nil {
		return nil, nil
	}
	ips, _ := utilnode.GetNodeHostIPs(n)
	return ips, n.Spec.PodCIDRs
}

// start starts a kube-proxy on a node without its rules.
func (o *oracle) start(q *ClusterQuestion) error {
	if err := utilfeature.DefaultMutableFeatureGate.Set(fmt.Sprintf("AllowServiceExternalIPs=%t", !q.Config.NoExternalIPs)); err != nil {
		return err
	}
	c := &kubeproxyconfig.KubeProxyConfiguration{
		BindAddress: q.Config.BindAddress, DetectLocalMode: kubeproxyconfig.LocalMode(q.Config.DetectLocal),
		DetectLocal: kubeproxyconfig.DetectLocalConfiguration{
			ClusterCIDRs: q.Config.ClusterCIDRs, BridgeInterface: q.Config.BridgeInterface, InterfaceNamePrefix: q.Config.InterfaceNamePrefix,
		},
	}
	hostIPs, podCIDRs := nodeFacts(q.Node)
	primary, nodeIPs := detectNodeIPs(context.Background(), hostIPs, c.BindAddress)
	c.NodePortAddresses = expandNodePortAddressKeywords(q.Config.NodePortAddresses, nodeIPs)
	detectors := getLocalDetectors(klog.Background(), primary, c, podCIDRs)
	network := proxyutiltest.NewFakeNetwork()
	var addrs []net.Addr
	for _, ip := range q.NodeIPs {
		addrs = append(addrs, &net.IPNet{IP: netutils.ParseIPSloppy(ip), Mask: net.CIDRMask(24, 32)})
	}
	network.AddInterfaceAddr(&net.Interface{Name: "eth0"}, addrs)
	o.families = nil
	for ipFamily, on := range map[v1.IPFamily]bool{v1.IPv4Protocol: q.Config.IPv4, v1.IPv6Protocol: q.Config.IPv6} {
		if !on {
			continue
		}
		k, p := newKernel(ipFamily)
		p.nodeName, p.nodeIP, p.masqueradeAll = q.Config.NodeName, nodeIPs[ipFamily], q.Config.MasqueradeAll
		p.localDetector, p.networkInterfacer = detectors[ipFamily], network
		p.nodePortAddresses = proxyutil.NewNodePortAddresses(ipFamily, c.NodePortAddresses)
		p.endpointsChanges = proxy.NewEndpointsChangeTracker(ipFamily, q.Config.NodeName, newEndpointInfo, nil)
		p.servicesSynced, p.endpointSlicesSynced = true, true
		o.families = append(o.families, &family{
			proxier: p, kernel: k, services: map[string]*v1.Service{}, slices: map[string]*discovery.EndpointSlice{},
		})
	}
	return nil
}

// update tells the proxier what its informers would of what has changed, and has it sync.
func (f *family) update(q *ClusterQuestion) error {
	services, endpoints := map[string]*v1.Service{}, map[string]*discovery.EndpointSlice{}
	for _, s := range q.Services {
		// The selectors that kube-proxy watches with.
		if _, others := s.Labels["service.kubernetes.io/service-proxy-name"]; !others && s.Spec.ClusterIP != v1.ClusterIPNone {
			services[s.Namespace+"/"+s.Name] = s
		}
	}
	for _, s := range q.Slices {
		if _, headless := s.Labels[v1.IsHeadlessService]; !headless {
			endpoints[s.Namespace+"/"+s.Name] = s
		}
	}
	changes(f.services, services, f.proxier.OnServiceAdd, f.proxier.OnServiceUpdate, f.proxier.OnServiceDelete)
	changes(f.slices, endpoints, f.proxier.OnEndpointSliceAdd, f.proxier.OnEndpointSliceUpdate, f.proxier.OnEndpointSliceDelete)
	f.services, f.slices = services, endpoints
	labels, zone := map[string]string{}, ""
	if q.Node != nil {
		if z, ok := q.Node.Labels[v1.LabelTopologyZone]; ok {
			labels[v1.LabelTopologyZone], zone = z, z
		}
	}
	if f.zone != zone {
		f.zone = zone
		f.proxier.OnTopologyChange(labels)
	}
	if !slices.Equal(f.cidrs, q.ServiceCIDRs) {
		f.cidrs = q.ServiceCIDRs
		f.proxier.OnServiceCIDRsChanged(q.ServiceCIDRs)
		// kube-proxy does not do so by itself: new CIDRs are in its rules with the next full sync, an hour later at most.
		f.proxier.needFullSync = true
	}
	f.forget()
	return f.proxier.syncProxyRules()
}

// changes tells the difference between two lists, which are by name.
func changes[T any](old, now map[string]T, add func(T), update func(T, T), remove func(T)) {
	for name, o := range old {
		if _, ok := now[name]; !ok {
			remove(o)
		}
	}
	for name, n := range now {
		if o, ok := old[name]; !ok {
			add(n)
		} else if !reflect.DeepEqual(o, n) {
			update(o, n)
		}
	}
}
