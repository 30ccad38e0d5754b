package images

import (
	"archive/tar"
	"cmp"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Artifacts are what registries hold beside container images: models, charts, policies. They cannot be run, and can be
// mounted as image volumes (KEP-4639): layers that are archives are merged as those of images are, and each other one is
// a file, named by its title as oras, podman and CRI-O name it.

// artifactType says what an artifact is, and "" for a container image: that is one whose configuration is an image's.
func artifactType(m *ocispec.Manifest) string {
	if m.Config.MediaType == ocispec.MediaTypeImageConfig || m.Config.MediaType == dockerConfig {
		return ""
	}
	return cmp.Or(m.ArtifactType, m.Config.MediaType, "unknown")
}

// artifactFound makes of an artifact what is made of an image. It has no configuration of ours, and so no diff IDs: those
// made here name the layers' content just as well, since a blob has only one.
func artifactFound(desc ocispec.Descriptor, m *ocispec.Manifest, artifact string) *foundImage {
	found := &foundImage{digest: desc.Digest, artifact: artifact, image: &ocispec.Image{}, config: []byte("{}")}
	layers := *m
	layers.Layers = nil
	for _, l := range m.Layers {
		if l.MediaType == ocispec.MediaTypeEmptyJSON {
			continue // stands for no content
		}
		layers.Layers = append(layers.Layers, l)
		id := l.Digest
		if !isLayerType(l.MediaType) {
			id = digest.FromString("file\x00" + title(l) + "\x00" + string(l.Digest))
		}
		found.image.RootFS.DiffIDs = append(found.image.RootFS.DiffIDs, id)
	}
	found.manifest = &layers
	return found
}

// title is the file name of an artifact's layer, with slashes if it is in a directory.
func title(desc ocispec.Descriptor) string {
	return cmp.Or(desc.Annotations[ocispec.AnnotationTitle], desc.Digest.Algorithm().String()+"-"+desc.Digest.Encoded())
}

// fillArtifact makes one layer of an artifact, whose blob's digest is verified while it is read.
func (l *stagedLayer) fillArtifact(ctx context.Context, r io.Reader, desc ocispec.Descriptor, id digest.Digest, limit bounds) error {
	if isLayerType(desc.MediaType) {
		_, err := l.fillTar(ctx, r, id, limit)
		return err
	}
	name := title(desc)
	if !filepath.IsLocal(name) || filepath.Clean(name) == "." || strings.Contains("/"+name, "/"+whiteout) {
		return badImage("its title %s is no name of a file", quote(name))
	}
	a := newApplier(l.root, limit)
	defer a.close()
	hdr := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: desc.Size, ModTime: time.Unix(0, 0)}
	if err := a.charge(hdr); err != nil {
		return err
	}
	if err := a.entry(ctx, hdr, r); err != nil {
		return blame(err)
	}
	l.rec, l.size = layerRecord{DiffID: id, File: filepath.Clean(name)}, int64(a.bytes)
	return nil
}

// runnable refuses an artifact where a container is to be made.
func (s *Store) runnable(image digest.Digest) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	rec := s.images[image]
	if rec == nil || rec.Artifact == "" {
		return nil
	}
	return fmt.Errorf("image %s is an artifact of type %s: it can be mounted as an image volume, but not run: %w",
		image, quote(rec.Artifact), errdefs.ErrFailedPrecondition)
}
