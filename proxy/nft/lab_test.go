package nft

import (
	"slices"
	"strings"
	"testing"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// lab is a node with pods, a client outside, and the node's Programmer.
type lab struct {
	*nodetest.Lab
	p *Programmer
}

func newLab(t testing.TB, pods int) *lab {
	t.Helper()
	l := &lab{Lab: nodetest.New(t, pods)}
	l.p = openAt(l.Node, Options{Counters: true})
	return l
}

// eachFamily runs a test on a lab for both families.
func eachFamily(t *testing.T, pods int, test func(*testing.T, *lab, nodetest.Family)) {
	for _, f := range nodetest.Families {
		t.Run(f.Name, func(t *testing.T) {
			t.Parallel()
			test(t, newLab(t, pods), f)
		})
	}
}

// openAt opens a Programmer in a namespace.
func openAt(s *nodetest.Space, o Options) *Programmer {
	s.T.Helper()
	var p *Programmer
	if err := s.Do(func() (err error) { p, err = Open(o); return err }); err != nil {
		s.T.Fatal(err)
	}
	s.T.Cleanup(func() { p.Close() })
	return p
}

func (l *lab) sync(s *nodetest.State) Report {
	l.T.Helper()
	r, err := l.p.Sync(s)
	if err != nil {
		l.T.Fatal(err)
	}
	return r
}

// apply has a Service be another one.
func (l *lab) apply(s *nodetest.State, old, next *model.Service) Report {
	l.T.Helper()
	r, err := l.p.Apply(s.Delta(old, next))
	if err != nil {
		l.T.Fatal(err)
	}
	return r
}

func sorted(lines []string) string {
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
