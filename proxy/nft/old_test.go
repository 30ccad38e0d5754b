package nft

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// What a kernel says that does not know an expression, as one that is too old, is told with what refused it and with the remedy.
func TestAKernelThatIsTooOldIsToldWithTheRemedy(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	f := layers[model.IPv4]
	var b nftables.Batch
	o := objects{Batch: &b, table: "test"}
	o.addTable(f)
	o.addChain(f, &chain{name: "services"})
	o.addRule(f, "services", &(&rb{f: f}).add("no-such-expression", nil).r)
	err := explain(p.conn.Commit(&b))
	for _, want := range []string{"rule of", "services", "needs Linux 5.13 or newer", "nft_numgen", "use mode iptables"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
	if list := s.Run("nft", "list", "ruleset"); strings.TrimSpace(list) != "" {
		t.Errorf("a half is left: %s", list)
	}
	// Without nf_tables, and without netfilter.
	for _, e := range []error{unix.EINVAL, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT} {
		if err := explain(e); !strings.Contains(err.Error(), "with nf_tables") {
			t.Error(err)
		}
	}
	if err := explain(unix.EPERM); strings.Contains(err.Error(), "needs") {
		t.Error(err)
	}
}
