package nftables

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Buffer is a netlink message, or several, under construction. Its zero value is empty.
type Buffer struct {
	b []byte
}

// Nest is an attribute that is open: what is put in until Close is its content.
type Nest int

// Reset empties the buffer, and keeps its memory.
func (b *Buffer) Reset() { b.b = b.b[:0] }

// Len is its size in bytes.
func (b *Buffer) Len() int { return len(b.b) }

// Encoded is what it holds, valid until it is changed.
func (b *Buffer) Encoded() []byte { return b.b }

// Open begins an attribute with attributes inside.
func (b *Buffer) Open(kind uint16) Nest {
	at := len(b.b)
	b.b = binary.NativeEndian.AppendUint16(b.b, 0)
	b.b = binary.NativeEndian.AppendUint16(b.b, kind|unix.NLA_F_NESTED)
	return Nest(at)
}

// Close ends an attribute.
func (b *Buffer) Close(n Nest) {
	binary.NativeEndian.PutUint16(b.b[n:], uint16(len(b.b)-int(n)))
}

// Bytes puts an attribute in.
func (b *Buffer) Bytes(kind uint16, content []byte) {
	b.b = binary.NativeEndian.AppendUint16(b.b, uint16(unix.SizeofRtAttr+len(content)))
	b.b = binary.NativeEndian.AppendUint16(b.b, kind)
	b.b = append(b.b, content...)
	b.pad()
}

// String puts an attribute in that is a string, with the zero at its end.
func (b *Buffer) String(kind uint16, s string) {
	b.b = binary.NativeEndian.AppendUint16(b.b, uint16(unix.SizeofRtAttr+len(s)+1))
	b.b = binary.NativeEndian.AppendUint16(b.b, kind)
	b.b = append(b.b, s...)
	b.b = append(b.b, 0)
	b.pad()
}

// Uint32 puts an attribute in that is a number.
func (b *Buffer) Uint32(kind uint16, v uint32) {
	b.b = binary.NativeEndian.AppendUint16(b.b, unix.SizeofRtAttr+4)
	b.b = binary.NativeEndian.AppendUint16(b.b, kind)
	b.b = binary.BigEndian.AppendUint32(b.b, v)
}

// Uint64 puts an attribute in that is a number of 64 bits.
func (b *Buffer) Uint64(kind uint16, v uint64) {
	b.b = binary.NativeEndian.AppendUint16(b.b, unix.SizeofRtAttr+8)
	b.b = binary.NativeEndian.AppendUint16(b.b, kind)
	b.b = binary.BigEndian.AppendUint64(b.b, v)
}

// Raw puts attributes in that are encoded already.
func (b *Buffer) Raw(attrs []byte) { b.b = append(b.b, attrs...) }

func (b *Buffer) pad() {
	for len(b.b)%unix.NLMSG_ALIGNTO != 0 {
		b.b = append(b.b, 0)
	}
}

// header begins a message; finish ends it.
func (b *Buffer) header(kind, flags uint16, family byte, resource uint16) (at int) {
	at = len(b.b)
	b.b = binary.NativeEndian.AppendUint32(b.b, 0)
	b.b = binary.NativeEndian.AppendUint16(b.b, kind)
	b.b = binary.NativeEndian.AppendUint16(b.b, flags|unix.NLM_F_REQUEST)
	b.b = append(b.b, make([]byte, 8)...) // sequence number and port
	b.b = append(b.b, family, unix.NFNETLINK_V0)
	b.b = binary.BigEndian.AppendUint16(b.b, resource)
	return at
}

func (b *Buffer) finish(at int, seq uint32) {
	binary.NativeEndian.PutUint32(b.b[at:], uint32(len(b.b)-at))
	binary.NativeEndian.PutUint32(b.b[at+8:], seq)
}

// Attrs calls f for each attribute of a message's body or of an attribute, without the flags of its kind. What is cut off is
// left out.
func Attrs(b []byte, f func(kind uint16, content []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:size])
		b = b[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
}

// Text is the content of an attribute that is a string.
func Text(content []byte) string {
	for i, c := range content {
		if c == 0 {
			return string(content[:i])
		}
	}
	return string(content)
}

// Uint32 is the content of an attribute that is a number, 0 if it is none.
func Uint32(content []byte) uint32 {
	if len(content) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(content)
}

// Uint64 is the content of an attribute that is a number of 64 bits, 0 if it is none.
func Uint64(content []byte) uint64 {
	if len(content) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(content)
}

// RawAttrs is Attrs for what was built by Buffer: f is told whether there are attributes inside.
func RawAttrs(b []byte, f func(kind uint16, nested bool, content []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return
		}
		kind := binary.NativeEndian.Uint16(b[2:])
		f(kind&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), kind&unix.NLA_F_NESTED != 0, b[unix.SizeofRtAttr:size])
		b = b[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
}
