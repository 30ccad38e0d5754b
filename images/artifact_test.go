package images

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-run/berth/images/imagestest"
)

// artifactFile is a layer of an artifact that is a file.
func artifactFile(title, content string) imagestest.LayerBlob {
	return imagestest.LayerBlob{
		Blob: []byte(content), MediaType: "application/vnd.example.data", DiffID: digest.FromString(content),
		Descriptor: func(d *ocispec.Descriptor) {
			if title != "" {
				d.Annotations = map[string]string{ocispec.AnnotationTitle: title}
			}
		},
	}
}

// artifact is one as oras pushes it: its configuration is the empty one that all such artifacts share.
func artifact(layers ...imagestest.LayerBlob) *imagestest.Image {
	img := imagestest.NewImage(layers...)
	img.Manifest = func(m *ocispec.Manifest) {
		m.ArtifactType, m.Config = "application/vnd.example.model", ocispec.DescriptorEmptyJSON
	}
	return img
}

// TestArtifactsAreVolumes: KEP-4639: what is no container image can be mounted, and not run.
func TestArtifactsAreVolumes(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	ctx := context.Background()
	built := reg.Push("a", "model", artifact(
		artifactFile("weights.bin", "one"), artifactFile("sub/dir/card.md", "two"), artifactFile("", "untitled"),
		imagestest.Layer(imagestest.File("tar/f", "three"), imagestest.File("weights.txt", "text")),
		artifactFile("weights.txt", "newer"),
		imagestest.LayerBlob{Blob: []byte("{}"), MediaType: ocispec.MediaTypeEmptyJSON},
	))
	other := reg.Push("a", "other", artifact(artifactFile("weights.bin", "other")))
	img, err := s.Pull(ctx, reg.Host()+"/a:model", nil)
	if err != nil {
		t.Fatal(err)
	}
	if img.ID != built.Descriptor.Digest || img.Artifact != "application/vnd.example.model" || len(img.RepoTags) != 1 || img.Size == 0 {
		t.Errorf("got %+v, want an artifact with the id %s", img, built.Descriptor.Digest)
	}
	second, err := s.Pull(ctx, reg.Host()+"/a:other", nil)
	if err != nil || second.ID != other.Descriptor.Digest {
		t.Errorf("another artifact with the same configuration: %+v, %v", second, err)
	}
	target := mountPoint(t)
	if err := s.MountView(ctx, img.ID, target, nil); err != nil {
		t.Fatal(err)
	}
	untitled := "sha256-" + digest.FromString("untitled").Encoded()
	for name, want := range map[string]string{"weights.bin": "one", "sub/dir/card.md": "two", untitled: "untitled", "tar/f": "three", "weights.txt": "newer"} {
		if got, err := os.ReadFile(filepath.Join(target, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	if err := os.WriteFile(filepath.Join(target, "weights.bin"), nil, 0o644); err == nil {
		t.Error("the volume can be written to")
	}
	if err := s.Unmount(target); err != nil {
		t.Error(err)
	}
	err = s.Prepare("aa", img.ID, nil)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `artifact of type "application/vnd.example.model"`) {
		t.Errorf("run as a container: %v", err)
	}
	for _, ref := range []string{"/a:model", "/a:other"} {
		if err := s.Remove(ctx, reg.Host()+ref); err != nil {
			t.Error(err)
		}
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left behind, although nothing uses it: %v", left)
	}
}

// TestHostileArtifacts: the names of files are a stranger's.
func TestHostileArtifacts(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	for title, ok := range map[string]bool{
		"../up": false, "/etc/passwd": false, ".": false, "..": false, "a/../../b": false, ".wh.f": false, "d/.wh..wh..opq": false,
		".wh.d/f": false, strings.Repeat("n", 256): false, strings.Repeat("d/", 2100) + "f": false, "a/./b": true, "déjà vu": true,
	} {
		s := openStore(t)
		sentinel := imagestest.NewSentinel(t, filepath.Join(s.root, tmpDir, "outside"))
		reg.Push("a", "b", artifact(artifactFile(title, "x")))
		_, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil)
		sentinel.Check(t)
		if ok && err != nil || !ok && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%.40q: %v", title, err)
		}
	}
}

// TestArtifactBesideAnImage: a signature that an index names without a platform is not what a node gets instead of its image.
func TestArtifactBesideAnImage(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	signature := reg.Push("a", "", artifact(artifactFile("sig", "x"))).Descriptor
	signature.Platform = nil
	foreign := smallImage("x")
	foreign.Config.OS, foreign.Config.Architecture = "plan9", "mips"
	reg.PushIndex("a", "foreign", signature, reg.Push("a", "", foreign).Descriptor)
	_ = pullErr(t, s, reg.Host()+"/a:foreign", nil)
	mine := reg.Push("a", "", smallImage("x"))
	reg.PushIndex("a", "mine", signature, mine.Descriptor)
	if img, err := s.Pull(context.Background(), reg.Host()+"/a:mine", nil); err != nil || img.ID != mine.ConfigID {
		t.Errorf("got %+v, %v; want %s", img, err, mine.ConfigID)
	}
	reg.PushIndex("a", "only", signature)
	if img, err := s.Pull(context.Background(), reg.Host()+"/a:only", nil); err != nil || img.ID != signature.Digest {
		t.Errorf("got %+v, %v; want %s", img, err, signature.Digest)
	}
}
