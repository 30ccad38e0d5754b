package iptables

import (
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// backends are what the kernel may have rules of iptables in.
var backends = []string{"nft", "legacy"}

// eachBackend runs a test with those that work here.
func eachBackend(t *testing.T, test func(t *testing.T, backend string)) {
	for _, backend := range backends {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			s := nodetest.NewSpace(t, "probe")
			for f := range model.Family(model.Families) {
				p := programs{family: f, backend: backend}
				if _, err := exec.LookPath(p.name("restore")); err != nil {
					t.Skip(err)
				}
				if out, err := s.Try(p.name(""), "-t", "nat", "-S"); err != nil {
					t.Skipf("the kernel does not do it: %s", out)
				}
			}
			test(t, backend)
		})
	}
}

// openAt opens a Programmer in a namespace.
func openAt(s *nodetest.Space, backend string) *Programmer {
	s.T.Helper()
	p, err := Open(Options{MasqueradeBit: 14, Period: time.Hour, backend: backend, enter: s.Do})
	if err != nil {
		s.T.Fatal(err)
	}
	s.T.Cleanup(func() { p.Close() })
	return p
}

func opener(backend string) nodetest.Open {
	return func(_ testing.TB, s *nodetest.Space) program.Programmer { return openAt(s, backend) }
}

// listing is what iptables-save shows of both families, without counters and comments.
func listing(s *nodetest.Space, backend string) string {
	s.T.Helper()
	var out strings.Builder
	for f := range model.Family(model.Families) {
		for line := range strings.Lines(s.Run(programs{family: f, backend: backend}.name("save"))) {
			if name, _, ok := strings.Cut(line, " ["); ok && strings.HasPrefix(line, ":") {
				line = name + "\n"
			}
			if !strings.HasPrefix(line, "#") {
				out.WriteString(line)
			}
		}
	}
	return out.String()
}

func TestPackets(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) { nodetest.Packets(t, opener(backend)) })
}

// What the kernel does to packets is what the model says. BERTH_WORLDS is how many random ones there are, of the same as in package nft.
func TestKernelDoesWhatTheModelSays(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) { nodetest.DoesWhatTheModelSays(t, opener(backend), 3) })
}

func sorted(text string) string {
	lines := strings.Split(text, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func prefixes(all ...string) (out []netip.Prefix) {
	for _, s := range all {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func nameOf(namespace, name string) types.NamespacedName {
	return types.NamespacedName{Namespace: namespace, Name: name}
}
