package admin

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/imagestest"
)

// archived is an archive of one image, and what it is called.
func archived(t *testing.T) (archive []byte, ref string, img *Image) {
	t.Helper()
	n := serve(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("team/app", "v1", imagestest.NewImage(imagestest.Layer(imagestest.File("big", strings.Repeat("x", 300_000))), imagestest.Layer(imagestest.File("f", "y"))))
	ref = reg.Host() + "/team/app:v1"
	img = n.mustPull(t, ref)
	var out bytes.Buffer
	report, err := n.Export(t.Context(), &out, ref)
	if err != nil || len(report.Images) != 1 || report.Images[0].ID != img.ID {
		t.Fatalf("%+v %v", report, err)
	}
	return out.Bytes(), ref, img
}

func TestImagesTravelAsArchives(t *testing.T) {
	archive, ref, img := archived(t)
	other := serve(t)
	in, err := other.Import(t.Context(), bytes.NewReader(archive), images.ImportOptions{})
	if err != nil || len(in.Images) != 1 || in.Images[0].ID != img.ID || !in.Images[0].Pinned || !slices.Equal(in.Images[0].RepoTags, []string{ref}) {
		t.Fatalf("%+v %v", in, err)
	}
	// Imports are pinned.
	if removal, err := other.Remove(t.Context(), false, ref); err != nil || removal.Removed[0].Error == nil {
		t.Errorf("%+v %v", removal, err)
	}
	in, err = other.Import(t.Context(), bytes.NewReader(imagestest.Gzip(archive)), images.ImportOptions{Names: []string{"example.org/renamed:v2"}, Unpinned: true})
	if err != nil || len(in.Images) != 1 || !slices.Contains(in.Images[0].RepoTags, "example.org/renamed:v2") {
		t.Errorf("compressed, by another name: %+v %v", in, err)
	}
}

func TestAClientThatGoesLeavesNothingOfItsImport(t *testing.T) {
	archive, _, _ := archived(t)
	n := serve(t)
	ctx, cancel := context.WithCancel(t.Context())
	// The first half comes, then no more, until the client has gone.
	half := io.MultiReader(bytes.NewReader(archive[:len(archive)/2]), readerFunc(func([]byte) (int, error) {
		until(t, "the daemon spools it", func() bool {
			left, err := os.ReadDir(filepath.Join(n.root, "tmp"))
			return err == nil && len(left) > 0
		})
		cancel()
		return 0, ctx.Err()
	}))
	if in, err := n.Import(ctx, half, images.ImportOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%+v %v", in, err)
	}
	n.nothingLeft(t)
	// One that says that it has ended, half way.
	if in, err := n.Import(t.Context(), bytes.NewReader(archive[:len(archive)/2]), images.ImportOptions{}); err == nil {
		t.Errorf("half an archive: %+v", in)
	}
	n.nothingLeft(t)
	if in, err := n.Import(t.Context(), bytes.NewReader(archive), images.ImportOptions{}); err != nil || len(in.Images) != 1 {
		t.Errorf("the whole one afterwards: %+v %v", in, err)
	}
}

// What breaks off on the way is no bad image, whatever it was to be.
func TestABodyThatEndsEarlyIsSaidToHave(t *testing.T) {
	archive, _, _ := archived(t)
	n := serve(t)
	for name, data := range map[string][]byte{"tar": archive, "gzip": imagestest.Gzip(archive), "zstd": imagestest.Zstd(archive), "nothing yet": nil} {
		for length, head := range map[string]string{
			"of known length": fmt.Sprintf("Content-Length: %d\r\n\r\n", len(data)+1),
			"in chunks":       fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n", len(data)+1),
		} {
			c, err := net.Dial("unix", n.socket)
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			_, err = io.WriteString(c, "POST /v1/images/import?unpinned=true HTTP/1.1\r\nHost: berth\r\n"+head+string(data[:len(data)/2]))
			answer, rerr := make([]byte, 4096), c.(*net.UnixConn).CloseWrite()
			read, _ := io.ReadFull(c, answer) // to its end
			if err := errors.Join(err, rerr, c.Close()); err != nil {
				t.Fatal(err)
			}
			said := string(answer[:read])
			if !strings.HasPrefix(said, "HTTP/1.1 400 ") || !strings.Contains(said, fmt.Sprintf("ended early, after %d bytes", len(data)/2)) || strings.Contains(said, "not a valid image") {
				t.Errorf("%s %s: %s", name, length, said)
			}
			n.nothingLeft(t)
		}
	}
	if strings.Contains(n.log.String(), "not a valid image") {
		t.Error("the log has it as a bad image")
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestHostileArchivesAreRefusedAndLeaveNothing(t *testing.T) {
	archive, _, _ := archived(t)
	n := serve(t)
	escape := imagestest.Tar(imagestest.File("../../escaped", "x"), imagestest.Symlink("index.json", "/etc/passwd"), imagestest.File("oci-layout", `{"imageLayoutVersion":"1.0.0"}`))
	flipped := bytes.Clone(archive)
	at := bytes.Index(flipped, []byte(strings.Repeat("x", 50)))
	if at < 0 {
		at = bytes.Index(flipped, []byte("\x1f\x8b")) + 30 // where the layers are compressed
	}
	flipped[at] ^= 1
	garbage := readerFunc(func(p []byte) (int, error) { // p may hold anything, also what was an archive
		for i := range p {
			p[i] = 'x'
		}
		return len(p), nil
	})
	for name, c := range map[string]struct {
		archive io.Reader
		o       images.ImportOptions
	}{
		"nothing":            {strings.NewReader(""), images.ImportOptions{}},
		"garbage":            {strings.NewReader(strings.Repeat("no tar", 1000)), images.ImportOptions{}},
		"endless garbage":    {io.LimitReader(garbage, 64<<20), images.ImportOptions{}},
		"an empty tar":       {bytes.NewReader(imagestest.Tar()), images.ImportOptions{}},
		"no layout":          {bytes.NewReader(imagestest.Tar(imagestest.File("hello", "x"))), images.ImportOptions{}},
		"it wants to escape": {bytes.NewReader(escape), images.ImportOptions{}},
		"a changed byte":     {bytes.NewReader(flipped), images.ImportOptions{}},
		"broken gzip":        {bytes.NewReader(imagestest.Gzip(archive)[:1000]), images.ImportOptions{}},
		"a bad name":         {bytes.NewReader(archive), images.ImportOptions{Names: []string{"UPPER:x"}}},
		"many bad names":     {bytes.NewReader(archive), images.ImportOptions{Names: []string{"a:b", strings.Repeat("z", 1000)}}},
	} {
		if in, err := n.Import(t.Context(), c.archive, c.o); err == nil || len(err.Error()) > 4000 {
			t.Errorf("%s: %+v %.300v", name, in, err)
		}
		n.nothingLeft(t)
	}
	if _, err := os.Lstat(filepath.Join(n.root, "..", "escaped")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it escaped: %v", err)
	}
	if _, err := n.call(t.Context(), "POST", "/v1/images/import?unpinned=maybe", bytes.NewReader(archive)); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a wrong option: %v", err)
	}
}

// A client that has much to send is told at once that it need not.
func TestAnImportThatFailsIsToldBeforeAllIsSent(t *testing.T) {
	n := serve(t)
	sent := make(chan struct{})
	endless := readerFunc(func(p []byte) (int, error) {
		select {
		case <-sent:
			return 0, io.EOF
		default:
			return copy(p, bytes.Repeat([]byte("\x1f\x8bno gzip"), 1000)), nil
		}
	})
	in, err := n.Import(t.Context(), endless, images.ImportOptions{}) // returns, while there is more
	close(sent)
	if e := (*Error)(nil); !errors.As(err, &e) {
		t.Errorf("%+v %v", in, err)
	}
	n.nothingLeft(t)
}

// The daemon is not to blame for what cannot be read here.
func TestAnArchiveThatCannotBeReadIsSaidTo(t *testing.T) {
	n := serve(t)
	first := true
	broken := readerFunc(func(p []byte) (int, error) {
		if first {
			first = false
			return copy(p, bytes.Repeat([]byte{0}, 1000)), nil
		}
		return 0, unix.EIO
	})
	if in, err := n.Import(t.Context(), broken, images.ImportOptions{}); !errors.Is(err, unix.EIO) || !strings.HasPrefix(err.Error(), "read archive: ") {
		t.Errorf("%+v %v", in, err)
	}
	n.nothingLeft(t)
}

func TestExportTellsWhatIsWrong(t *testing.T) {
	n := serve(t)
	for name, class := range map[string]error{"absent": errdefs.ErrNotFound, "": errdefs.ErrInvalidArgument} {
		var out bytes.Buffer
		if _, err := n.Export(t.Context(), &out, name); !errors.Is(err, class) || out.Len() > 0 {
			t.Errorf("%q: %v, and %d bytes", name, err, out.Len())
		}
	}
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "v1", image("x"))
	reg.Push("b", "v1", image("y"))
	a, b := n.mustPull(t, reg.Host()+"/a:v1"), n.mustPull(t, reg.Host()+"/b:v1")
	// The second of two fails: what was written of the first is no archive.
	if _, err := n.Export(t.Context(), io.Discard, string(a.ID), "absent"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("half way: %v", err)
	}
	full := errors.New("disk full")
	if _, err := n.Export(t.Context(), writerFunc(func([]byte) (int, error) { return 0, full }), string(a.ID)); !errors.Is(err, full) || strings.Contains(err.Error(), "daemon") {
		t.Errorf("the client's own failure: %v", err)
	}
	// Both in one.
	var out bytes.Buffer
	report, err := n.Export(t.Context(), &out, string(a.ID), string(b.ID))
	if err != nil || len(report.Images) != 2 {
		t.Fatalf("%+v %v", report, err)
	}
	names := map[string]bool{}
	for tr := tar.NewReader(&out); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names[h.Name] = true
	}
	if !names["oci-layout"] || !names["index.json"] || !names["manifest.json"] {
		t.Errorf("the archive has %v", names)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// damageAll damages all layers, and has that found.
func (n *node) damageAll(t *testing.T) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.root, "layers", "*", "f"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%v %v", files, err)
	}
	for _, file := range files {
		if err := os.WriteFile(file, []byte("broken"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r, err := n.Verify(t.Context(), images.VerifyOptions{})
	if err != nil || !r.Damaged() || len(r.Findings) == 0 || r.Findings[0].Kind != images.FoundLayer {
		t.Fatalf("%+v %v", r, err)
	}
}

func TestVerifyFindsDamageAndRepairsIt(t *testing.T) {
	n := serve(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "v1", image("whole"))
	img := n.mustPull(t, reg.Host()+"/a:v1")
	if r, err := n.Verify(t.Context(), images.VerifyOptions{Deep: true}); err != nil || r.Damaged() || r.Images != 1 || r.Layers != 1 {
		t.Fatalf("%+v %v", r, err)
	}
	n.damageAll(t)
	if r, err := n.Verify(t.Context(), images.VerifyOptions{Repair: true}); err != nil || r.Damaged() {
		t.Errorf("repair: %+v %v", r, err)
	}
	if r, err := n.Verify(t.Context(), images.VerifyOptions{Deep: true}); err != nil || len(r.Findings) != 0 {
		t.Errorf("afterwards: %+v %v", r, err)
	}
	if d, err := n.Inspect(t.Context(), string(img.ID)); err != nil || d.ID != img.ID {
		t.Errorf("%+v %v", d, err)
	}
}

// Nobody lists it, but whoever knows its name can have its space back without a pull.
func TestADamagedImageIsRemoved(t *testing.T) {
	n := serve(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "v1", image("whole"))
	reg.Push("a", "v2", image("other"))
	img := n.mustPull(t, reg.Host()+"/a:v1")
	if _, err := n.store.SetPinned(t.Context(), string(img.ID), true); err != nil {
		t.Fatal(err)
	}
	n.damageAll(t)
	if _, err := n.Inspect(t.Context(), string(img.ID)); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("%v; want it damaged, and so not found", err)
	}
	if removal, err := n.Remove(t.Context(), false, reg.Host()+"/a:v1"); err != nil || !errors.Is(removal.Removed[0].Error, errInUse) {
		t.Errorf("while it is pinned: %+v %v", removal, err)
	}
	if removal, err := n.Remove(t.Context(), true, reg.Host()+"/a:v1"); err != nil || removal.Removed[0].Error != nil || removal.Removed[0].ID != img.ID {
		t.Errorf("by its name: %+v %v", removal, err)
	}
	n.nothingLeft(t)
	img = n.mustPull(t, reg.Host()+"/a:v2")
	n.damageAll(t)
	if err := n.store.Remove(t.Context(), string(img.ID)); err != nil { // as the CRI does
		t.Error(err)
	}
	n.nothingLeft(t)
}
