package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// resetTime is for how long packets of a connection whose endpoint is gone are answered by resets: until it has been said often
// enough. What comes later goes to another endpoint, which resets it, or is rejected.
const resetTime = 30 * time.Second

// addResets makes the chains that answer packets of connections whose endpoint is gone (program.Resetter). Whoever sends one
// learns it from the answer, which has the sequence number that the packet asked for.
//
// Conntrack has been made to forget these connections: packets of a new one by the same addresses and ports are no longer
// unknown to it once it was answered, and its first one takes the flow out of the set.
func (l *layout) addResets() {
	flow, back := key{l.source(), fromPort, l.destination(), port}, key{l.destination(), port, l.source(), fromPort}
	answered := func() *rb { return l.rule().isUnknown().isTCP().in(flow, "resets").goTo("reset-peer") }
	for _, b := range []struct {
		name string
		base base
		rule *rb
	}{
		{"reset-prerouting", base{"filter", unix.NF_INET_PRE_ROUTING, afterConntrack}, answered()},
		{"reset-output", base{"filter", unix.NF_INET_LOCAL_OUT, afterConntrack}, answered()},
		// Conntrack would take it for a connection the other way around, and what it draws for the answer.
		{"reset-probes", base{"filter", unix.NF_INET_LOCAL_OUT, beforeConntrack}, l.rule().isTCP().hasFlags(tcpSYN|tcpACK, tcpSYN).hasNoWindow().
			in(back, "resets").untracked().note("what makes idle peers send a packet")},
	} {
		l.chain(b.name, "", b.rule)
		l.chains[len(l.chains)-1].base = &b.base
	}
	l.chain("reset-peer", "connections whose endpoint is gone",
		l.rule().isTCP().hasFlags(tcpSYN|tcpACK, tcpSYN).forget(flow, "resets").returns().note("a new connection"),
		l.rule().isTCP().hasFlags(tcpRST, tcpRST).forget(flow, "resets").drop().note("the peer knows"),
		l.rule().isTCP().count().rejectReset())
}

// Resets puts flows into the tables of a Programmer (program.Resetter). It may be used from any goroutine, once the kernel has been made to
// have a Port with Resets in the family of a flow.
type Resets struct {
	mu    sync.Mutex
	conn  *nftables.Conn
	table string
	batch nftables.Batch
}

// Resets has packets answered by resets.
func (p *Programmer) Resets() *Resets { return p.resets }

func (r *Resets) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conn.Close()
}

// Answer is for program.Resetter.
func (r *Resets) Answer(flows []program.Flow) error {
	err := r.answer(flows)
	if errors.Is(err, unix.ENFILE) {
		return fmt.Errorf("%w: no more than %d connections are reset at a time, others wait", err, resetLimit/2)
	}
	return err
}

func (r *Resets) answer(flows []program.Flow) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.batch.Clear()
	for _, f := range layers {
		r.put(f, flows)
	}
	if r.batch.Size() > r.conn.Limit() {
		for _, part := range r.batch.Split(r.conn.Limit()) {
			if err := r.conn.Commit(part); err != nil {
				return err
			}
		}
		return nil
	}
	return r.conn.Commit(&r.batch)
}

func (r *Resets) put(f layer, flows []program.Flow) {
	var list nftables.Nest
	n := 0
	end := func() {
		r.batch.Close(list)
		r.batch.End()
		n = 0
	}
	for i := range flows {
		if model.FamilyOf(flows[i].Dst.Addr()) != f.model {
			continue
		}
		if n == 0 {
			r.batch.Begin(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, f.family, fmt.Sprintf("table %s %s: elements of resets", f, r.table))
			r.batch.String(unix.NFTA_SET_ELEM_LIST_TABLE, r.table)
			r.batch.String(unix.NFTA_SET_ELEM_LIST_SET, "resets")
			list = r.batch.Open(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		}
		one := r.batch.Open(unix.NFTA_LIST_ELEM)
		k := r.batch.Open(unix.NFTA_SET_ELEM_KEY)
		r.batch.Bytes(unix.NFTA_DATA_VALUE, flowKey(flows[i]))
		r.batch.Close(k)
		r.batch.Uint64(unix.NFTA_SET_ELEM_TIMEOUT, uint64(resetTime.Milliseconds()))
		r.batch.Close(one)
		if n++; n == messageElements {
			end()
		}
	}
	if n > 0 {
		end()
	}
}

func flowKey(f program.Flow) []byte {
	var b []byte
	for _, at := range [...]netip.AddrPort{f.Src, f.Dst} {
		b = append(b, at.Addr().AsSlice()...)
		b = append(binary.BigEndian.AppendUint16(b, at.Port()), 0, 0)
	}
	return b
}

// flowOf is the opposite of flowKey.
func flowOf(k []byte) (program.Flow, bool) {
	if len(k) != 2*(4+4) && len(k) != 2*(16+4) {
		return program.Flow{}, false
	}
	at := func(b []byte) netip.AddrPort {
		addr, _ := netip.AddrFromSlice(b[:len(b)-4])
		return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[len(b)-4:]))
	}
	return program.Flow{Src: at(k[:len(k)/2]), Dst: at(k[len(k)/2:])}, true
}

// Answering is for program.Resetter.
func (r *Resets) Answering() (map[program.Flow]struct{}, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := map[program.Flow]struct{}{}
	for _, f := range layers {
		err := dump(r.conn, unix.NFT_MSG_GETSETELEM, f.family, ofSet(r.table, "resets"), func() {}, func(attrs []byte) {
			eachElement(attrs, func(one []byte) {
				nftables.Attrs(one, func(kind uint16, content []byte) {
					if kind != unix.NFTA_SET_ELEM_KEY {
						return
					}
					if flow, ok := flowOf(valueOf(content)); ok {
						all[flow] = struct{}{}
					}
				})
			})
		})
		if err != nil && !errors.Is(err, unix.ENOENT) { // a family without the set
			return nil, fmt.Errorf("read table %s %s: elements of resets: %w", f, r.table, err)
		}
	}
	return all, nil
}

// canReset says whether the kernel would take the chains that addResets makes. It changes nothing.
func (p *Programmer) canReset() bool {
	for _, f := range layers {
		var b nftables.Batch
		o := objects{Batch: &b, table: p.table + "-" + strconv.Itoa(os.Getpid())}
		l := &layout{layer: f}
		l.addSets(&params{resets: true})
		l.sets = l.sets[resets : resets+1]
		l.addResets()
		o.addTable(f)
		o.change(&layout{}, l)
		o.deleteChain(f, "none") // the transaction ends with an error
		err := p.conn.Commit(&b)
		var refused *nftables.RefusedError
		if errors.As(err, &refused) && !strings.Contains(refused.What, " none") && !errors.Is(err, unix.EPERM) {
			return false
		}
	}
	return true
}
