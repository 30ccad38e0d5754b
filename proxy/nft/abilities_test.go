package nft

import (
	"strings"
	"testing"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// What the kernel can do is found out without a trace.
func TestAbilities(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	if a := p.Abilities(); a != (program.Abilities{Hash: true, Ranges: true, Resets: true}) {
		t.Errorf("%+v", a)
	}
	if err := p.Supported(); err != nil {
		t.Error(err)
	}
	f := layers[model.IPv4]
	if p.takes(f, endpoints, (&rb{f: f}).add("no-such-expression", nil)) {
		t.Error("an expression that there is not is taken for possible")
	}
	if list := s.Run("nft", "list", "ruleset"); strings.TrimSpace(list) != "" {
		t.Error(list)
	}
	if _, err := p.Sync(nodetest.NewState()); err != nil {
		t.Error(err)
	}
}
