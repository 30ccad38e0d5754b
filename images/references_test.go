package images

import (
	"context"
	"encoding/json"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-run/berth/images/imagestest"
)

// TestTagWithDigest: the digest decides, so that the tag, which may mean another image, or none, is not the image's.
func TestTagWithDigest(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	repo := reg.Host() + "/a"
	built := reg.Push("a", "", smallImage("x"))
	other := reg.Push("a", "tag", smallImage("other"))
	byDigest := repo + "@" + built.Descriptor.Digest.String()
	tagged := repo + ":tag@" + built.Descriptor.Digest.String()
	for _, ref := range []string{tagged, byDigest, repo + ":none@" + built.Descriptor.Digest.String()} {
		img := mustPull(t, s, ref)
		if img.ID != built.ConfigID || len(img.RepoTags) != 0 || !slices.Equal(img.RepoDigests, []string{byDigest}) {
			t.Errorf("%s: %+v, want %s with the digest alone", ref, img, built.ConfigID)
		}
		if found, err := s.Image(ref); err != nil || found.ID != img.ID {
			t.Errorf("%s: found %+v, %v", ref, found, err)
		}
	}
	if _, err := s.Image(repo + ":tag"); !errdefs.IsNotFound(err) {
		t.Errorf("by the tag alone: %v", err)
	}
	if img := mustPull(t, s, repo+":tag"); img.ID != other.ConfigID || !slices.Equal(img.RepoTags, []string{repo + ":tag"}) {
		t.Errorf("by the tag: %+v, want %s", img, other.ConfigID)
	}
	if err := s.Remove(context.Background(), tagged); err != nil {
		t.Fatal(err)
	}
	if all := s.Images(); len(all) != 1 || all[0].ID != other.ConfigID {
		t.Errorf("left after a removal by tag and digest: %+v", all)
	}
}

// TestDockersFormats: manifest lists of schema 2, nested, with Docker's types of everything below.
func TestDockersFormats(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	img := smallImage("x")
	img.Layers = append(img.Layers, imagestest.PlainLayer(imagestest.Tar(imagestest.File("g", "y"))))
	img.Layers[0].MediaType, img.Layers[1].MediaType = dockerLayer+".gzip", dockerLayer
	img.Manifest = func(m *ocispec.Manifest) { m.MediaType, m.Config.MediaType = dockerManifest, dockerConfig }
	built := reg.Push("a", "plain", img)
	top := built.Descriptor
	for range 2 {
		foreign := top
		foreign.Platform = &ocispec.Platform{OS: "windows", Architecture: runtime.GOARCH, OSVersion: "10.0.14393.1066"}
		data, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: dockerManifestList, Manifests: []ocispec.Descriptor{foreign, top}})
		if err != nil {
			t.Fatal(err)
		}
		top = ocispec.Descriptor{MediaType: dockerManifestList, Digest: digest.FromBytes(data), Size: int64(len(data))}
		reg.PutManifest("a", "list", data, dockerManifestList, top.Digest)
	}
	digests := []string{reg.Host() + "/a@" + top.Digest.String()}
	if got := mustPull(t, s, reg.Host()+"/a:list"); got.ID != built.ConfigID || len(got.Layers) != 2 || !slices.Equal(got.RepoDigests, digests) {
		t.Errorf("got %+v, want %s with the digest of the list", got, built.ConfigID)
	}
	digests = append(digests, reg.Host()+"/a@"+built.Descriptor.Digest.String())
	slices.Sort(digests)
	if got := mustPull(t, s, reg.Host()+"/a:plain"); got.ID != built.ConfigID || !slices.Equal(got.RepoDigests, digests) {
		t.Errorf("got %+v, want the same image with the manifest's digest, too", got)
	}
}

// TestSchema1IsNotPulled, also where a registry gives it another type; the hint reaches whoever pulls.
func TestSchema1IsNotPulled(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	data := []byte(`{"schemaVersion":1,"name":"a","tag":"b","architecture":"amd64","fsLayers":[{"blobSum":"sha256:` + someHex + `"}],"history":[{"v1Compatibility":"{}"}]}`)
	for _, mediaType := range []string{dockerSchema1, dockerSchema1Sig, "application/json", ocispec.MediaTypeImageManifest, dockerManifest} {
		reg.PutManifest("a", "b", data, mediaType, digest.FromBytes(data))
		err := pullErr(t, s, reg.Host()+"/a:b", nil)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "schema 1") || !strings.Contains(err.Error(), "push it again") {
			t.Errorf("as %s: %v", mediaType, err)
		}
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestPlatformOfAnIndexDecides: configurations that say what they were built on, and not what for, are many.
func TestPlatformOfAnIndexDecides(t *testing.T) {
	s, other := openStore(t), openStore(t)
	reg := imagestest.NewRegistry(t)
	img := smallImage("x")
	img.Config.Architecture = "mips64le"
	built := reg.Push("a", "", img)
	desc := built.Descriptor
	desc.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	reg.PushIndex("a", "says", desc)
	got := mustPull(t, s, reg.Host()+"/a:says")
	if got.ID != built.ConfigID {
		t.Errorf("got %+v, want %s", got, built.ConfigID)
	}
	archive, _ := exported(t, s, reg.Host()+"/a:says")
	if _, err := imported(other, archive, ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	if img, err := other.Image(reg.Host() + "/a:says"); err != nil || img.ID != got.ID {
		t.Errorf("on another node: %+v, %v", img, err)
	}
	desc.Platform = nil // nothing but the configuration tells
	reg.PushIndex("a", "silent", desc)
	for _, ref := range []string{"/a:silent", "/a@" + built.Descriptor.Digest.String()} {
		if err := pullErr(t, openStore(t), reg.Host()+ref, nil); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "mips64le") {
			t.Errorf("%s: %v", ref, err)
		}
	}
}

// TestUntaggedImageWithoutDigests: an image from a docker archive has no digest that a registry knows. When its tag moves it
// is left with no name at all, and is listed, found and removed by its id, also after a restart.
func TestUntaggedImageWithoutDigests(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "images")
	s, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	reg := imagestest.NewRegistry(t)
	ref := reg.Host() + "/a:b"
	old := imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(imagestest.File("f", "old"))))
	built := old.Build()
	archive := imagestest.Tar(imagestest.File("layer.tar", string(old.Layers[0].Blob)), imagestest.File("config.json", string(built.Blobs[built.ConfigID])),
		imagestest.File(dockerIndex, asJSON(t, []dockerLayoutImage{{Config: "config.json", RepoTags: []string{ref}, Layers: []string{"layer.tar"}}})))
	if _, err := imported(s, archive, ImportOptions{Unpinned: true}); err != nil {
		t.Fatal(err)
	}
	reg.Push("a", "b", smallImage("new"))
	moved := mustPull(t, s, ref)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(Options{Root: root}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if all := s.Images(); len(all) != 2 {
		t.Errorf("listed: %+v", all)
	}
	img, err := s.Image(built.ConfigID.Encoded()[:12])
	if err != nil || img.ID != built.ConfigID || len(img.RepoTags)+len(img.RepoDigests) != 0 {
		t.Errorf("the old image: %+v, %v; want %s without names", img, err, built.ConfigID)
	}
	if err := s.Remove(context.Background(), string(built.ConfigID)); err != nil {
		t.Fatal(err)
	}
	if all := s.Images(); len(all) != 1 || all[0].ID != moved.ID || !slices.Equal(all[0].RepoTags, []string{ref}) {
		t.Errorf("after its removal: %+v", all)
	}
}
