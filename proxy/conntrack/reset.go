package conntrack

import (
	"time"

	"github.com/berth-run/berth/internal/conntrack"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Connections of TCP whose endpoint is gone are reset: their entries are removed, and packets of either side are answered by
// a reset from then on (program.Resetter), which is right by the sequence number that each packet asks for. A side that is idle
// is made to send one: what gets a SYN for a connection that it has answers by an acknowledgement of what it has got (RFC 5961,
// 4.2; RFC 793 has it for all but a SYN in the window, which ends the connection itself).

// Sides that have not been told are asked again after askAgain: a kernel answers a connection twice a second at most
// (tcp_invalid_ratelimit). From then on it is askNext while some of them answer, for older kernels answer a thousand a second in all
// (tcp_challenge_ack_limit), and else twice as long each time, up to askMost after the first time: packets are answered not much longer.
const (
	askAgain = 600 * time.Millisecond
	askNext  = time.Second
	askMost  = 25 * time.Second
)

// flows are a connection's, each way, as they come to the node.
func (s *found) flows() [2]program.Flow {
	return [2]program.Flow{{Src: s.original.Src, Dst: s.original.Dst}, {Src: s.reply.Src, Dst: s.reply.Dst}}
}

// reset resets connections.
func (c *Cleaner) reset(gone []found) error {
	if len(gone) == 0 || c.Resets == nil {
		return nil
	}
	flows := make([]program.Flow, 0, 2*len(gone))
	for i := range gone {
		f := gone[i].flows()
		flows = append(flows, f[:]...)
	}
	// First of all, so that nothing of them is taken for the begin of a connection to another endpoint.
	if err := c.Resets.Answer(flows); err != nil {
		return err
	}
	var n [model.Families]int
	defer func() {
		for f := range n {
			if n[f] > 0 {
				c.Reset(model.Family(f), n[f])
			}
		}
	}()
	asked := flows[:0]
	for i := range gone {
		there, err := c.conn.Delete(gone[i].key)
		if err != nil {
			c.ask(asked)
			return err
		}
		if !there { // it ended by itself, or another one is in its place
			continue
		}
		n[model.FamilyOf(gone[i].original.Dst.Addr())]++
		f := gone[i].flows()
		asked = append(asked, f[:]...)
	}
	c.ask(asked)
	return nil
}

// ask asks those who send flows for a packet, and again later.
func (c *Cleaner) ask(flows []program.Flow) {
	if len(flows) == 0 {
		return
	}
	c.probes.send(c.Log, flows)
	c.probes.waiting = append(c.probes.waiting, newAsked(flows, time.Now()))
}

// again asks those who have not been told.
func (c *Cleaner) again() {
	due := c.probes.due()
	if due.IsZero() || time.Until(due) > 0 {
		return
	}
	answering, err := c.Resets.Answering()
	if err != nil {
		c.Log.Debug("it is not known which connections are still to be reset", "error", err)
		c.probes.waiting = nil
		return
	}
	now := time.Now()
	left := c.probes.waiting[:0]
	for _, a := range c.probes.waiting {
		if a.next.After(now) {
			left = append(left, a)
			continue
		}
		if a.answered(answering, now) {
			c.probes.send(c.Log, a.flows)
			left = append(left, a)
		}
	}
	clear(c.probes.waiting[len(left):])
	c.probes.waiting = left
}

// states of TCP as conntrack has them (linux/netfilter/nf_conntrack_tcp.h).
const (
	synSent     = 1
	established = 3
)

// judge says what is to be done about an entry, if it is stale.
func (w *work) judge(e *conntrack.Entry, here node) (found, bool) {
	tcp := e.Protocol == uint8(model.TCP)
	if tcp && e.TCPState != established && e.TCPState != synSent { // it ends by itself
		return found{}, false
	}
	at, t, orphan := w.find(e, here)
	if !orphan && (t == nil || !t.stale(e.Original.Dst, e.Reply.Src)) {
		return found{}, false
	}
	return found{e.Key(), e.Original, e.Reply, at, orphan, tcp && e.TCPState == established}, true
}
