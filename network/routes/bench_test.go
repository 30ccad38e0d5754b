package routes

import (
	"fmt"
	"testing"
	"time"
)

// crowd are so many nodes behind routers.
func crowd(n int) (nodes []Node) {
	for i := range n {
		nodes = append(nodes, object(fmt.Sprint("n", i), i, fmt.Sprintf("172.16.%d.%d 10.%d.%d.0/24,fd10:%x::/64", i/200, i%200+1, 20+i/127, i%127*2, i)))
	}
	return nodes
}

func BenchmarkPlan5000(b *testing.B) {
	nodes := append(crowd(5000), self)
	for b.Loop() {
		if plan, err := Compute(Input{Mode: VXLAN, Self: "me", PodCIDRs: ownCIDRs(), Links: []Link{lan}, Nodes: nodes}); err != nil || len(plan.Routes) != 10000 {
			b.Fatal(err, len(plan.Routes))
		}
	}
}

// TestThousandsOfNodes tells how long a cluster of 3,000 nodes takes, in both families: at first, when nothing differs, and
// when one node goes. Their sets are more than a socket takes in one message by default.
func TestThousandsOfNodes(t *testing.T) {
	h := newHost(t)
	nodes := crowd(3000)
	for _, round := range []struct {
		what  string
		nodes []Node
	}{{"at first", nodes}, {"nothing differs", nodes}, {"a node goes", nodes[1:]}, {"it comes", nodes}} {
		plan := h.plan(VXLAN, round.nodes...)
		began := time.Now()
		h.put(plan)
		t.Logf("%s: %v", round.what, time.Since(began))
		if routes := h.command("ip", "route", "show", "proto", "98"); len(routes) != len(round.nodes) {
			t.Errorf("%s: %d routes", round.what, len(routes))
		}
	}
	began := time.Now()
	h.do(withdraw)
	t.Logf("withdrawn: %v", time.Since(began))
	h.wantState("withdrawn")
}
