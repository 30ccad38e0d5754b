package testimages

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"reflect"
	"testing"
)

func TestLayerNamesParentsFirstAndKeepsSetuid(t *testing.T) {
	layer, err := Layer(
		File("a/b/file", "text"),
		Entry{Name: "bin/su", Mode: 0o755 | fs.ModeSetuid, Data: []byte("x")},
		Entry{Name: "tmp", Type: tar.TypeDir, Mode: 0o777 | fs.ModeSticky},
		Entry{Name: "a/link", Type: tar.TypeSymlink, Link: "b"},
	)
	if err != nil {
		t.Fatal(err)
	}
	type entry struct {
		name, link, text string
		mode             int64
	}
	want := []entry{
		{"a/", "", "", 0o755},
		{"a/b/", "", "", 0o755},
		{"a/b/file", "", "text", 0o644},
		{"bin/", "", "", 0o755},
		{"bin/su", "", "x", 0o4755},
		{"tmp/", "", "", 0o1777},
		{"a/link", "b", "", 0},
	}
	var got []entry
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, entry{h.Name, h.Linkname, string(text), h.Mode})
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("layer has\n%v, want\n%v", got, want)
	}
}

func TestSameEntriesGiveTheSameLayer(t *testing.T) {
	one, err := Layer(File("x", "1"), Dir("y"))
	if err != nil {
		t.Fatal(err)
	}
	two, err := Layer(File("x", "1"), Dir("y"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one, two) {
		t.Error("two archives of the same files differ")
	}
}
