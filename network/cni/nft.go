package cni

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
)

// nftConn speaks to nf_tables in the network namespace of the thread that opened it. Numbers of nf_tables are big endian.
type nftConn struct {
	sock   *nl.NetlinkSocket
	netns  uint64 // the namespace's number
	cookie uint64 // what no other namespace has as long as the node runs; before Linux 5.14 the number
	pid    uint32
	seq    uint32
	broken bool // answers may be missing, or on their way
}

// openNFT takes a connection that is kept, or makes one.
func openNFT() (*nftConn, error) {
	netns, err := netnsNumber()
	if err != nil {
		return nil, fmt.Errorf("netfilter: %w", err)
	}
	if c := take(func(i *idle) bool { return i.conn.netns == netns }); c != nil {
		return c, nil
	}
	sock, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("netfilter: %w", err)
	}
	pid, err := sock.GetPid()
	if err == nil {
		err = errors.Join(sock.SetSendTimeout(&nftTimeout), sock.SetReceiveTimeout(&nftTimeout))
	}
	if err != nil {
		sock.Close()
		return nil, fmt.Errorf("netfilter: %w", err)
	}
	cookie, err := unix.GetsockoptUint64(sock.GetFd(), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		cookie = netns
	}
	return &nftConn{sock: sock, netns: netns, cookie: cookie, pid: pid}, nil
}

// nftTimeout is for an answer of the kernel, which may have to load modules.
var nftTimeout = unix.Timeval{Sec: 20}

// close gives the connection back.
func (c *nftConn) close() {
	if c.broken {
		c.sock.Close()
		return
	}
	keep(c)
}

// attr is a netlink attribute. Its content is what the parts are one after the other.
func attr(kind uint16, parts ...[]byte) []byte {
	b := make([]byte, unix.SizeofRtAttr)
	for _, p := range parts {
		b = append(b, p...)
	}
	binary.NativeEndian.PutUint16(b, uint16(len(b)))
	binary.NativeEndian.PutUint16(b[2:], kind)
	for len(b)%unix.NLMSG_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func str(s string) []byte { return append([]byte(s), 0) }

// nftMsg is a message to nf_tables.
type nftMsg struct {
	kind   uint16 // NFT_MSG_*
	flags  uint16
	family byte
	attrs  [][]byte

	echo        bool   // the number of the new rule is to be told
	chain, what string // if not empty, where and for what it is to be remembered
}

// genmsg is struct nfgenmsg.
func genmsg(family byte, resource uint16) []byte {
	return append([]byte{family, unix.NFNETLINK_V0}, binary.BigEndian.AppendUint16(nil, resource)...)
}

func (c *nftConn) header(kind, flags uint16, body ...[]byte) []byte {
	c.seq++
	size := unix.SizeofNlMsghdr
	for _, b := range body {
		size += len(b)
	}
	m := make([]byte, 0, size)
	m = binary.NativeEndian.AppendUint32(m, uint32(size))
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = binary.NativeEndian.AppendUint16(m, flags|unix.NLM_F_REQUEST)
	m = binary.NativeEndian.AppendUint32(m, c.seq)
	m = binary.NativeEndian.AppendUint32(m, c.pid)
	for _, b := range body {
		m = append(m, b...)
	}
	return m
}

func (c *nftConn) message(m nftMsg) []byte {
	return c.header(unix.NFNL_SUBSYS_NFTABLES<<8|m.kind, m.flags, append([][]byte{genmsg(m.family, 0)}, m.attrs...)...)
}

func (c *nftConn) send(b []byte) error {
	err := unix.Sendto(c.sock.GetFd(), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err != nil {
		c.broken = true
		return fmt.Errorf("netfilter: %w", err)
	}
	return nil
}

func (c *nftConn) receive() ([]syscall.NetlinkMessage, error) {
	msgs, _, err := c.sock.Receive()
	if err != nil {
		c.broken = true
		return nil, fmt.Errorf("netfilter: %w", err)
	}
	return msgs, nil
}

// get asks, and returns the answers without their headers. It asks anew where tables have changed meanwhile.
func (c *nftConn) get(m nftMsg) ([][]byte, error) {
	for {
		all, torn, err := c.getOnce(m)
		if !torn || err != nil {
			return all, err
		}
	}
}

func (c *nftConn) getOnce(m nftMsg) (all [][]byte, torn bool, err error) {
	if err := c.send(c.message(m)); err != nil {
		return nil, false, err
	}
	seq := c.seq
	for {
		msgs, err := c.receive()
		if err != nil {
			return nil, false, err
		}
		for _, r := range msgs {
			switch {
			case r.Header.Seq != seq:
				continue
			case r.Header.Type == unix.NLMSG_ERROR:
				return all, torn, errnoOf(r.Data)
			case r.Header.Type == unix.NLMSG_DONE:
				return all, torn, nil
			}
			torn = torn || r.Header.Flags&unix.NLM_F_DUMP_INTR != 0
			if len(r.Data) >= len(genmsg(0, 0)) {
				all = append(all, r.Data[len(genmsg(0, 0)):])
			}
			if r.Header.Flags&unix.NLM_F_MULTI == 0 {
				return all, torn, nil
			}
		}
	}
}

// errnoOf is the errno of a message of type NLMSG_ERROR, nil if it is an acknowledgement.
func errnoOf(data []byte) error {
	if len(data) < 4 {
		return errors.New("netfilter: short answer")
	}
	if errno := -int32(binary.NativeEndian.Uint32(data)); errno != 0 {
		return unix.Errno(errno)
	}
	return nil
}

// commit has the kernel take all messages, or none. It tells the numbers that new rules got, those that are to be told, by the
// places of their messages.
func (c *nftConn) commit(msgs []nftMsg) (handles map[int]uint64, err error) {
	if len(msgs) == 0 {
		return nil, nil
	}
	b := c.header(unix.NFNL_MSG_BATCH_BEGIN, 0, genmsg(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES))
	first := c.seq
	for i, m := range msgs {
		if i == len(msgs)-1 {
			m.flags |= unix.NLM_F_ACK
		}
		if m.echo {
			m.flags |= unix.NLM_F_ECHO
		}
		b = append(b, c.message(m)...)
	}
	b = append(b, c.header(unix.NFNL_MSG_BATCH_END, 0, genmsg(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES))...)
	if err := c.send(b); err != nil {
		return nil, err
	}
	handles = map[int]uint64{}
	var failed error
	for {
		answers, err := c.receive()
		if err != nil {
			return nil, err
		}
		for _, r := range answers {
			number := int(r.Header.Seq - first) // of the message; that of the beginning is 0
			switch {
			case number < 0 || number > len(msgs):
				continue
			case r.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE && len(r.Data) > len(genmsg(0, 0)):
				handles[number-1] = readRule(r.Data[len(genmsg(0, 0)):]).handle
				continue
			case r.Header.Type != unix.NLMSG_ERROR:
				continue
			}
			if err := errnoOf(r.Data); err != nil && failed == nil {
				failed = fmt.Errorf("netfilter: message %d of %d: %w", number, len(msgs), err)
			}
			// The error of the whole is that of its beginning.
			if number == 0 || number == len(msgs) {
				return handles, failed
			}
		}
	}
}

// nftTable is a table of nf_tables, and the changes of it that are to be made at once.
type nftTable struct {
	*nftConn
	family  byte
	name    string
	changes []nftMsg
}

// openNFTTable opens a table of a family (NFPROTO_*), which need not be there.
func openNFTTable(family byte, name string) (*nftTable, error) {
	conn, err := openNFT()
	if err != nil {
		return nil, err
	}
	return &nftTable{nftConn: conn, family: family, name: name}, nil
}

// nfproto is the number of the IPv4 or IPv6 family in netfilter.
func nfproto(v6 bool) byte {
	if v6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

func (t *nftTable) change(kind, flags uint16, attrs ...[]byte) {
	t.changes = append(t.changes, nftMsg{kind: kind, flags: flags, family: t.family, attrs: attrs})
}

// apply makes the changes.
func (t *nftTable) apply() error {
	_, err := t.applyTold()
	return err
}

// applyTold is apply, and tells the numbers of the new rules that are to be told, in the order in which they were made.
func (t *nftTable) applyTold() (told []uint64, err error) {
	handles, err := t.commit(t.changes)
	for i, m := range t.changes {
		h, ok := handles[i]
		if !ok || err != nil {
			continue
		}
		told = append(told, h)
		if m.what != "" {
			t.remember(m.chain, m.what, h)
		}
	}
	t.changes = nil
	return told, err
}

// tell has the number of the rule told that was added last, and remembered if what is not empty.
func (t *nftTable) tell(chain, what string) {
	m := &t.changes[len(t.changes)-1]
	m.echo, m.chain, m.what = true, chain, what
}

func (t *nftTable) add() {
	t.change(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, attr(unix.NFTA_TABLE_NAME, str(t.name)))
}

func (t *nftTable) remove() {
	t.change(unix.NFT_MSG_DELTABLE, 0, attr(unix.NFTA_TABLE_NAME, str(t.name)))
}

// nftBase says where the kernel comes to a chain.
type nftBase struct {
	kind     string
	hook     uint32
	priority int32
}

// addChain makes a chain if it is not there; base may be nil. more are further attributes. What comes to its end is accepted.
func (t *nftTable) addChain(name string, base *nftBase, more ...[]byte) {
	a := [][]byte{attr(unix.NFTA_CHAIN_TABLE, str(t.name)), attr(unix.NFTA_CHAIN_NAME, str(name))}
	if base != nil {
		a = append(a,
			attr(unix.NFTA_CHAIN_HOOK, attr(unix.NFTA_HOOK_HOOKNUM, be32(base.hook)), attr(unix.NFTA_HOOK_PRIORITY, be32(uint32(base.priority)))),
			attr(unix.NFTA_CHAIN_TYPE, str(base.kind)))
	}
	t.change(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, append(a, more...)...)
}

const (
	nfDrop   = 0 // NF_DROP
	nfAccept = 1 // NF_ACCEPT
)

// deleteChain deletes a chain with its rules.
func (t *nftTable) deleteChain(name string) {
	t.change(unix.NFT_MSG_DELRULE, 0, attr(unix.NFTA_RULE_TABLE, str(t.name)), attr(unix.NFTA_RULE_CHAIN, str(name)))
	t.change(unix.NFT_MSG_DELCHAIN, 0, attr(unix.NFTA_CHAIN_TABLE, str(t.name)), attr(unix.NFTA_CHAIN_NAME, str(name)))
}

// hasChain says whether there is a chain of that name.
func (t *nftTable) hasChain(name string) (bool, error) {
	_, err := t.get(t.getChain(name))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

func (t *nftTable) getChain(name string) nftMsg {
	return nftMsg{kind: unix.NFT_MSG_GETCHAIN, family: t.family, attrs: [][]byte{
		attr(unix.NFTA_CHAIN_TABLE, str(t.name)), attr(unix.NFTA_CHAIN_NAME, str(name)),
	}}
}

// listed is told the chains whose rules are listed, and how many there are. Tests count them.
var listed = func(chain string, rules int) {}

// nftRule is a rule that is there.
type nftRule struct {
	handle   uint64
	exprs    nftExprs
	userdata []byte
}

// rules lists the rules of a chain; there are none in one that does not exist.
func (t *nftTable) rules(chain string) ([]nftRule, error) {
	msgs, err := t.get(nftMsg{kind: unix.NFT_MSG_GETRULE, flags: unix.NLM_F_DUMP, family: t.family, attrs: [][]byte{
		attr(unix.NFTA_RULE_TABLE, str(t.name)), attr(unix.NFTA_RULE_CHAIN, str(chain)),
	}})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("rules of chain %s: %w", chain, err)
	}
	var all []nftRule
	for _, m := range msgs {
		all = append(all, readRule(m))
	}
	listed(chain, len(all))
	return all, nil
}

// rule is the rule of that number in a chain.
func (t *nftTable) rule(chain string, handle uint64) (nftRule, error) {
	msgs, err := t.get(nftMsg{kind: unix.NFT_MSG_GETRULE, family: t.family, attrs: [][]byte{
		attr(unix.NFTA_RULE_TABLE, str(t.name)), attr(unix.NFTA_RULE_CHAIN, str(chain)), attr(unix.NFTA_RULE_HANDLE, be64(handle)),
	}})
	switch {
	case err != nil:
		return nftRule{}, fmt.Errorf("rule %d of chain %s: %w", handle, chain, err)
	case len(msgs) == 0:
		return nftRule{}, fmt.Errorf("rule %d of chain %s: %w", handle, chain, unix.ENOENT)
	}
	return readRule(msgs[0]), nil
}

func readRule(m []byte) (r nftRule) {
	nftables.Attrs(m, func(kind uint16, content []byte) {
		switch kind {
		case unix.NFTA_RULE_HANDLE:
			r.handle = binary.BigEndian.Uint64(content)
		case unix.NFTA_RULE_EXPRESSIONS:
			r.exprs = readExprs(content)
		case unix.NFTA_RULE_USERDATA:
			r.userdata = content
		}
	})
	return r
}

// addRule adds a rule, at the end or first. more are further attributes.
func (t *nftTable) addRule(chain string, first bool, exprs nftExprs, more ...[]byte) {
	var flags uint16 = unix.NLM_F_CREATE
	if !first {
		flags |= unix.NLM_F_APPEND
	}
	t.change(unix.NFT_MSG_NEWRULE, flags, append([][]byte{
		attr(unix.NFTA_RULE_TABLE, str(t.name)), attr(unix.NFTA_RULE_CHAIN, str(chain)), attr(unix.NFTA_RULE_EXPRESSIONS, exprs...),
	}, more...)...)
}

func (t *nftTable) deleteRule(chain string, handle uint64) {
	t.change(unix.NFT_MSG_DELRULE, 0,
		attr(unix.NFTA_RULE_TABLE, str(t.name)), attr(unix.NFTA_RULE_CHAIN, str(chain)), attr(unix.NFTA_RULE_HANDLE, be64(handle)))
}
