package nft

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// addResets adds Services whose connections are reset to a State.
func addResets(s *nodetest.State) {
	for _, f := range nodetest.Families {
		s.ServiceList = append(s.ServiceList, nodetest.ServiceOf(f.Name+"-reset", withResets(nodetest.PortOf(model.TCP, f.Pods(1, 2), f.LoadBalancer(9000)))))
	}
}

func withResets(p model.Port) model.Port {
	p.Resets, p.Members = true, p.Cluster
	return p
}

// Flows that are put in are there, for a time, and are no change that has to be undone.
func TestFlowsAreAnswered(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	four := program.Flow{Src: netip.MustParseAddrPort("192.0.2.2:40000"), Dst: netip.MustParseAddrPort("10.96.0.1:80")}
	six := program.Flow{Src: netip.MustParseAddrPort("[fd02::2]:40000"), Dst: netip.MustParseAddrPort("[fd96::1]:80")}
	if all, err := p.Resets().Answering(); err != nil || len(all) != 0 {
		t.Errorf("without a table: %v, %v", all, err)
	}
	if err := p.Resets().Answer([]program.Flow{four}); err == nil {
		t.Error("without a table flows are taken")
	}
	st := nodetest.NewState()
	addResets(st)
	if _, err := p.Sync(st); err != nil {
		t.Fatal(err)
	}
	for range 2 { // once more is no mistake
		if err := p.Resets().Answer([]program.Flow{four, six}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := p.Resets().Answering()
	_, hasFour := all[four]
	_, hasSix := all[six]
	if err != nil || len(all) != 2 || !hasFour || !hasSix {
		t.Errorf("%v, %v", all, err)
	}
	list := s.Run("nft", "list", "set", "ip", Table, "resets")
	if !strings.Contains(list, "192.0.2.2 . 40000 . 10.96.0.1 . 80 timeout 30s") {
		t.Error(list)
	}
	if r, err := p.Verify(); err != nil || r.Elements+r.Objects != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if all, err := p.Resets().Answering(); len(all) != 2 {
		t.Errorf("after Verify: %v, %v", all, err)
	}
	if found, err := p.Inspector().Inspect(program.Scope{}); err != nil || len(found.Differences) != 0 {
		t.Errorf("%v, %v", found.Differences, err)
	}
	select {
	case by := <-p.Changed():
		t.Errorf("the tables were changed by %q", by)
	case <-time.After(200 * time.Millisecond):
	}
	// Many go in parts that a socket has room for.
	var many []program.Flow
	for i := range 20000 {
		many = append(many, program.Flow{Src: netip.AddrPortFrom(six.Src.Addr(), uint16(i)), Dst: six.Dst})
	}
	if err := p.Resets().Answer(many); err != nil {
		t.Fatal(err)
	}
	// A set that has grown is hashed anew in the background, and a list lacks some of it meanwhile.
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		all, err := p.Resets().Answering()
		if err == nil && len(all) >= 20000 {
			break
		}
		if err != nil || time.Since(began) > 10*time.Second {
			t.Fatalf("%d flows, %v", len(all), err)
		}
	}
	// More than there is room for are refused, and said to be.
	var full error
	for i := 0; full == nil && i < 8; i++ {
		for j := range many {
			many[j].Dst = netip.AddrPortFrom(six.Dst.Addr(), uint16(i+1000))
		}
		full = p.Resets().Answer(many)
	}
	if full == nil || !strings.Contains(full.Error(), "65536 connections") {
		t.Errorf("%v", full)
	}
}

// Rules come with the first Service that asks for them, by a change, and go when none does, by the next comparison.
func TestRulesForResetsComeAndGo(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	st := nodetest.NewState()
	if _, err := p.Sync(st); err != nil {
		t.Fatal(err)
	}
	has := func() bool { return strings.Contains(s.Run("nft", "list", "table", "ip", Table), "chain reset-probes") }
	if has() {
		t.Error("there are rules")
	}
	plain := nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, nodetest.Families[0].Pods(1), nodetest.ClusterIP("10.96.0.1:80")))
	asks := nodetest.ServiceOf("web", withResets(plain.Ports[0]))
	for _, step := range []struct {
		old, next *model.Service
		want      bool
	}{{nil, plain, false}, {plain, asks, true}, {asks, plain, true}} {
		if _, err := p.Apply(st.Delta(step.old, step.next)); err != nil {
			t.Fatal(err)
		}
		if has() != step.want {
			t.Errorf("rules: %v", has())
		}
	}
	if strings.Contains(s.Run("nft", "list", "ruleset"), "table ip6 "+Table+" {\n\tset resets") {
		t.Error("there are rules for a family that has no such Service")
	}
	if _, err := p.Verify(); err != nil || has() {
		t.Errorf("rules %v, %v", has(), err)
	}
}

// Whatever a key is, it is a flow of those bytes or none.
func FuzzFlow(f *testing.F) {
	f.Add([]byte{192, 0, 2, 2, 156, 64, 0, 0, 10, 96, 0, 1, 0, 80, 0, 0})
	f.Add(make([]byte, 40))
	f.Fuzz(func(t *testing.T, k []byte) {
		flow, ok := flowOf(k)
		if ok != (len(k) == 16 || len(k) == 40) {
			t.Fatal(ok)
		}
		if again, _ := flowOf(flowKey(flow)); ok && again != flow {
			t.Errorf("%v is %v", flow, again)
		}
		if !ok && flow.Src.IsValid() || bytes.Equal(k, nil) && ok {
			t.Error(flow)
		}
	})
}
