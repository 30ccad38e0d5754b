package nft

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// childEnv has the test program be a proxy that is killed: it programs a crowd of Services and one that changes all the time.
const childEnv = "BERTH_NFT_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := child(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func child() error {
	p, err := Open(Options{})
	if err != nil {
		return err
	}
	return nodetest.Churn(p, 500, 30)
}

// Fifty times, and until there were ten thousand connections, the proxy is killed at a random moment, of a load or of changes, and
// started again: none of a thousand connections that are open breaks, and no new one fails.
func TestKillsLoseNoConnection(t *testing.T) {
	l := newLab(t, 2)
	f := nodetest.Families[0]
	start := func() *exec.Cmd {
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), childEnv+"=1")
		var out strings.Builder
		c.Stdout, c.Stderr = &out, &out
		if err := l.Node.Do(c.Start); err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := start()
	for began := time.Now(); ; { // until it has programmed the first time
		if a := l.Client.AskFor(nodetest.Quiet, f.TCP, nodetest.At(f.Node, 30080)); strings.HasPrefix(a, "pod") {
			break
		}
		if time.Since(began) > time.Minute {
			t.Fatal("nothing is programmed")
		}
	}
	open := l.Connections(l.Client, f.TCP, nodetest.At(f.LoadIP, 80), 1000)
	const kills, connections = 50, 10000
	var stop atomic.Bool
	var asked atomic.Int64
	var asking sync.WaitGroup
	asking.Go(func() {
		for !stop.Load() {
			if a := l.Client.Ask(f.TCP, nodetest.At(f.Node, 30080)); !strings.HasPrefix(a, "pod") {
				t.Errorf("connection %d: %q", asked.Load(), a)
			}
			asked.Add(1)
		}
	})
	killed := 0
	for ; killed < kills || asked.Load() < connections && !t.Failed(); killed++ {
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := c.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("it has ended by itself: %v %v", err, c.Stdout)
		}
		c = start()
	}
	stop.Store(true)
	asking.Wait()
	t.Logf("%d connections during %d kills", asked.Load(), killed)
	_ = c.Process.Kill()
	_ = c.Wait()
	l.Alive(open)
	// And what is left is mended.
	if _, err := l.p.Sync(nodetest.NewState(nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, f.Pods(1), f.LoadBalancer(80))))); err != nil {
		t.Fatal(err)
	}
	if r, err := l.p.Verify(); err != nil || r != (Report{}) {
		t.Errorf("%+v, %v", r, err)
	}
}
