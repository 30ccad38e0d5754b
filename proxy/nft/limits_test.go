package nft

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// Where no socket may have a larger buffer than others (a user namespace without rights on the node's), all that a small
// transaction has no room for is made in several.
func TestSmallSendBuffer(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	if err := p.conn.SetSendBuffer(208 << 10); err != nil { // net.core.wmem_default of Linux
		t.Fatal(err)
	}
	all := nodetest.Crowd(3000, 3)
	all.ServiceList = append(all.ServiceList, everything([model.Families]bool{true, true}).ServiceList...)
	all.ServiceList = all.ServiceList[3000:]
	for range 2 {
		if _, err := p.Sync(all); err != nil {
			t.Fatal(err)
		}
		all.ServiceList = append(all.ServiceList, nodetest.Crowd(3000, 3).ServiceList[100:]...)
	}
	if r, err := p.Verify(); err != nil || r != (Report{}) {
		t.Errorf("%+v, %v", r, err)
	}
	// One Service of more endpoints than a transaction has room for.
	many := nodetest.ServiceOf("many", nodetest.PortOf(model.TCP, nil, nodetest.ClusterIP("10.111.0.1:80")))
	for i := range 8000 {
		many.Ports[0].Cluster = append(many.Ports[0].Cluster, nodetest.PortOf(model.TCP, []string{fmt.Sprintf("10.1.%d.%d:80", i>>8, i&255)}, nodetest.ClusterIP("10.111.0.1:80")).Cluster...)
	}
	if _, err := p.Apply(all.Delta(nil, many)); err != nil {
		t.Fatal(err)
	}
	if r, err := p.Verify(); err != nil || r != (Report{}) {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := p.Apply(all.Delta(many, nil)); err != nil {
		t.Fatal(err)
	}
	// Rules for so many endpoints are not needed any more.
	if r, err := p.Verify(); err != nil || r.Elements != 0 || r.Objects == 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// What a program without the right gets is an error that says so, not a panic or a wait.
func TestWithoutTheRight(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	err := s.Do(func() error {
		p, err := Open(Options{})
		if err != nil {
			return err
		}
		defer p.Close()
		if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 { // this thread alone
			return errno
		}
		_, err = p.Sync(nodetest.NewState())
		return err
	})
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("%v", err)
	}
}

// An overrun of notifications is a change of anything: it is told.
func TestOverrunIsTold(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	w := &watcher{changed: make(chan string, 1), done: make(chan struct{})}
	if err := s.Do(func() (err error) { w.events, err = nftables.Watch(0); return err }); err != nil {
		t.Fatal(err)
	}
	var flood strings.Builder
	flood.WriteString("add table ip other\nadd set ip other s { type ipv4_addr; }\n")
	for i := range 100000 {
		fmt.Fprintf(&flood, "add element ip other s { 10.%d.%d.%d }\n", i>>16, i>>8&255, i&255)
	}
	if out, err := s.Input(flood.String(), "nft", "-f", "-"); err != nil {
		t.Fatal(out)
	}
	go w.run(Table)
	defer w.close()
	select {
	case by := <-w.changed:
		if by != "" {
			t.Errorf("changed by %q", by)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("not told")
	}
	// And what follows is seen.
	s.Run("nft", "add table ip "+Table)
	select {
	case <-w.changed:
	case <-time.After(10 * time.Second):
		t.Error("nothing is seen afterwards")
	}
}

// After each transaction of a load, of its change and of its end, whatever has a frontend has all that this leads to.
func TestK8s139328_LoadsAreNeverHalfThere(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	if _, err := p.Sync(nodetest.NewState()); err != nil {
		t.Fatal(err)
	}
	transactions := 0
	check := func() error {
		if p.batch.Empty() {
			return nil
		}
		if err := p.commit(); err != nil {
			return err
		}
		transactions++
		read := func(id setID) map[elemKey]elemValue {
			all, err := readElements(p.conn, layers[0], Table, id, p.writer.sets[id], 0)
			if err != nil {
				t.Fatal(err)
			}
			return all
		}
		there, numbers := read(endpoints), read(sizes)
		for k := range read(frontends) {
			first := elemKey{set: endpoints, size: k.size + 4, bytes: k.bytes}
			if _, ok := there[first]; !ok {
				return fmt.Errorf("after %d transactions %x has no endpoint", transactions, k.content())
			}
		}
		for k := range numbers {
			n := nativeOf(k.bytes[k.size-4:])
			last := elemKey{set: endpoints, size: k.size, bytes: k.bytes}
			copy(last.bytes[k.size-4:], native32(n-1))
			if _, ok := there[last]; !ok && n <= exactSizes && transactions > 0 {
				return fmt.Errorf("after %d transactions %x has fewer endpoints than numbers are drawn from", transactions, k.content())
			}
		}
		return nil
	}
	var now elements
	for _, next := range []*nodetest.State{nodetest.Crowd(4000, 2), nodetest.Crowd(4000, 3), nodetest.NewState()} {
		e := elements{groups: newGroups()}
		for _, svc := range next.ServiceList {
			e.service(svc)
		}
		old := map[elemKey]elemValue{}
		now.each(func(el *elem) { old[el.key] = el.value })
		var changes plan
		changes.diffAll(old, &e)
		before := transactions
		if err := p.writer.parts(&changes, p.conn.Limit(), check); err != nil {
			t.Fatal(err)
		}
		if transactions-before < 3 {
			t.Errorf("%d transactions are no load", transactions-before)
		}
		now = e
	}
}
