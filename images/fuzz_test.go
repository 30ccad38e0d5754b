package images

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"hash/fnv"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
)

// FuzzReference: what parses is normalised, parses again to itself, and is safe in a path and a URL.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"busybox", "r.example:5000/a/b:c@sha256:" + someHex, "sha256:" + someHex, someHex, "../..", "A", "a@sha256:x", "[::1]:5000/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		named, err := parseReference(in)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %v is not ErrInvalidArgument", in, err)
			}
			return
		}
		out := named.String()
		if strings.Contains(out, "..") || strings.ContainsAny(out, " \n\x00?#%\\") || !strings.Contains(out, "/") {
			t.Errorf("%q became %q", in, out)
		}
		if again, err := parseReference(out); err != nil || again.String() != out {
			t.Errorf("%q became %q, and that %v, %v", in, out, again, err)
		}
		s := &Store{images: map[digest.Digest]*imageRecord{}, refs: map[string]digest.Digest{}}
		if id, err := s.find(in); err == nil {
			t.Errorf("%q was found in an empty store: %s", in, id)
		}
	})
}

// FuzzDocument: no panic, and what is accepted is exactly one kind of document with valid digests and bounded sizes.
func FuzzDocument(f *testing.F) {
	for _, s := range []string{manifestOK, indexOK, `{"schemaVersion":1}`, `{"schemaVersion":2,"manifests":null,"layers":[]}`, "null", "{"} {
		f.Add([]byte(s), "")
		f.Add([]byte(s), dockerManifest)
	}
	f.Fuzz(func(t *testing.T, data []byte, mediaType string) {
		doc, err := parseDocument(data, mediaType)
		if err != nil {
			return
		}
		if (doc.Index == nil) == (doc.Manifest == nil) {
			t.Fatalf("%q: index %v, manifest %v", data, doc.Index, doc.Manifest)
		}
		if doc.Manifest != nil {
			for _, d := range append(doc.Manifest.Layers, doc.Manifest.Config) {
				if d.Digest.Validate() != nil || d.Size <= 0 {
					t.Errorf("%q: accepted %+v", data, d)
				}
			}
		}
	})
}

// FuzzConfig: no panic, and as many layers as asked for.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"os":"linux","architecture":"amd64","config":{"Env":["A=b"]},"rootfs":{"type":"layers","diff_ids":["sha256:`+someHex+`"]}}`), 1)
	f.Add([]byte(`{"rootfs":{"diff_ids":[]},"history":[{"created":"2020-01-01T00:00:00Z"}]}`), 0)
	f.Fuzz(func(t *testing.T, data []byte, n int) {
		cfg, err := parseConfig(data, n)
		if err == nil && len(cfg.RootFS.DiffIDs) != n {
			t.Errorf("%q: %d layers, asked for %d", data, len(cfg.RootFS.DiffIDs), n)
		}
	})
}

// FuzzDatabase: no page leads outside the file, round in circles, or to a panic, also where the meta page is whole.
func FuzzDatabase(f *testing.F) {
	for _, rounds := range []int{1, 8} {
		data, err := os.ReadFile(writeDatabase(f, rounds))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(_ *testing.T, data []byte) {
		if len(data) > 8192 {
			copy(data[4096:], make([]byte, 4096)) // the other one is not
			meta := data[dbPageHeader:]
			sum := fnv.New64a()
			_, _ = sum.Write(meta[:dbMetaSum])
			binary.NativeEndian.PutUint64(meta[dbMetaSum:], sum.Sum64())
		}
		scanDatabase(bytes.NewReader(data), int64(len(data)), func([]byte, []byte, []byte) {}, func(error) {})
	})
}

// FuzzHostsFile: no panic, and an error or a file.
func FuzzHostsFile(f *testing.F) {
	f.Add([]byte("server = \"https://r.example\"\n[host.\"http://m.example\"]\n  capabilities = [\"pull\"]\n  [host.\"http://m.example\".header]\n    X = [\"a\"]\n"))
	f.Add([]byte("token_hosts = [\"a\"]\nca = [\"x\"]\nclient = [[\"a\",\"b\"]]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		s := &Store{log: discardLog, ctx: context.Background()}
		if _, err := s.readHostsFile(dir); err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%q: %v", data, err)
		}
	})
}

// FuzzRetryAfter: never longer than allowed, never negative.
func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"1", "-1", "99999999999999999999", "Fri, 31 Dec 1999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 GMT"} {
		f.Add(s, 1)
	}
	f.Fuzz(func(t *testing.T, v string, try int) {
		p := paceOf(DefaultMinPullRate)
		d := p.retryAfter(http.Header{"Retry-After": {v}}, 1+(try&3))
		if d < 0 || d > p.RetryAfter {
			t.Errorf("%q: %v", v, d)
		}
	})
}

// FuzzDecompress: no panic, and never more than the stream's bound in memory.
func FuzzDecompress(f *testing.F) {
	tar := imagestest.Tar(imagestest.File("f", "content"))
	for _, b := range [][]byte{tar, imagestest.Gzip(tar), imagestest.Zstd(tar), {0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 'x'}, {0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 1, 0, 0}} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decompress(context.Background(), bufio.NewReader(bytes.NewReader(data)))
		if err != nil {
			return
		}
		defer r.Close()
		_, _ = io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	})
}

// FuzzLayer unpacks any archive, on a real file system, beside a tree that must not change.
func FuzzLayer(f *testing.F) {
	needRoot(f)
	for _, c := range imagestest.Corpus("/outside") {
		if len(c.Tar) < 64<<10 {
			f.Add(c.Tar)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		base := t.TempDir()
		sentinel := imagestest.NewSentinel(t, filepath.Join(base, "outside"))
		a, root, err := applyTar(t, base, data, bounds{bytes: 4 << 20, entries: 200})
		sentinel.Check(t)
		entries, rerr := os.ReadDir(base)
		if rerr != nil || len(entries) != 2 {
			t.Errorf("beside the root: %v, %v", entries, rerr)
		}
		if err != nil {
			return
		}
		dir, err := os.Open(root)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		if err := inheritDirs(context.Background(), dir, a.implicitDirs(), []*os.File{dir}); err != nil {
			t.Errorf("inherit: %v", err)
		}
		sentinel.Check(t)
	})
}
