package images

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"

	berrors "go.etcd.io/bbolt/errors"
)

// bbolt takes the pages of its file for right: of a wrong one it panics, goes round in circles, or reads outside the file,
// which ends the process. So they are looked at before, here, where each length has a bound.
//
// The format is that of bbolt's version 2, of this machine's byte order: pages of a header (id, flags, count, overflow) and
// elements, which say how far behind themselves their keys and values begin.
const (
	dbMagic      = 0xED0CDAED
	dbVersion    = 2
	dbPageHeader = 16
	dbElement    = 16
	dbMetaSum    = 56 // bytes of a meta page before its checksum
	dbMaxDepth   = 64

	dbBranch   = 0x01
	dbLeaf     = 0x02
	dbFreelist = 0x10
	dbBucket   = 0x01 // of an element: it is a bucket
	dbNoList   = ^uint64(0)
)

// dbFile is a database's file.
type dbFile struct {
	r        io.ReaderAt
	pageSize uint64
	pages    uint64 // below the high-water mark
	used     []bool
	// found is given what is in a bucket, of pages that are whole.
	found func(bucket, key, value []byte)
	wrong func(error)
}

// dbMeta are the numbers of a meta page.
type dbMeta struct{ pageSize, root, freelist, pages, txid uint64 }

// scanDatabase reads a database's file to its end: what is in it goes to found, and what is wrong with it to wrong. It is
// ErrVersionMismatch alone where it is another version's.
func scanDatabase(r io.ReaderAt, size int64, found func(bucket, key, value []byte), wrong func(error)) {
	meta, err := readMeta(r)
	if err != nil {
		wrong(err)
		return
	}
	d := &dbFile{r: r, pageSize: meta.pageSize, pages: meta.pages, found: found, wrong: wrong}
	if have := uint64(size) / d.pageSize; have < d.pages {
		wrong(fmt.Errorf("has %d pages of %d", have, d.pages))
		d.pages = have
	}
	d.used = make([]bool, d.pages)
	for id := range min(2, d.pages) {
		d.used[id] = true
	}
	d.tree(meta.root, nil, &keyOrder{}, 0)
	if meta.freelist != dbNoList {
		d.free(meta.freelist)
	}
}

// readMeta returns the newest meta page that is whole.
func readMeta(r io.ReaderAt) (best dbMeta, err error) {
	best, err = parseMeta(r, 0)
	// Where the second one is, the first one says, if it is whole.
	for size := uint64(1 << 10); size <= 1<<16; size <<= 1 {
		if err == nil && size != best.pageSize {
			continue
		}
		if second, serr := parseMeta(r, size); serr == nil && second.pageSize == size && (err != nil || second.txid > best.txid) {
			return second, nil
		}
	}
	return best, err
}

func parseMeta(r io.ReaderAt, at uint64) (m dbMeta, err error) {
	page := make([]byte, dbMetaSum+8)
	if _, err := r.ReadAt(page, int64(at+dbPageHeader)); err != nil {
		return m, fmt.Errorf("%w: %w", berrors.ErrInvalid, err)
	}
	sum := fnv.New64a()
	_, _ = sum.Write(page[:dbMetaSum])
	switch {
	case u32(page, 0) != dbMagic:
		return m, berrors.ErrInvalid
	case u32(page, 4) != dbVersion:
		return m, berrors.ErrVersionMismatch
	case u64(page, dbMetaSum) != sum.Sum64():
		return m, berrors.ErrChecksum
	}
	m = dbMeta{pageSize: uint64(u32(page, 8)), root: u64(page, 16), freelist: u64(page, 32), pages: u64(page, 40), txid: u64(page, 48)}
	if m.pageSize < 1<<10 || m.pageSize > 1<<16 || m.pageSize&(m.pageSize-1) != 0 {
		return m, berrors.ErrInvalid
	}
	return m, nil
}

func u16(b []byte, at uint64) uint16 { return binary.NativeEndian.Uint16(b[at:]) }
func u32(b []byte, at uint64) uint32 { return binary.NativeEndian.Uint32(b[at:]) }
func u64(b []byte, at uint64) uint64 { return binary.NativeEndian.Uint64(b[at:]) }

// keyOrder sees to it that keys ascend, and that those of a page are not below what the page above says of it.
type keyOrder struct {
	last  []byte // of those in leaves
	least []byte // of the next one
}

func (o *keyOrder) branch(key []byte) bool {
	ok := (o.last == nil || bytes.Compare(key, o.last) > 0) && bytes.Compare(key, o.least) >= 0
	o.least = key
	return ok
}

func (o *keyOrder) leaf(key []byte) bool {
	ok := (o.last == nil || bytes.Compare(key, o.last) > 0) && bytes.Compare(key, o.least) >= 0
	o.last = key
	return ok
}

// page claims a page, with those that follow as its overflow, and reads it. Nil if it cannot be one.
func (d *dbFile) page(id uint64) []byte {
	if id < 2 || id >= d.pages {
		d.wrong(fmt.Errorf("page %d: there are %d", id, d.pages))
		return nil
	}
	p := make([]byte, d.pageSize)
	if _, err := d.r.ReadAt(p, int64(id*d.pageSize)); err != nil {
		d.wrong(fmt.Errorf("page %d: %w", id, err))
		return nil
	}
	if got := u64(p, 0); got != id {
		d.wrong(fmt.Errorf("page %d: says that it is page %d", id, got))
		return nil
	}
	more := uint64(u32(p, 12))
	if more >= d.pages-id {
		d.wrong(fmt.Errorf("page %d: %d pages follow it, there are %d", id, more, d.pages))
		return nil
	}
	for i := id; i <= id+more; i++ {
		if d.used[i] {
			d.wrong(fmt.Errorf("page %d: is used twice", i))
			return nil
		}
		d.used[i] = true
	}
	if more > 0 {
		p = append(p, make([]byte, more*d.pageSize)...)
		if _, err := d.r.ReadAt(p[d.pageSize:], int64((id+1)*d.pageSize)); err != nil {
			d.wrong(fmt.Errorf("page %d: %w", id, err))
			return nil
		}
	}
	return p
}

// tree reads a bucket's pages; the root bucket's name is nil.
func (d *dbFile) tree(id uint64, bucket []byte, order *keyOrder, depth int) {
	p := d.page(id)
	if p == nil {
		return
	}
	if depth > dbMaxDepth {
		d.wrong(fmt.Errorf("page %d: is %d pages deep", id, depth))
		return
	}
	if err := d.elements(p, bucket, order, depth); err != nil {
		d.wrong(fmt.Errorf("page %d: %w", id, err))
	}
}

var errElement = errors.New("an element reaches beyond it")

// elements reads what is in a page, once all of it is known to be inside.
func (d *dbFile) elements(p, bucket []byte, order *keyOrder, depth int) error {
	size, flags, count := uint64(len(p)), u16(p, 8), uint64(u16(p, 10))
	if flags != dbBranch && flags != dbLeaf {
		return fmt.Errorf("is of the kind %#x", flags)
	}
	if dbPageHeader+count*dbElement > size {
		return errElement
	}
	// A branch's element has the key's place, its length and a page's id; a leaf's flags, place, and both lengths.
	element := func(i uint64) (e, key, value []byte) {
		at := dbPageHeader + i*dbElement
		e = p[at : at+dbElement]
		pos, n, v := uint64(u32(e, 0)), uint64(u32(e, 4)), uint64(0)
		if flags == dbLeaf {
			pos, n, v = uint64(u32(e, 4)), uint64(u32(e, 8)), uint64(u32(e, 12))
		}
		if at+pos+n+v > size {
			return nil, nil, nil
		}
		return e, p[at+pos : at+pos+n], p[at+pos+n : at+pos+n+v]
	}
	for i := range count {
		if e, _, _ := element(i); e == nil {
			return errElement
		}
	}
	if flags == dbBranch && count == 0 {
		return errors.New("is a branch without leaves")
	}
	for i := range count {
		e, key, value := element(i)
		switch {
		case flags == dbBranch:
			if !order.branch(key) {
				return errors.New("its keys are not in order")
			}
			d.tree(u64(e, 8), bucket, order, depth+1)
		case !order.leaf(key):
			return errors.New("its keys are not in order")
		case u32(e, 0)&dbBucket == 0:
			d.found(bucket, key, value)
		default:
			if err := d.bucket(key, value, depth); err != nil {
				return err
			}
		}
	}
	return nil
}

// bucket reads a bucket: its root page, or one inside of the element where it is small.
func (d *dbFile) bucket(name, value []byte, depth int) error {
	if len(value) < 16 {
		return errElement
	}
	if root := u64(value, 0); root != 0 {
		d.tree(root, name, &keyOrder{}, depth+1)
		return nil
	}
	inline := value[16:]
	if len(inline) < dbPageHeader || u16(inline, 8) != dbLeaf || depth > dbMaxDepth {
		return errElement
	}
	return d.elements(inline, name, &keyOrder{}, depth+1)
}

// free reads which pages are free, and tells of those that are in use all the same, or neither.
func (d *dbFile) free(list uint64) {
	p := d.page(list)
	if p == nil {
		return
	}
	at, count := uint64(dbPageHeader), uint64(u16(p, 10))
	if count == 0xffff { // as many as the first number says
		count = u64(p, at)
		at += 8
	}
	if u16(p, 8) != dbFreelist || count > (uint64(len(p))-at)/8 {
		d.wrong(fmt.Errorf("page %d: is no list of free pages", list))
		return
	}
	for i := range count {
		id := u64(p, at+8*i)
		switch {
		case id < 2 || id >= d.pages:
			d.wrong(fmt.Errorf("page %d: is free, there are %d", id, d.pages))
		case d.used[id]:
			d.wrong(fmt.Errorf("page %d: is free and in use", id))
		default:
			d.used[id] = true
		}
	}
	for id, used := range d.used {
		if !used {
			d.wrong(fmt.Errorf("page %d: is neither free nor in use", id))
		}
	}
}
