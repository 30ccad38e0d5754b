package iptables

import (
	"strings"
	"testing"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// wantRestores compares what metrics are told with what iptables-save shows.
func wantRestores(t *testing.T, s *nodetest.Space, p *Programmer, backend string, failures, partial uint64) {
	t.Helper()
	for f, got := range p.Restores() {
		rules := map[string]int{"filter": 0, "nat": 0}
		err := s.Do(func() error {
			have, err := programs{family: model.Family(f), backend: backend}.save()
			for c, r := range have {
				if isProxys(c.name) {
					rules[c.table.String()] += len(r)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for table, n := range rules {
			if table != "mangle" && got.Rules[table] != n {
				t.Errorf("%v, table %s: %d rules, the kernel has %d", model.Family(f), table, got.Rules[table], n)
			}
		}
		if model.Family(f) == model.IPv4 && (got.Failures != failures || got.Partial != partial) {
			t.Errorf("%d failures, %d of changes", got.Failures, got.Partial)
		}
	}
}

// What metrics say of rules is what there is, after a start, changes, a change that did not fit, and without the programs.
func TestRulesAndFailuresAreCounted(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		s := nodetest.NewSpace(t, "node")
		want := some()
		p := openAt(s, backend)
		if _, err := p.Sync(want); err != nil {
			t.Fatal(err)
		}
		wantRestores(t, s, p, backend, 0, 0)
		first := p.Restores()[model.IPv4]
		if first.Last["nat"] < first.Rules["nat"] || first.Rules["nat"] < 20 {
			t.Errorf("%+v", first)
		}
		was := want.ServiceList[1]
		next := nodetest.ServiceOf("b", nodetest.PortOf(model.UDP, ip4.Pods(1), was.Ports[0].Frontends...))
		apply := func(old, next *model.Service) {
			t.Helper()
			if _, err := p.Apply(want.Delta(old, next)); err != nil {
				t.Fatal(err)
			}
		}
		apply(was, next)
		wantRestores(t, s, p, backend, 0, 0)
		if r := p.Restores()[model.IPv4]; r.Last["nat"] == 0 || r.Last["nat"] > 5 || r.Last["filter"] != 0 {
			t.Errorf("a change of endpoints: %+v", r)
		}
		apply(next, nil)
		wantRestores(t, s, p, backend, 0, 0)
		// A rule that is not there cannot be taken away.
		s.Run(programs{family: model.IPv4, backend: backend}.name(""), "-t", "nat", "-F", services)
		apply(want.ServiceList[0], nil)
		wantRestores(t, s, p, backend, 1, 1)
		if p.Restores()[model.IPv4].Last["nat"] == 0 {
			t.Errorf("%+v", p.Restores()[model.IPv4])
		}
		if r, err := p.Verify(); err != nil || r != (program.Report{}) {
			t.Errorf("%+v, %v", r, err)
		}
		if r := p.Restores()[model.IPv4]; r.Last["nat"] != 0 {
			t.Errorf("nothing was written: %+v", r)
		}
	})
}

// Without a program each try fails.
func TestTriesAreCounted(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, "none")
	if _, err := p.Sync(some()); err == nil || !strings.Contains(err.Error(), "iptables-none-save is not there") {
		t.Fatal(err)
	}
	if r := p.Restores()[model.IPv4]; r.Failures != attempts || r.Partial != 0 || r.Rules["nat"] != 0 {
		t.Errorf("%+v", r)
	}
}
