package explain

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/berth-run/berth/proxy/model"
)

// pathOf says what becomes of a client's packet.
func pathOf(v *model.Verdict, g *model.FamilyGlobals, from netip.Addr) Path {
	p := Path{From: from.String(), Action: v.Action.String(), Reason: string(v.Reason)}
	if v.Action != model.Forward {
		return p
	}
	p.Policy, p.Masquerade = policyOf(v).String(), "no"
	if v.Masquerade {
		p.Masquerade = "yes"
	}
	p.MasqueradeReason = whyMasquerade(v, g)
	if itself := func(e model.Endpoint) bool { return !v.Masquerade && v.Masquerades(e) }; slices.ContainsFunc(v.Endpoints, itself) {
		p.MasqueradeReason += "; yes where it is sent to itself: the answer has to come back through the node"
	}
	return p
}

// whyMasquerade says why a packet that is forwarded gets the node's address for a source, or does not.
func whyMasquerade(v *model.Verdict, g *model.FamilyGlobals) string {
	switch {
	case v.Reason == model.FromNode:
		return "the node sends it past the policy Local"
	case v.Frontend.Masquerade == model.OffCluster && v.Masquerade:
		return fmt.Sprintf("no pod sends it (%s)", g.Detector)
	case v.Frontend.Masquerade == model.OffCluster:
		return fmt.Sprintf("a pod sends it (%s)", g.Detector)
	}
	return whyAlways(v.Frontend)
}

// whyAlways is whyMasquerade where it does not depend on the source.
func whyAlways(f *model.Frontend) string {
	switch external := f.Kind != model.ClusterIP; {
	case f.Masquerade == model.Always && external:
		return "externalTrafficPolicy Cluster: the endpoint may be on another node, and answers have to come back"
	case f.Masquerade == model.Always:
		return "masqueradeAll, or the cluster IP is an external address, too"
	case external:
		return "externalTrafficPolicy Local keeps the source"
	}
	return "nothing tells packets of pods from others (detectLocalMode)"
}

// pathsOf says what becomes of everybody's packets.
func pathsOf(f *model.Frontend, g *model.FamilyGlobals) []Path {
	p := Path{From: "anyone", Action: f.Action.String(), Policy: f.Policy.String(), Reason: string(model.ByPolicy)}
	switch f.Action {
	case model.Reject:
		p.Reason, p.Policy = string(model.NoEndpoints), ""
	case model.Drop:
		p.Reason, p.Policy = string(model.NoLocal), ""
	default:
		p.Masquerade, p.MasqueradeReason = "no", whyAlways(f)
		switch f.Masquerade {
		case model.Always:
			p.Masquerade = "yes"
		case model.OffCluster:
			p.Masquerade, p.MasqueradeReason = "unless a pod sends it", g.Detector.String()
		}
	}
	if !f.ShortCircuit {
		return []Path{p}
	}
	p.From = "others"
	inside := func(who string, reason model.Reason, masquerade, why string) Path {
		return Path{From: who, Action: model.Forward.String(), Reason: string(reason), Policy: model.Cluster.String(), Masquerade: masquerade, MasqueradeReason: why}
	}
	out := []Path{p}
	if g.Detector.Implemented() {
		keeps, why := "no", "a pod sends it"
		if f.Masquerade == model.Always {
			keeps, why = "yes", whyAlways(f)
		}
		out = append(out, inside("pods ("+g.Detector.String()+")", model.FromPod, keeps, why))
	}
	return append(out, inside("this node", model.FromNode, "yes", "the node sends it past the policy Local"))
}
