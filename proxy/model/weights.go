package model

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	discoveryv1 "k8s.io/api/discovery/v1"
)

// WeightsAnnotation is on Services: which endpoints have which weight, as KEY=WEIGHT, several separated by commas, of which the
// first that is for an endpoint counts. KEY is an address, a CIDR, node/NAME, zone/NAME, pod/NAME, or * for all. The name of a
// pod may lack what follows its last dash, or its last two: then it is that of its StatefulSet, DaemonSet or Deployment.
const WeightsAnnotation = "berth.run/weights"

// WeightAnnotation is on EndpointSlices: the weight of all their endpoints that WeightsAnnotation says nothing of. Without either
// it is 1.
const WeightAnnotation = "berth.run/weight"

// MaxWeight is the largest weight. An endpoint of weight 0 gets no new connections, unless all have 0.
const MaxWeight = 1000

// A Service has so many rules for weights: each is compared with each endpoint.
const maxWeightRules = 128

// weightRule says which endpoints have a weight: those in a prefix, or of that name in a way.
type weightRule struct {
	prefix netip.Prefix
	by     nameOf
	name   nameHash
	weight uint16
}

// nameOf is whose name a rule goes by.
type nameOf uint8

const (
	byAddress nameOf = iota
	byNode
	byZone
	byPod
	byNothing // all endpoints
)

// nameHash stands for a name where names are compared and nothing else: it takes less memory than the name, of which there may
// be as many as endpoints. It is another one in each process.
type nameHash uint64

var nameSeed = maphash.MakeSeed()

// hashName is 0 for no name.
func hashName(s string) nameHash {
	if s == "" {
		return 0
	}
	return nameHash(max(1, maphash.String(nameSeed, s)))
}

// origin is where an endpoint of a slice comes from. Pods are its name, and that without the last and the last two parts.
type origin struct {
	node, zone nameHash
	pods       [3]nameHash
}

func originOf(e *discoveryv1.Endpoint) (o origin) {
	if e.NodeName != nil {
		o.node = hashName(*e.NodeName)
	}
	if e.Zone != nil {
		o.zone = hashName(*e.Zone)
	}
	if e.TargetRef == nil || e.TargetRef.Kind != "Pod" {
		return o
	}
	name := e.TargetRef.Name
	for i := range o.pods {
		o.pods[i] = hashName(name)
		if name = name[:max(0, strings.LastIndexByte(name, '-'))]; name == "" {
			break
		}
	}
	return o
}

// is says whether the rule is for an endpoint.
func (r *weightRule) is(e *sliceEndpoint) bool {
	switch r.by {
	case byAddress:
		return r.prefix.Contains(e.addr)
	case byNode:
		return e.origin.node == r.name
	case byZone:
		return e.origin.zone == r.name
	case byPod:
		return slices.Contains(e.origin.pods[:], r.name)
	}
	return true
}

// weightOf is the weight of an endpoint of a slice.
func (x *sources) weightOf(s *slice, e *sliceEndpoint) uint16 {
	if x.even {
		return 1
	}
	for i := range x.weights {
		if x.weights[i].is(e) {
			return x.weights[i].weight
		}
	}
	return s.weight
}

// readWeights reads the weights of a Service; with a mistake there are none.
func readWeights(text string) ([]weightRule, error) {
	var rules []weightRule
	for part := range strings.SplitSeq(text, ",") {
		name, number, ok := strings.Cut(part, "=")
		if !ok {
			return nil, fmt.Errorf("%q is not KEY=WEIGHT", strings.TrimSpace(part))
		}
		weight, err := readWeight(number)
		if err != nil {
			return nil, err
		}
		r, err := readWeightRule(strings.TrimSpace(name))
		if err != nil {
			return nil, err
		}
		r.weight = weight
		rules = append(rules, r)
	}
	if len(rules) > maxWeightRules {
		return nil, fmt.Errorf("%d are more than %d", len(rules), maxWeightRules)
	}
	return rules, nil
}

func readWeight(text string) (uint16, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 16)
	if err != nil || n > MaxWeight {
		return 0, fmt.Errorf("%q is no number from 0 to %d", strings.TrimSpace(text), MaxWeight)
	}
	return uint16(n), nil
}

func readWeightRule(text string) (weightRule, error) {
	if text == "*" {
		return weightRule{by: byNothing}, nil
	}
	if ip, ok := parseAddr(text); ok {
		return weightRule{prefix: netip.PrefixFrom(ip, ip.BitLen())}, nil
	}
	if p, ok := parsePrefix(text); ok {
		return weightRule{prefix: p}, nil
	}
	kind, name, _ := strings.Cut(text, "/")
	by := map[string]nameOf{"node": byNode, "zone": byZone, "pod": byPod}[kind]
	if by == byAddress || name == "" {
		return weightRule{}, fmt.Errorf("%q is no address, CIDR, node/NAME, zone/NAME, pod/NAME or *", text)
	}
	return weightRule{by: by, name: hashName(name)}, nil
}

// weigh makes a list of what is picked of endpoints with weights: without those of weight 0, unless all have it; each weight as
// small as the ratios allow; none (0) if all are the same.
func weigh(list []Endpoint, weights []uint16) []Endpoint {
	if slices.Max(weights) > 0 {
		n := 0
		for i, w := range weights {
			if w > 0 {
				list[n], weights[n] = list[i], w
				n++
			}
		}
		list, weights = list[:n:n], weights[:n]
	}
	if slices.Min(weights) == slices.Max(weights) {
		return list
	}
	divisor := weights[0]
	for _, w := range weights[1:] {
		for w != 0 {
			divisor, w = w, divisor%w
		}
	}
	for i, w := range weights {
		list[i].Weight = w / divisor
	}
	return list
}

// Bounds on how many numbers there are to draw from for endpoints that have weights.
const (
	fewShares     = 1024
	sharesEach    = 8
	maxShares     = 3 << 14
	maxWithShares = 1 << 14 // endpoints; of more, all have the same share
)

// Shares is how many of the numbers that are drawn each endpoint of a list has; nil if each has one. They are the weights where
// these are 1,024 at most together, or eight for each endpoint. Else they are rounded to so many: an endpoint has one number too
// few or too many at most, and none is left without.
func Shares(list []Endpoint) []int {
	if len(list) == 0 || list[0].Weight == 0 || len(list) > maxWithShares {
		return nil
	}
	sum, limit := 0, min(max(fewShares, sharesEach*len(list)), maxShares)
	shares := make([]int, len(list))
	for i := range list {
		shares[i] = int(list[i].Weight)
		sum += shares[i]
	}
	if sum <= limit {
		return shares
	}
	left, order := limit, make([]int, len(list))
	for i := range list {
		order[i] = i
		shares[i] = max(1, shares[i]*limit/sum)
		left -= shares[i]
	}
	// What is left goes to those that have lost most by rounding down.
	lost := func(i int) int { return int(list[i].Weight)*limit - shares[i]*sum }
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(lost(b), lost(a)) })
	for _, i := range order[:max(0, min(left, len(order)))] {
		shares[i]++
	}
	return shares
}
