package main

import (
	"archive/tar"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/berth-run/berth/images/imagestest"
)

func TestToolsOfArchives(t *testing.T) {
	d, other := startDaemon(t), startDaemon(t)
	app := d.reg.Push("team/app", "v1", imagestest.NewImage(imagestest.Layer(imagestest.File("f", strings.Repeat("x", 100_000)))))
	ref, id := d.reg.Host()+"/team/app:v1", app.ConfigID.String()
	d.must(t, "images", "pull", "-q", ref)

	dir := t.TempDir()
	file, layout := filepath.Join(dir, "app.tar"), filepath.Join(dir, "layout")
	if out := d.must(t, "images", "export", "--file", file, ref); !strings.Contains(out, "exported "+ref+" ("+id+")") {
		t.Errorf("export to a file: %q", out)
	}
	if out := d.must(t, "images", "export", "--dir", layout, "-o", "json", ref); !strings.Contains(out, `"id":"`+id+`"`) {
		t.Errorf("export to a directory: %q", out)
	}
	for _, name := range []string{"oci-layout", "index.json", "blobs/sha256/" + app.ConfigID.Encoded()} {
		if _, err := os.Stat(filepath.Join(layout, name)); err != nil {
			t.Error(err)
		}
	}
	piped, errs, code := d.tool(t, "images", "export", ref)
	whole, err := os.ReadFile(file)
	if err != nil || code != 0 || len(piped) != len(whole) || !strings.Contains(errs, "exported "+ref) {
		t.Errorf("export to standard output: %d bytes, want %d: %q %v", len(piped), len(whole), errs, err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}

	want := "imported " + ref + " (" + id + ")\n"
	for _, from := range []string{file, layout, "-"} {
		out, errs, code := other.toolWith(t, strings.NewReader(piped), "images", "import", from)
		if code != 0 || out != want || errs != "" {
			t.Errorf("import %s: %q %q, want %q", from, out, errs, want)
		}
		other.must(t, "images", "remove", "--force", ref)
	}
	if out := other.must(t, "images", "import", "--name", "example.org/other:v2", "--unpinned", "-o", "json", file); !strings.Contains(out, `"example.org/other:v2"`) || !strings.Contains(out, `"pinned": false`) {
		t.Errorf("import by another name: %s", out)
	}
	if out := other.must(t, "images", "verify", "--deep"); !strings.HasPrefix(out, "1 images, 1 layers, ") || !strings.HasSuffix(out, ": 0 findings\n") {
		t.Errorf("verify: %q", out)
	}
}

func TestToolsOfArchivesFailCleanly(t *testing.T) {
	d := startDaemon(t)
	dir := t.TempDir()
	full := filepath.Join(dir, "full")
	if err := os.MkdirAll(filepath.Join(full, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"images", "export", "--file", filepath.Join(dir, "a.tar"), "absent"}, "not found"},
		{[]string{"images", "export", "--dir", filepath.Join(dir, "a"), "absent"}, "not found"},
		{[]string{"images", "export", "--dir", full, "absent"}, "is not empty"},
		{[]string{"images", "export", "--file", filepath.Join(dir, "no/such/dir/a.tar"), "absent"}, "write " + filepath.Join(dir, "no/such/dir/a.tar") + ": no such file"},
		{[]string{"images", "export", "--dir", filepath.Join(dir, "no/such/dir"), "absent"}, "write " + filepath.Join(dir, "no/such/dir") + ": no such file"},
		{[]string{"images", "import", filepath.Join(dir, "absent.tar")}, "no such file"},
		{[]string{"images", "import", full}, full + ": "},
		{[]string{"images", "import", "-"}, "standard input: import: archive"},
	} {
		out, errs, code := d.tool(t, c.args...)
		if code != exitFailure || !strings.Contains(errs, c.want) || out != "" {
			t.Errorf("%v: %q %q, exit code %d; want %q", c.args, out, errs, code, c.want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v %v", left, err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestDamageIsAFailure(t *testing.T) {
	d := startDaemon(t)
	d.reg.Push("a", "v1", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "whole"))))
	d.must(t, "images", "pull", "-q", d.reg.Host()+"/a:v1")
	files, err := filepath.Glob(filepath.Join(filepath.Dir(d.socket), "images", "layers", "*", "f"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%v %v", files, err)
	}
	if err := os.WriteFile(files[0], []byte("broken"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errs, code := d.tool(t, "images", "verify")
	if code != exitFailure || !strings.HasPrefix(out, "layer sha256:") || !strings.Contains(errs, "--repair") {
		t.Errorf("verify: %q %q, exit code %d", out, errs, code)
	}
	d.reg.Hook(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusNotFound); return true })
	if out, errs, code := d.tool(t, "images", "verify", "--repair"); code != exitFailure || !strings.Contains(out, "(not repaired: ") || strings.Contains(errs, "--repair") {
		t.Errorf("repair without a registry: %q %q, exit code %d", out, errs, code)
	}
	d.reg.Hook(nil)
	if out := d.must(t, "images", "verify", "--repair"); !strings.Contains(out, "(repaired)") {
		t.Errorf("repair: %q", out)
	}
	if err := os.Remove(filepath.Join(filepath.Dir(d.socket), "images", "meta.db")); err != nil {
		t.Fatal(err)
	}
	if out, errs, code := d.tool(t, "images", "verify"); code != exitFailure || !strings.HasPrefix(out, "database: is missing") || !strings.Contains(errs, "restart berth serve") || strings.Contains(errs, "--repair") {
		t.Errorf("verify: %q %q, exit code %d", out, errs, code)
	}
}

// A link of a directory that leads out of it is not followed, as little as one of an archive.
func TestImportOfADirectoryStaysInside(t *testing.T) {
	d := startDaemon(t)
	app := d.reg.Push("team/app", "v1", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "x"))))
	ref := d.reg.Host() + "/team/app:v1"
	d.must(t, "images", "pull", "-q", ref)
	dir := t.TempDir()
	layout, outside := filepath.Join(dir, "layout"), filepath.Join(dir, "outside")
	d.must(t, "images", "export", "--dir", layout, ref)
	config := filepath.Join(layout, "blobs/sha256", app.ConfigID.Encoded())
	for _, target := range []string{outside, "../../../outside"} {
		if err := errors.Join(os.Rename(config, outside), os.Symlink(target, config)); err != nil {
			t.Fatal(err)
		}
		if out, errs, code := d.tool(t, "images", "import", layout); code != exitFailure || out != "" || !strings.Contains(errs, "leads out") {
			t.Errorf("through a link to %s: %q %q, exit code %d", target, out, errs, code)
		}
		if err := os.Rename(outside, config); err != nil {
			t.Fatal(err)
		}
	}
	if out := d.must(t, "images", "import", layout); !strings.Contains(out, ref) {
		t.Errorf("without it: %q", out)
	}
}

// What a directory is filled from may lie: a daemon of another's, or a hand on the way.
func TestUntarStaysInItsDirectory(t *testing.T) {
	for name, entries := range map[string][]imagestest.Entry{
		"dots":            {imagestest.File("../out", "x")},
		"an absolute one": {imagestest.File("/out", "x")},
		"a link":          {imagestest.Symlink("l", ".."), imagestest.File("l/out", "x")},
		"a device":        {imagestest.Char("null", 1, 3)},
		"one twice":       {imagestest.File("f", "1"), imagestest.File("f", "2")},
	} {
		dir := filepath.Join(t.TempDir(), "in")
		err := toDir(dir, func(w io.Writer) error {
			_, err := w.Write(imagestest.Tar(entries...))
			return err
		})
		if err == nil {
			t.Errorf("%s: was unpacked", name)
		}
		if left, err := os.ReadDir(filepath.Dir(dir)); err != nil || len(left) != 0 {
			t.Errorf("%s: left behind: %v %v", name, left, err)
		}
	}
	broken := errors.New("broken")
	if err := toDir(filepath.Join(t.TempDir(), "in"), func(w io.Writer) error {
		tw := tar.NewWriter(w)
		return errors.Join(tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "f", Mode: 0o644, Size: 3}), broken)
	}); !errors.Is(err, broken) {
		t.Errorf("the daemon's error becomes %v", err)
	}
}
