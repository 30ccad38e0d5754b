package model

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// HashAnnotation is on Services: source has all connections from an address go to one endpoint, source-and-port those from an
// address and port; /BUCKETS may follow (HashBuckets). All nodes choose the same one, and one that goes takes few with it but
// its own.
const HashAnnotation = "berth.run/consistent-hash"

// HashBuckets are how many buckets a table may have; without another word it is 1021. All are primes, as Table needs it.
var HashBuckets = []uint16{251, 1021, 4093}

const defaultBuckets = 1021

// HashSeed is that of Sum, on all nodes.
const HashSeed = 0x62657274

// HashBy is what of a packet says which endpoint it is sent to.
type HashBy uint8

// What connections are hashed by.
const (
	// Unhashed: an endpoint is drawn for each connection.
	Unhashed HashBy = iota
	// BySource is by the source's address.
	BySource
	// BySourcePort is by address and port.
	BySourcePort
)

// String is what HashAnnotation says; "" for Unhashed.
func (b HashBy) String() string {
	return [...]string{BySource: "source", BySourcePort: "source-and-port"}[b]
}

// Hash is how endpoints are chosen by a hash. The zero value draws them.
type Hash struct {
	By      HashBy
	Buckets uint16
}

func readHash(text string) (Hash, error) {
	by, number, sized := strings.Cut(strings.TrimSpace(text), "/")
	h := Hash{Buckets: defaultBuckets}
	switch by {
	case "source":
		h.By = BySource
	case "source-and-port":
		h.By = BySourcePort
	default:
		return Hash{}, fmt.Errorf("%q is neither source nor source-and-port", by)
	}
	if sized {
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil || !slices.Contains(HashBuckets, uint16(n)) {
			return Hash{}, fmt.Errorf("%q is none of %v buckets", number, HashBuckets)
		}
		h.Buckets = uint16(n)
	}
	return h, nil
}

// text is what the annotation says.
func (h Hash) text() string {
	by := h.By.String()
	if h.Buckets != defaultBuckets {
		by += "/" + strconv.Itoa(int(h.Buckets))
	}
	return by
}

// hashAt is what can be had of a Service's hash.
func (spec *serviceSpec) hashAt(c *circumstances) Hash {
	if c.noHash || spec.rangesHash && c.noRanges {
		return Hash{}
	}
	return spec.hash
}

// fits is whether a table has a bucket for each endpoint.
func (h Hash) fits(list []Endpoint) bool { return len(list) <= int(h.Buckets) }

// Table is which endpoint of a list each bucket has; nil for one that is drawn from, or has one endpoint. It is the same for the same endpoints and
// weights, on whatever node: Maglev's (Eisenbud et al., NSDI 2016, 3.4). Each endpoint has an order of buckets of its own, by its
// address, and takes the first free one of it when it is its turn, until none is free; it has as many turns as its weight says,
// and one at least. Since ports do not count, all ports of a Service send a client to the same pod, as long as they have the
// same endpoints.
func (h Hash) Table(list []Endpoint) []uint16 {
	if h.By == Unhashed || len(list) < 2 || !h.fits(list) {
		return nil
	}
	type turns struct {
		next, skip     uint32
		weight, credit int
	}
	size, most := uint32(h.Buckets), 1
	all := make([]turns, len(list))
	for i, e := range list {
		name := e.Addr.As16()
		sum := sha256.Sum256(name[:])
		all[i] = turns{
			next:   uint32(binary.BigEndian.Uint64(sum[:]) % uint64(size)),
			skip:   uint32(binary.BigEndian.Uint64(sum[8:])%uint64(size-1)) + 1,
			weight: max(1, int(e.Weight)),
		}
		most = max(most, all[i].weight)
	}
	for i := range all {
		all[i].credit = most - all[i].weight
	}
	const free = 1<<16 - 1
	table := slices.Repeat([]uint16{free}, int(size))
	for left := len(table); ; {
		for i := range all {
			t := &all[i]
			if t.credit += t.weight; t.credit < most {
				continue
			}
			t.credit -= most
			for table[t.next] != free {
				t.next = (t.next + t.skip) % size
			}
			table[t.next] = uint16(i)
			if left--; left == 0 {
				return table
			}
		}
	}
}

// Bucket is that of a source; port is 0 where it is not hashed by.
func (h Hash) Bucket(src netip.Addr, port uint16) int {
	b := src.Unmap().AsSlice()
	if h.By == BySourcePort {
		b = append(binary.BigEndian.AppendUint16(b, port), 0, 0)
	}
	return int(uint64(jhash(b, HashSeed)) * uint64(h.Buckets) >> 32)
}

// jhash is the kernel's hash (include/linux/jhash.h; lookup3.c by Bob Jenkins) of a length that is a multiple of four, as
// little-endian processors have it.
func jhash(b []byte, seed uint32) uint32 {
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(b[4*i:]) }
	x := 0xdeadbeef + uint32(len(b)) + seed
	a, c, d := x, x, x
	for ; len(b) > 12; b = b[12:] {
		a, c, d = a+word(0), c+word(1), d+word(2)
		a, d = (a-d)^bits.RotateLeft32(d, 4), d+c
		c, a = (c-a)^bits.RotateLeft32(a, 6), a+d
		d, c = (d-c)^bits.RotateLeft32(c, 8), c+a
		a, d = (a-d)^bits.RotateLeft32(d, 16), d+c
		c, a = (c-a)^bits.RotateLeft32(a, 19), a+d
		d, c = (d-c)^bits.RotateLeft32(c, 4), c+a
	}
	for i, to := range []*uint32{&a, &c, &d}[:len(b)/4] {
		*to += word(i)
	}
	d = (d ^ c) - bits.RotateLeft32(c, 14)
	a = (a ^ d) - bits.RotateLeft32(d, 11)
	c = (c ^ a) - bits.RotateLeft32(a, 25)
	d = (d ^ c) - bits.RotateLeft32(c, 16)
	a = (a ^ d) - bits.RotateLeft32(d, 4)
	c = (c ^ a) - bits.RotateLeft32(a, 14)
	return (d ^ c) - bits.RotateLeft32(c, 24)
}
