package images

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// A tape is a layer's archive without the contents of its files, which are in the layer's directory: with both, the archive
// can be made again byte for byte. It also has a sum of each content, so that it tells which file has changed. The idea is
// that of tar-split; its library brings a copy of archive/tar of its own, which would have to decide about hostile archives
// beside the one that unpacks them.
//
// It is a zstd stream of
//
//	tapeRaw  uvarint n, n bytes       as they are in the archive
//	tapeFile uvarint size, uvarint n, n bytes of name, 8 bytes of sum (xxhash, little endian)

const (
	tapeRaw  = 'r'
	tapeFile = 'f'
)

// tape records an archive while it is read through it.
type tape struct {
	r io.Reader
	f *os.File
	z io.WriteCloser
	w *bufio.Writer

	total int64 // bytes of the archive so far
	// unsummed: a file's content is there as it is in the archive, so that the tape has no sum of it.
	unsummed bool

	raw  []byte         // not written yet
	left int64          // of the content that is being read
	name string         // whose it is
	size int64          // and how much there is of it
	sum  *xxhash.Digest // of it
	err  error          // of writing
}

// newTape records to a file that must not be there yet.
func newTape(r io.Reader, to string) (*tape, error) {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	z, err := newRecordWriter(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &tape{r: r, f: f, z: z, w: bufio.NewWriterSize(z, 32<<10), sum: xxhash.New()}, nil
}

// Read implements io.Reader.
func (t *tape) Read(p []byte) (int, error) {
	if t.err != nil {
		return 0, t.err
	}
	if t.left > 0 && int64(len(p)) > t.left {
		p = p[:t.left]
	}
	n, err := t.r.Read(p)
	t.total += int64(n)
	if t.left > 0 {
		_, _ = t.sum.Write(p[:n])
		if t.left -= int64(n); t.left == 0 {
			t.putFile()
		}
	} else {
		t.raw = append(t.raw, p[:n]...)
		if len(t.raw) >= 64<<10 {
			t.putRaw()
		}
	}
	if t.err != nil {
		return n, t.err
	}
	return n, err
}

// content says that what is read next is the content of an entry, as its header announces it. Sparse files, whose archive
// has less than the file, and what is not unpacked at all, is recorded as it is.
func (t *tape) content(hdr *tar.Header) {
	if hdr.Size <= 0 || !isRegular(hdr.Typeflag) {
		return
	}
	name := strings.TrimPrefix(path.Clean("/"+hdr.Name), "/")
	if name == "" || strings.Contains("/"+name, "/"+whiteout) {
		return
	}
	if isSparse(hdr) {
		t.unsummed = true
		return
	}
	t.putRaw()
	t.name, t.size, t.left = name, hdr.Size, hdr.Size
	t.sum.Reset()
}

func (t *tape) putRaw() {
	if len(t.raw) == 0 {
		return
	}
	t.put([]byte{tapeRaw}, binary.AppendUvarint(nil, uint64(len(t.raw))), t.raw)
	t.raw = t.raw[:0]
}

func (t *tape) putFile() {
	head := binary.AppendUvarint([]byte{tapeFile}, uint64(t.size))
	head = binary.AppendUvarint(head, uint64(len(t.name)))
	t.put(head, []byte(t.name), binary.LittleEndian.AppendUint64(nil, t.sum.Sum64()))
}

func (t *tape) put(parts ...[]byte) {
	for _, p := range parts {
		if t.err == nil {
			_, t.err = t.w.Write(p)
		}
	}
}

// close ends the recording. Without keep it is given up, and its errors do not count.
func (t *tape) close(keep bool) error {
	defer t.f.Close()
	t.putRaw()
	err := errors.Join(t.err, t.w.Flush(), t.z.Close(), t.f.Close())
	if !keep {
		return nil
	}
	return err
}

// damageError says which file of a layer is not as it was unpacked.
type damageError struct{ path, what string }

func (e *damageError) Error() string { return fmt.Sprintf("file %s %s", quote(e.path), e.what) }

// playTape writes a layer's archive, from its tape and its directory. Contents that are not as recorded end it with a
// damageError, unless tell, if not nil, is told of them instead: then what is written is to be thrown away.
func playTape(ctx context.Context, root *os.File, record io.Reader, w io.Writer, tell func(*damageError)) error {
	z, err := zstd.NewReader(record, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return err
	}
	defer z.Close()
	a := newApplier(root, bounds{}) // for its way of looking names up
	defer a.close()
	p := &tapePlayer{ctx: ctx, in: bufio.NewReader(z), a: a, out: w, buf: make([]byte, 128<<10)}
	for {
		kind, err := p.in.ReadByte()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("tape: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		switch kind {
		case tapeRaw:
			err = p.rawBytes()
		case tapeFile:
			err = p.file()
		default:
			err = fmt.Errorf("tape: unknown item %q", kind)
		}
		if damage, ok := errors.AsType[*damageError](err); ok && tell != nil {
			tell(damage)
			continue
		}
		if err != nil {
			return err
		}
	}
}

type tapePlayer struct {
	ctx context.Context
	in  *bufio.Reader
	a   *applier
	out io.Writer
	buf []byte
}

func (p *tapePlayer) rawBytes() error {
	n, err := binary.ReadUvarint(p.in)
	if err == nil {
		_, err = io.CopyN(p.out, p.in, int64(n))
	}
	return err
}

func (p *tapePlayer) file() error {
	size, err := binary.ReadUvarint(p.in)
	if err != nil {
		return err
	}
	n, err := binary.ReadUvarint(p.in)
	if err != nil || n > maxPath {
		return fmt.Errorf("tape: name of %d bytes: %w", n, errors.Join(err))
	}
	data := make([]byte, n+8)
	if _, err := io.ReadFull(p.in, data); err != nil {
		return fmt.Errorf("tape: %w", err)
	}
	name, want := string(data[:n]), binary.LittleEndian.Uint64(data[n:])
	dir, base := path.Split(name)
	parent, err := p.a.openInside(strings.TrimSuffix(dir, "/"))
	if err != nil {
		return &damageError{name, "cannot be reached: " + err.Error()}
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	unix.Close(parent)
	if err != nil {
		return &damageError{name, "cannot be opened: " + err.Error()}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() != int64(size) {
		return &damageError{name, "has another size"}
	}
	sum := xxhash.New()
	from := &failingReader{r: &contextReader{p.ctx, io.LimitReader(f, int64(size))}}
	copied, err := io.CopyBuffer(io.MultiWriter(sum, p.out), struct{ io.Reader }{from}, p.buf)
	switch {
	case from.err != nil && p.ctx.Err() == nil:
		return &damageError{name, "cannot be read: " + from.err.Error()}
	case err != nil:
		return err
	case copied != int64(size) || sum.Sum64() != want:
		return &damageError{name, "has other content"}
	}
	return nil
}

// failingReader remembers that it was reading that failed, and not writing.
type failingReader struct {
	r   io.Reader
	err error
}

// Read implements io.Reader.
func (f *failingReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}
