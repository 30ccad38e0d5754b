package explain

import (
	"time"

	"github.com/berth-run/berth/proxy/program"
)

// Question is what is asked.
type Question struct {
	// Target is ADDRESS:PORT, ADDRESS, :NODEPORT or NAMESPACE/SERVICE[:PORT], with /tcp, /udp or /sctp behind it or without; empty
	// for all of the node.
	Target string
	// From is a client's address; empty for any.
	From string
}

// Answer is what is said. Its JSON is for programs: fields may be added, none goes or changes its meaning.
type Answer struct {
	Node string `json:"node"`
	Zone string `json:"zone,omitempty"`
	Mode string `json:"mode"`
	// Late is whether changes are not in the kernel although they should be: /healthz says so, too.
	Late bool `json:"late,omitempty"`
	// Waiting is whether the API server has not told of all there is yet: nothing else is said then.
	Waiting bool `json:"waiting,omitempty"`
	// Loading is whether the kernel is being programmed for the first time since the proxy was started: what it has is not compared.
	Loading bool `json:"loading,omitempty"`
	// Silent is there while the API server does not tell what changes: all else is as of then.
	Silent *Silence `json:"silent,omitempty"`
	Target string   `json:"target,omitempty"`
	From   string   `json:"from,omitempty"`
	// Addresses are what the target means. Those of no Service have no service.
	Addresses []Address `json:"addresses,omitempty"`
	Summary   *Summary  `json:"summary,omitempty"`
	Notes     []string  `json:"notes,omitempty"`
	Kernel    Kernel    `json:"kernel"`
}

// Silence is since when, and why, the API server has not told what changes.
type Silence struct {
	Since time.Time `json:"since"`
	Error string    `json:"error"`
}

// Found is whether the target is a Service's, or there was none.
func (a *Answer) Found() bool {
	for i := range a.Addresses {
		if a.Addresses[i].Service != "" {
			return true
		}
	}
	return a.Summary != nil
}

// Address is an address, port and protocol.
type Address struct {
	// Address is ADDRESS:PORT, or ADDRESS:FIRST-LAST of a range of ports, which packets keep: its endpoints are addresses alone.
	Address  string `json:"address"`
	Protocol string `json:"protocol"`
	// Service is namespace/name; Port its port's name, and Kind what sort of address it is.
	Service string `json:"service,omitempty"`
	Port    string `json:"port,omitempty"`
	Kind    string `json:"kind,omitempty"`
	// Claimants are other Services that claim it, too, and do not have it.
	Claimants []string `json:"claimants,omitempty"`
	// Sources are who alone may send there, if Restricted: others are dropped (loadBalancerSourceRanges).
	Restricted bool     `json:"restricted,omitempty"`
	Sources    []string `json:"sources,omitempty"`
	Paths      []Path   `json:"paths"`
	// Affinity is for how long clients are sent to the same endpoint again; Hash is what says which, if not chance.
	Affinity string  `json:"affinity,omitempty"`
	Hash     string  `json:"hash,omitempty"`
	Client   *Client `json:"client,omitempty"`
	// Hints are what is made of those of topology.
	Hints     string     `json:"hints,omitempty"`
	Endpoints []Endpoint `json:"endpoints,omitempty"`
	// Counts are what was counted for the Service's port at all its addresses: connections, and refusals by reason.
	Counts map[string]uint64 `json:"counts,omitempty"`
}

// Path is what becomes of packets from somewhere.
type Path struct {
	// From is whose packets: a client's address, or words.
	From string `json:"from"`
	// Action is forward, reject, drop or pass; Reason says why.
	Action string `json:"action"`
	Reason string `json:"reason"`
	// Policy is whose endpoints get them: cluster or local.
	Policy string `json:"policy,omitempty"`
	// Masquerade is yes, no, or unless a pod sends it; MasqueradeReason says why.
	Masquerade       string `json:"masquerade,omitempty"`
	MasqueradeReason string `json:"masqueradeReason,omitempty"`
}

// Client is where a client is sent to.
type Client struct {
	Endpoint string `json:"endpoint"`
	// By is affinity, and then Left is for how long still, or hash.
	By   string `json:"by"`
	Left string `json:"left,omitempty"`
}

// Endpoint is one of the Service's.
type Endpoint struct {
	Address string `json:"address"`
	// Policy is under which it has its share: one that two paths have differently is there twice.
	Policy string `json:"policy"`
	Local  bool   `json:"local"`
	Weight uint16 `json:"weight"`
	// Share is from 0 to 1.
	Share       float64  `json:"share"`
	Ready       bool     `json:"ready"`
	Serving     bool     `json:"serving"`
	Terminating bool     `json:"terminating"`
	Zones       []string `json:"zones,omitempty"`
	Why         string   `json:"why"`
}

// Summary is about all of the node.
type Summary struct {
	Families  []FamilySummary `json:"families"`
	Services  int             `json:"services"`
	Ports     int             `json:"ports"`
	Addresses int             `json:"addresses"`
	Endpoints int             `json:"endpoints"`
	// Rejecting and Dropping are ports of Services with an address that rejects or drops, some of them.
	Rejecting []string `json:"rejecting,omitempty"`
	Dropping  []string `json:"dropping,omitempty"`
	// Problems are what of objects was left out, some of it.
	Problems []string `json:"problems,omitempty"`
	// Refused is how many packets were rejected or dropped, by reason.
	Refused map[string]uint64 `json:"refused,omitempty"`
}

// FamilySummary is what goes for all Services in one family.
type FamilySummary struct {
	Family string `json:"family"`
	// Used is whether the cluster has anything of it: a Service, or a range of cluster IPs or of pods.
	Used         bool     `json:"used"`
	Pods         string   `json:"pods"`
	NodePorts    []string `json:"nodePorts"`
	ServiceCIDRs []string `json:"serviceCIDRs,omitempty"`
}

// Kernel is what the kernel has, beside what it should have.
type Kernel struct {
	// Read is whether it was; Note says why not.
	Read bool   `json:"read"`
	Note string `json:"note,omitempty"`
	// Elements is how many were compared, beside all rules.
	Elements    int                  `json:"elements"`
	Have        []string             `json:"have,omitempty"`
	Differences []program.Difference `json:"differences,omitempty"`
}

// lasting writes a time for people.
func lasting(d time.Duration) string { return d.Round(time.Second).String() }
