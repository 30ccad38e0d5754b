package imagestest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"maps"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Entry is one entry of a layer: a tar header and, for files, content.
type Entry struct {
	tar.Header
	Body []byte
	// Raw, if not nil, goes into the archive instead of a header made of the rest.
	Raw []byte
}

// Epoch is the time of all entries that do not say another.
var Epoch = time.Unix(1_700_000_000, 0)

// With returns a changed copy of an entry.
func (e Entry) With(change func(*tar.Header)) Entry {
	e.PAXRecords = maps.Clone(e.PAXRecords)
	change(&e.Header)
	return e
}

// Owner returns the entry with another owner.
func (e Entry) Owner(uid, gid int) Entry {
	return e.With(func(h *tar.Header) { h.Uid, h.Gid = uid, gid })
}

// Mode returns the entry with another mode, of the octal kind with setuid and sticky bits.
func (e Entry) Mode(mode int64) Entry { return e.With(func(h *tar.Header) { h.Mode = mode }) }

// Xattr returns the entry with one more extended attribute.
func (e Entry) Xattr(name, value string) Entry {
	return e.With(func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	})
}

func entry(kind byte, name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: Epoch}}
}

// File is a regular file of mode 0644.
func File(name, body string) Entry {
	e := entry(tar.TypeReg, name, 0o644)
	e.Body, e.Size = []byte(body), int64(len(body))
	return e
}

// Dir is a directory of mode 0755.
func Dir(name string) Entry { return entry(tar.TypeDir, name+"/", 0o755) }

// Symlink is a symbolic link.
func Symlink(name, to string) Entry {
	return entry(tar.TypeSymlink, name, 0o777).With(func(h *tar.Header) { h.Linkname = to })
}

// HardLink is a hard link.
func HardLink(name, to string) Entry {
	return entry(tar.TypeLink, name, 0o644).With(func(h *tar.Header) { h.Linkname = to })
}

// Char is a character device.
func Char(name string, major, minor int64) Entry {
	return entry(tar.TypeChar, name, 0o666).With(func(h *tar.Header) { h.Devmajor, h.Devminor = major, minor })
}

// Block is a block device.
func Block(name string, major, minor int64) Entry {
	return entry(tar.TypeBlock, name, 0o660).With(func(h *tar.Header) { h.Devmajor, h.Devminor = major, minor })
}

// Fifo is a named pipe.
func Fifo(name string) Entry { return entry(tar.TypeFifo, name, 0o644) }

// Tar writes entries as they are, whatever they are.
func Tar(entries ...Entry) []byte {
	var buf bytes.Buffer
	for _, e := range entries {
		if e.Raw != nil {
			buf.Write(e.Raw)
			continue
		}
		var one bytes.Buffer
		w := tar.NewWriter(&one)
		hdr := e.Header
		if hdr.Format == tar.FormatUnknown {
			hdr.Format = tar.FormatPAX
		}
		if err := w.WriteHeader(&hdr); err != nil {
			panic(fmt.Sprintf("imagestest: entry %q: %v", e.Name, err))
		}
		if _, err := w.Write(e.Body); err != nil {
			panic(fmt.Sprintf("imagestest: entry %q: %v", e.Name, err))
		}
		if err := w.Flush(); err != nil {
			panic(fmt.Sprintf("imagestest: entry %q: %v", e.Name, err))
		}
		buf.Write(one.Bytes())
	}
	buf.Write(make([]byte, 1024))
	return buf.Bytes()
}

// Gzip compresses.
func Gzip(data []byte) []byte {
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		panic(err)
	}
	return buf.Bytes()
}

// Zstd compresses.
func Zstd(data []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer w.Close()
	return w.EncodeAll(data, nil)
}
