package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Batch is a transaction under construction. Its zero value is empty.
type Batch struct {
	Buffer
	at   int      // where the message that is open begins
	ends []int    // where messages end
	what []string // what each is about, for errors
	glue []bool   // whether one has to be in the transaction of the next
}

// headerSize is that of a message without attributes; batchOverhead are the two around a batch.
const (
	headerSize    = unix.SizeofNlMsghdr + 4
	batchOverhead = 2 * headerSize
)

// Begin opens a message of NFT_MSG_*; what is the object that it is about, for errors.
func (b *Batch) Begin(kind, flags uint16, family byte, what string) {
	if len(b.ends) == 0 {
		b.Buffer.Reset()
		at := b.header(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
		b.finish(at, 0)
	}
	b.at = b.header(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags, family, 0)
	b.what = append(b.what, what)
}

// End closes the message.
func (b *Batch) End() {
	b.ends = append(b.ends, b.Len())
	b.glue = append(b.glue, false)
	b.finish(b.at, uint32(len(b.ends)))
}

// Glue has the message that was closed last be in the transaction of the next one, if the batch is split.
func (b *Batch) Glue() { b.glue[len(b.glue)-1] = true }

// Split makes batches of one, in the same order, none of which is larger than the limit if it can be.
func (b *Batch) Split(limit int) []*Batch {
	var all []*Batch
	first := 0 // of the part
	for i := range b.ends {
		if i+1 < len(b.ends) && (b.glue[i] || b.size(first, b.group(i+1)) <= limit) {
			continue
		}
		all = append(all, b.part(first, i))
		first = i + 1
	}
	return all
}

// group is the last message of those that are glued to one.
func (b *Batch) group(i int) int {
	for i+1 < len(b.ends) && b.glue[i] {
		i++
	}
	return i
}

func (b *Batch) start(i int) int {
	if i == 0 {
		return headerSize // behind the begin
	}
	return b.ends[i-1]
}

func (b *Batch) size(first, last int) int { return b.ends[last] - b.start(first) + batchOverhead }

func (b *Batch) part(first, last int) *Batch {
	p := &Batch{what: slices.Clone(b.what[first : last+1]), glue: make([]bool, last-first+1)}
	p.b = append(slices.Clone(b.b[:b.start(0)]), b.b[b.start(first):b.ends[last]]...)
	for i := first; i <= last; i++ {
		at := b.start(i) - b.start(first) + b.start(0)
		p.ends = append(p.ends, b.ends[i]-b.start(first)+b.start(0))
		binary.NativeEndian.PutUint32(p.b[at+8:], uint32(i-first+1))
	}
	return p
}

// Empty says whether there is no message in it.
func (b *Batch) Empty() bool { return len(b.ends) == 0 }

// Messages is how many messages there are.
func (b *Batch) Messages() int { return len(b.ends) }

// Size is how many bytes will be sent, as far as it is built.
func (b *Batch) Size() int { return max(b.Len(), headerSize) + headerSize }

// Clear takes all messages out.
func (b *Batch) Clear() {
	b.Buffer.Reset()
	b.ends, b.what, b.glue = b.ends[:0], b.what[:0], b.glue[:0]
}

// ErrTooLarge is a batch that a socket's buffer has no room for.
var ErrTooLarge = errors.New("larger than the socket's send buffer")

// RefusedError is a batch that the kernel has not taken. It is the errno, by errors.Is.
type RefusedError struct {
	What  string // the object that was refused, empty if it was the batch as a whole
	Text  string // what the kernel says about it, often nothing
	Errno unix.Errno
}

func (e *RefusedError) Error() string {
	s := "nf_tables"
	if e.What != "" {
		s += ": " + e.What
	}
	if e.Text != "" {
		s += ": " + e.Text
	}
	return s + ": " + e.Errno.Error()
}

// Unwrap is the errno.
func (e *RefusedError) Unwrap() error { return e.Errno }

// Commit has the kernel take all messages of a batch, or none, and empties the batch in any case. It returns once the
// change is in force.
func (c *Conn) Commit(b *Batch) error {
	if b.Empty() {
		return nil
	}
	defer b.Clear()
	last := len(b.ends) - 1
	start := b.start(last)
	flags := binary.NativeEndian.Uint16(b.b[start+6:])
	binary.NativeEndian.PutUint16(b.b[start+6:], flags|unix.NLM_F_ACK)
	at := b.header(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	b.finish(at, uint32(len(b.ends)+1))
	if b.Len() > c.limit {
		return fmt.Errorf("nf_tables: a transaction of %d bytes: %w (%d)", b.Len(), ErrTooLarge, c.limit)
	}
	base := c.number(b)
	if err := c.send(b.b); err != nil {
		return err
	}
	return c.outcome(b, base)
}

// number gives all messages sequence numbers that no earlier message of the connection had.
func (c *Conn) number(b *Batch) (base uint32) {
	base = c.seq + 1
	c.seq += uint32(len(b.ends) + 2)
	for at := 0; at < b.Len(); {
		n := binary.NativeEndian.Uint32(b.b[at+8:])
		binary.NativeEndian.PutUint32(b.b[at+8:], base+n)
		at += int(binary.NativeEndian.Uint32(b.b[at:]))
	}
	return base
}

// outcome waits for what the kernel says about a batch. It acknowledges the last message whether or not others were refused;
// the error of the whole is that of its beginning.
func (c *Conn) outcome(b *Batch, base uint32) error {
	var failed error
	for {
		done := false
		err := c.receive(func(m message) error {
			if m.kind != unix.NLMSG_ERROR || m.seq-base > uint32(len(b.ends)) {
				return nil
			}
			n := int(m.seq - base)
			done = done || n == 0 || n == len(b.ends)
			errno := errnoOf(m.body)
			if errno == 0 || failed != nil {
				return nil
			}
			e := &RefusedError{Errno: errno, Text: errorText(m)}
			if n > 0 {
				e.What = b.what[n-1]
			}
			failed = e
			return nil
		})
		if err != nil {
			return errors.Join(failed, err)
		}
		if done {
			return failed
		}
	}
}

// errnoOf is the error of a message of type NLMSG_ERROR, 0 if it is an acknowledgement.
func errnoOf(body []byte) unix.Errno {
	if len(body) < 4 {
		return unix.EBADMSG
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
}

// errorText is what the kernel says in words (NLMSGERR_ATTR_MSG). With NETLINK_CAP_ACK the attributes follow the header of
// the message that is refused.
func errorText(m message) (text string) {
	const head = 4 + unix.SizeofNlMsghdr
	if m.flags&unix.NLM_F_ACK_TLVS == 0 || len(m.body) < head {
		return ""
	}
	Attrs(m.body[head:], func(kind uint16, content []byte) {
		if kind == unix.NLMSGERR_ATTR_MSG {
			text = Text(content)
		}
	})
	return text
}
