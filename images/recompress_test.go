package images

import (
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-run/berth/images/imagestest"
)

// programText is some megabyte of text with repetitions, as programs are.
func programText() string {
	var b strings.Builder
	r := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 2000)
	for i := range words {
		word := make([]byte, 2+r.IntN(10))
		for j := range word {
			word[j] = byte('a' + r.IntN(26))
		}
		words[i] = string(word)
	}
	for b.Len() < 1<<20 {
		b.WriteString(words[min(r.IntN(2000), r.IntN(2000))])
		b.WriteByte(' ')
	}
	return b.String()
}

// TestCompressionIsMadeAgain byte for byte where a compressor is known that does it; where none is, the layer is exported
// uncompressed, and the report says so. The layout is whole in both cases.
func TestCompressionIsMadeAgain(t *testing.T) {
	tar := imagestest.Tar(imagestest.File("text", programText()), imagestest.File("a", "1"), imagestest.Dir("d"))
	through := func(w io.WriteCloser, err error) error {
		if err != nil {
			return err
		}
		_, err = w.Write(tar)
		return errors.Join(err, w.Close())
	}
	for name, c := range map[string]struct {
		pack  func(w io.Writer) error
		exact bool
	}{
		"compress/gzip":       {func(w io.Writer) error { return through(stdgzip.NewWriter(w), nil) }, true},
		"compress/gzip, best": {func(w io.Writer) error { return through(stdgzip.NewWriterLevel(w, stdgzip.BestCompression)) }, true},
		"compress/gzip, fast": {func(w io.Writer) error { return through(stdgzip.NewWriterLevel(w, stdgzip.BestSpeed)) }, true},
		"klauspost":           {func(w io.Writer) error { return through(gzip.NewWriter(w), nil) }, true},
		"klauspost, best":     {func(w io.Writer) error { return through(gzip.NewWriterLevel(w, gzip.BestCompression)) }, true},
		"with a name and a time": {func(w io.Writer) error {
			z := stdgzip.NewWriter(w)
			z.Name, z.ModTime, z.OS = "layer.tar", time.Unix(1_700_000_000, 0), 3
			return through(z, nil)
		}, true},
		"gzip":                      {func(w io.Writer) error { return through(gzipProgram(w)) }, false},
		"without compression":       {func(w io.Writer) error { return through(stdgzip.NewWriterLevel(w, stdgzip.NoCompression)) }, false},
		"of two members":            {func(w io.Writer) error { return twoMembers(w, tar) }, false},
		"begins alike, ends unlike": {func(w io.Writer) error { return flushing(w, tar) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			var packed bytes.Buffer
			if err := c.pack(&packed); err != nil {
				t.Fatal(err)
			}
			layer := imagestest.GzipLayer(tar)
			layer.Blob = packed.Bytes()
			s := openStore(t)
			reg := imagestest.NewRegistry(t)
			built := reg.Push("a", "b", imagestest.NewImage(layer, imagestest.Layer(imagestest.File("small", "x"))))
			mustPull(t, s, reg.Host()+"/a:b")
			archive, report := exported(t, s, reg.Host()+"/a:b")
			out := report.Images[0]
			if out.Exact() != c.exact || (out.Layers[0].Why == "") != c.exact || !c.exact == (out.Exported == built.Descriptor.Digest) || out.Layers[1].Why != "" {
				t.Errorf("report %+v, want it exact: %v", out, c.exact)
			}
			files := inArchive(t, archive)
			var m ocispec.Manifest
			if err := json.Unmarshal(files[blobName(out.Exported)], &m); err != nil {
				t.Fatal(err)
			}
			for _, d := range append(m.Layers, m.Config) {
				data := files[blobName(d.Digest)]
				if int64(len(data)) != d.Size || d.Digest.Algorithm().FromBytes(data) != d.Digest {
					t.Errorf("%s of %d bytes: %d bytes", d.Digest, d.Size, len(data))
				}
			}
			if left := leftovers(t, s); len(left) != 2 {
				t.Errorf("left: %v", left)
			}
			if err := s.Remove(context.Background(), reg.Host()+"/a:b"); err != nil {
				t.Error(err)
			}
		})
	}
}

// gzipProgram is GNU's.
func gzipProgram(w io.Writer) (io.WriteCloser, error) {
	cmd := exec.Command("gzip", "-n")
	cmd.Stdout = w
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	return &waitingCloser{in, cmd}, cmd.Start()
}

type waitingCloser struct {
	io.WriteCloser
	cmd *exec.Cmd
}

func (w *waitingCloser) Close() error { return errors.Join(w.WriteCloser.Close(), w.cmd.Wait()) }

func twoMembers(w io.Writer, data []byte) error {
	for _, part := range [][]byte{data[:len(data)/2], data[len(data)/2:]} {
		z := stdgzip.NewWriter(w)
		if _, err := z.Write(part); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
	}
	return nil
}

func flushing(w io.Writer, data []byte) error {
	z := stdgzip.NewWriter(w)
	for _, part := range [][]byte{data[:len(data)/2], data[len(data)/2:]} {
		if _, err := z.Write(part); err != nil {
			return err
		}
		if err := z.Flush(); err != nil {
			return err
		}
	}
	return z.Close()
}
