package images

import (
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
)

func TestLayersAndTheirUsers(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	base := imagestest.Layer(imagestest.File("base", "b"))
	reg.Push("a", "x", imagestest.NewImage(base, imagestest.Layer(imagestest.File("f", "1"))))
	reg.Push("b", "x", imagestest.NewImage(base, imagestest.Layer(imagestest.File("f", "2"))))
	a, b := mustPull(t, s, reg.Host()+"/a:x"), mustPull(t, s, reg.Host()+"/b:x")
	if err := s.Prepare("c1", a.ID, nil); err != nil {
		t.Fatal(err)
	}
	if keys, targets := s.Users(a.ID); !slices.Equal(keys, []string{"c1"}) || targets != nil {
		t.Errorf("users of a: %v %v", keys, targets)
	}
	if keys, targets := s.Users(b.ID); keys != nil || targets != nil {
		t.Errorf("users of b: %v %v", keys, targets)
	}
	both := []digest.Digest{a.ID, b.ID}
	slices.Sort(both)
	check := func(want map[ChainID]Layer) {
		t.Helper()
		layers := s.Layers()
		if len(layers) != len(want) {
			t.Errorf("%d layers, want %d", len(layers), len(want))
		}
		for _, l := range layers {
			if w := want[l.ID]; !slices.Equal(l.Images, w.Images) || l.Held != w.Held || l.Bytes == 0 || l.Inodes == 0 {
				t.Errorf("layer %+v, want %+v", l, w)
			}
		}
	}
	check(map[ChainID]Layer{a.Layers[0]: {Images: both, Held: true}, a.Layers[1]: {Images: both[slices.Index(both, a.ID):][:1], Held: true}, b.Layers[1]: {Images: both[slices.Index(both, b.ID):][:1]}})
	for _, id := range both {
		if err := s.Remove(t.Context(), string(id)); err != nil {
			t.Fatal(err)
		}
	}
	check(map[ChainID]Layer{a.Layers[0]: {Held: true}, a.Layers[1]: {Held: true}})
	if err := s.Release("c1"); err != nil {
		t.Fatal(err)
	}
	check(nil)
}
