package nft

import (
	"testing"

	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

func open(t testing.TB, s *nodetest.Space) program.Programmer {
	return openAt(s, Options{Counters: true})
}

func TestPackets(t *testing.T) { nodetest.Packets(t, open) }

// What the kernel does to packets is what the model says. BERTH_WORLDS is how many random ones there are.
func TestKernelDoesWhatTheModelSays(t *testing.T) { nodetest.DoesWhatTheModelSays(t, open, 6) }
