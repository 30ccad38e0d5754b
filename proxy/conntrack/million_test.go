package conntrack

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nft"
)

// entriesOf is how many connections there are: BERTH_CONNTRACK_ENTRIES, or as many as make a table a large one. More than
// the machine would track need root of it: it tracks as many for as long as the test takes.
func entriesOf(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv("BERTH_CONNTRACK_ENTRIES"))
	if err != nil {
		return 2 * atOnce
	}
	// Open before the thread has another namespace, from which it could not be set back.
	file, err := os.OpenFile("/proc/sys/net/netfilter/nf_conntrack_max", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	was, err := io.ReadAll(file)
	if err != nil {
		t.Fatal(err)
	}
	if most, _ := strconv.Atoi(strings.TrimSpace(string(was))); most < n+1000 {
		if _, err := file.WriteAt([]byte(strconv.Itoa(n+1000)), 0); err != nil {
			t.Skipf("the machine does not track %d connections: %v", n, err)
		}
		t.Cleanup(func() {
			if _, err := file.WriteAt(was, 0); err != nil {
				t.Errorf("nf_conntrack_max is not what it was: %v", err)
			}
		})
	}
	return n
}

// runs has the Cleaner run in the test's namespace; what is swept is sent.
func (b *table) runs() <-chan int {
	b.t.Helper()
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		b.t.Fatal(err)
	}
	swept := make(chan int, 100)
	b.Swept = func(f model.Family, took time.Duration, removed int) {
		b.t.Logf("%s is looked through in %s", f, took.Round(time.Millisecond))
		swept <- removed
	}
	b.t.Cleanup(func() { ns.Close() })
	runIn(b.t, ns, b.Cleaner)
	return swept
}

// runIn has a Cleaner run in a namespace until the test ends.
func runIn(t testing.TB, ns *os.File, c *Cleaner) {
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		err := thread.Throwaway(func() error {
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			c.Run(ctx)
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); all.Wait() })
}

// changes has Services change in the kernel, a thousand times a second, until stop says so, and says how long each took, the
// longest first.
func (k *cluster) changes(stop func(n int) bool) []time.Duration {
	k.t.Helper()
	var took []time.Duration
	for n := 0; !stop(n); n++ {
		begin := time.Now()
		k.slice("busy", "1", fmt.Sprintf("10.2.%d.%d", n/250%250, n%250+1), "10.2.255.1")
		k.commit()
		took = append(took, time.Since(begin))
		time.Sleep(time.Millisecond)
	}
	slices.Sort(took)
	slices.Reverse(took)
	return took
}

// A table of a million connections is no reason for a change to wait, or for memory to grow (kubernetes#135323 has 12 GB, and
// syncs that wait): `make test-conntrack` has a million, CI as many as make a table a large one.
func TestK8s135323_AMillionEntries(t *testing.T) {
	n := entriesOf(t)
	b := newTable(t)
	nodeHas(t, "192.0.2.1/32")
	programmer, err := nft.Open(nft.Options{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { programmer.Close() })
	k := newCluster(t, b.Cleaner)
	k.service("dns", nodePort(30053), "10.96.0.10")
	k.service("busy", nil, "10.96.0.11")
	k.slice("dns", "1", "10.1.0.1", "10.1.0.2")
	k.slice("busy", "1", "10.2.0.1")
	k.Commit()
	b.WillAll(k.State())
	if _, err := programmer.Sync(k.State()); err != nil {
		t.Fatal(err)
	}
	b.Done()
	k.program = func(d *model.Delta) {
		if _, err := programmer.Apply(d); err != nil {
			t.Fatal(err)
		}
	}

	begin := time.Now()
	tr := newTracker(t)
	stale := 0
	dns, one, two := netip.MustParseAddrPort("10.96.0.10:53"), netip.MustParseAddrPort("10.1.0.1:53"), netip.MustParseAddrPort("10.1.0.2:53")
	for i := range n {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 4000)
		switch {
		case i%100 == 0:
			tr.add(unix.IPPROTO_UDP, client, dns, one)
			stale++
		case i%3 == 0:
			tr.add(unix.IPPROTO_UDP, client, dns, two)
		default:
			tr.add(unix.IPPROTO_TCP, client, dns, one)
		}
	}
	tr.close()
	t.Logf("%d entries, %d of them stale soon, are made in %s", n, stale, time.Since(begin).Round(time.Millisecond))

	alone := k.changes(func(n int) bool { return n == 300 })
	swept := b.runs()
	next := func() (removed int) {
		t.Helper()
		select {
		case removed = <-swept:
		case <-time.After(time.Minute + time.Duration(n)*50*time.Microsecond):
			t.Fatal("the table was not looked through")
		}
		return removed
	}
	if n := next(); n != 0 {
		t.Errorf("%d entries are removed although nothing is stale", n)
	}

	heap := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	runtime.GC()
	before, most := heap(), uint64(0)
	k.slice("dns", "1", "10.1.0.2")
	k.commit()
	begin = time.Now()
	removed := 0
	beside := k.changes(func(i int) bool {
		if i%8 == 0 {
			most = max(most, heap())
		}
		select {
		case removed = <-swept:
		default:
		}
		return removed > 0
	})
	took := time.Since(begin)
	if removed != stale {
		t.Errorf("%d are removed, want %d", removed, stale)
	}
	if grown := int64(most) - int64(before); grown > 24<<20 {
		t.Errorf("memory grows by %d MiB", grown>>20)
	}
	if len(beside) < 3 {
		t.Errorf("%d changes while the table was looked through for %s: they waited for it", len(beside), took)
	}
	show := func(d []time.Duration) string {
		return fmt.Sprintf("%d: median %s, p99 %s, longest %s", len(d), d[len(d)/2], d[len(d)/100], d[0])
	}
	t.Logf("what is stale is gone %s after the change, memory grows by %d KiB", took.Round(time.Millisecond), (int64(most)-int64(before))>>10)
	t.Logf("changes alone  %s", show(alone))
	t.Logf("changes beside %s", show(beside))
}
