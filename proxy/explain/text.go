package explain

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/berth-run/berth/proxy/model"
)

// Text writes an Answer for people.
func (a *Answer) Text(to io.Writer) error {
	w := &text{tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)}
	if a.Summary != nil {
		w.summary(a)
	}
	for i := range a.Addresses {
		if i > 0 {
			w.line("")
		}
		at := &a.Addresses[i]
		w.address(at)
		if len(at.Counts) > 0 && !slices.ContainsFunc(a.Addresses[i+1:], at.countedWith) {
			w.line("  counted\t%s, at all %s addresses of the port", counts(at.Counts), at.family())
		}
	}
	for _, n := range a.Notes {
		w.line("note\t%s", n)
	}
	w.source(a)
	if a.Late {
		w.line("LATE\tchanges are not in the kernel although they should be: see the proxy's log")
	}
	w.kernel(&a.Kernel)
	return w.Flush()
}

func (w *text) source(a *Answer) {
	if a.Waiting {
		w.line("WAITING\tthe proxy on %s has not heard from the API server yet: it knows no Services, and the kernel has what it had before", a.Node)
	}
	if s := a.Silent; s != nil {
		w.line("SILENT\tsince %s (%s) the API server does not tell what changes: %s", s.Since.Format(time.RFC3339), lasting(time.Since(s.Since)), s.Error)
	}
}

type text struct{ *tabwriter.Writer }

// line writes a line; errors stay in the Writer until Flush.
func (w *text) line(format string, args ...any) { fmt.Fprintf(w, format+"\n", args...) }

func (w *text) address(a *Address) {
	if a.Service == "" {
		w.line("%s/%s\tno Service's", a.Address, a.Protocol)
	} else {
		port := ""
		if a.Port != "" {
			port = ":" + a.Port
		}
		w.line("%s/%s\t%s of %s%s", a.Address, a.Protocol, a.Kind, a.Service, port)
	}
	if len(a.Claimants) > 0 {
		w.line("  claimed by\t%s, too, which do not have it", strings.Join(a.Claimants, ", "))
	}
	if a.Restricted {
		w.line("  only from\t%s; others are DROPPED (loadBalancerSourceRanges)", listed(a.Sources))
	}
	for _, p := range a.Paths {
		switch p.Action {
		case "forward":
			w.line("  from %s\tforwarded: %s, policy %s", p.From, p.Reason, p.Policy)
		case "pass":
			w.line("  from %s\tleft alone: %s", p.From, p.Reason)
		default:
			w.line("  from %s\t%s: %s", p.From, map[string]string{"reject": "REJECTED", "drop": "DROPPED"}[p.Action], p.Reason)
		}
		if p.Masquerade != "" {
			w.line("    masqueraded\t%s: %s", p.Masquerade, p.MasqueradeReason)
		}
	}
	if a.Affinity != "" {
		w.line("  session affinity\tby client address, for %s", a.Affinity)
	}
	if a.Hash != "" {
		w.line("  consistent hash\tby %s", a.Hash)
	}
	switch c := a.Client; {
	case c == nil:
	case c.By == "affinity":
		w.line("  this client\t%s, for another %s (session affinity)", c.Endpoint, c.Left)
	default:
		w.line("  this client\t%s (consistent hash)", c.Endpoint)
	}
	if a.Hints != "" {
		w.line("  topology\t%s", a.Hints)
	}
	w.endpoints(a)
}

// countedWith is whether another address has the same Counts: those of one port in one family.
func (a *Address) countedWith(o Address) bool {
	return a.Service == o.Service && a.Port == o.Port && a.Protocol == o.Protocol && a.family() == o.family()
}

func (a *Address) family() model.Family {
	if strings.HasPrefix(a.Address, "[") {
		return model.IPv6
	}
	return model.IPv4
}

// counts writes connections first.
func counts(all map[string]uint64) string {
	out := []string{}
	if n, ok := all["connections"]; ok {
		out = append(out, fmt.Sprintf("%d connections", n))
	}
	for _, cause := range slices.Sorted(maps.Keys(all)) {
		if cause != "connections" {
			out = append(out, fmt.Sprintf("%d packets refused (%s)", all[cause], cause))
		}
	}
	return strings.Join(out, ", ")
}

func (w *text) endpoints(a *Address) {
	if a.Service != "" && len(a.Endpoints) == 0 {
		w.line("  endpoints\tnone in any EndpointSlice")
	}
	policy, several := "", false
	for _, e := range a.Endpoints {
		several = several || e.Policy != a.Endpoints[0].Policy
	}
	for _, e := range a.Endpoints {
		if e.Policy != policy {
			if policy = e.Policy; several {
				w.line("  endpoints, policy %s", policy)
			} else {
				w.line("  endpoints")
			}
		}
		where := ""
		if e.Local {
			where = ", this node"
		}
		if e.Weight != 1 {
			where += fmt.Sprintf(", weight %d", e.Weight)
		}
		if len(e.Zones) > 0 {
			where += ", hinted for " + strings.Join(e.Zones, " ")
		}
		w.line("    %s\t%5.1f%%  %s%s", e.Address, 100*e.Share, e.Why, where)
	}
}

// shown is how many lines of the kernel's there are; JSON has all.
const shown = 24

func (w *text) kernel(k *Kernel) {
	if !k.Read {
		if k.Note != "" {
			w.line("kernel\tnot read: %s", k.Note)
		}
		return
	}
	if len(k.Differences) == 0 {
		w.line("kernel\tas it should be: all rules, %d elements", k.Elements)
	} else {
		w.line("KERNEL\tDIFFERS from what it should be:")
	}
	for i, d := range k.Differences {
		if i == shown {
			w.line("  and %d more (-o json has all)", len(k.Differences)-i)
			break
		}
		w.line("  %s", d)
	}
	for i, line := range k.Have {
		if i == shown {
			w.line("  and %d more (-o json has all)", len(k.Have)-i)
			break
		}
		w.line("  %s", line)
	}
}

func (w *text) summary(a *Answer) {
	s := a.Summary
	zone := ""
	if a.Zone != "" {
		zone = ", zone " + a.Zone
	}
	w.line("node\t%s%s, mode %s", a.Node, zone, a.Mode)
	w.line("Services\t%d, with %d ports, %d addresses and %d endpoints", s.Services, s.Ports, s.Addresses, s.Endpoints)
	for _, f := range s.Families {
		if !f.Used { // the kernel can do it, and that is all
			continue
		}
		w.line("%s\tpods: %s; node ports at %s; cluster IPs in %s", f.Family, f.Pods, listed(f.NodePorts), listed(f.ServiceCIDRs))
	}
	for _, l := range []struct {
		what string
		list []string
	}{{"rejecting", s.Rejecting}, {"dropping", s.Dropping}, {"left out", s.Problems}} {
		for i, line := range l.list {
			if i == 0 {
				w.line("%s\t%s", l.what, line)
			} else {
				w.line("\t%s", line)
			}
		}
	}
	if len(s.Refused) > 0 {
		w.line("counted\t%s", counts(s.Refused))
	}
}

func listed(all []string) string {
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, ", ")
}
