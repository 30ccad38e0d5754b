package images

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// documentWalk goes from a reference's document down to one manifest for this platform.
type documentWalk struct {
	src     origin
	have    func(digest.Digest) ([]byte, error) // what is here already
	want    platforms.MatchComparer
	fetched int
	refs    int
	docs    map[digest.Digest]keptDocument
	present []string // platforms that were seen and do not fit
}

// keptDocument is a document that the store keeps, since what it names can be exported with it.
type keptDocument struct {
	desc ocispec.Descriptor
	data []byte
}

func (w *documentWalk) keep(desc ocispec.Descriptor, data []byte) {
	if w.docs == nil {
		w.docs = map[digest.Digest]keptDocument{}
	}
	w.docs[desc.Digest] = keptDocument{ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: int64(len(data))}, data}
}

type foundImage struct {
	digest   digest.Digest
	manifest *ocispec.Manifest
	artifact string // its type; "" for a container image
	image    *ocispec.Image
	config   []byte
}

// maxDocuments bounds how many documents one pull fetches.
const maxDocuments = 32

// find returns nil if there is nothing for this platform below desc.
func (w *documentWalk) find(ctx context.Context, desc ocispec.Descriptor, depth int) (*foundImage, error) {
	if w.fetched++; w.fetched > maxDocuments {
		return nil, fmt.Errorf("more than %d indexes and manifests have to be read: %w", maxDocuments, errdefs.ErrResourceExhausted)
	}
	if depth > maxIndexDepth {
		return nil, fmt.Errorf("indexes are nested more than %d deep: %w", maxIndexDepth, errdefs.ErrResourceExhausted)
	}
	data, err := w.document(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	mediaType := desc.MediaType
	if desc.ArtifactType == untyped {
		mediaType = ""
	}
	doc, err := parseDocument(data, mediaType)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	w.keep(desc, data)
	if doc.Manifest != nil {
		return w.image(ctx, desc, doc.Manifest, depth > 0 && desc.Platform != nil)
	}
	if w.refs += len(doc.Index.Manifests); w.refs > maxReferences {
		return nil, fmt.Errorf("indexes name more than %d manifests: %w", maxReferences, errdefs.ErrResourceExhausted)
	}
	for _, child := range candidates(doc.Index, w.want) {
		found, err := w.find(ctx, child, depth+1)
		if err != nil {
			return nil, err
		}
		// Signatures and the like, which say no platform, do not stand in for the image that they lie beside.
		if found != nil && (found.artifact == "" || child.Platform != nil || len(platformsOf(doc.Index)) == 0) {
			return found, nil
		}
	}
	w.present = append(w.present, platformsOf(doc.Index)...)
	return nil, nil
}

// document asks for what is not here. Whoever asks for it was given the name of what leads to it by the registry itself.
func (w *documentWalk) document(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if data, err := w.have(desc.Digest); err == nil && int64(len(data)) == desc.Size && desc.Digest.Validate() == nil && desc.Digest.Algorithm().FromBytes(data) == desc.Digest {
		return data, nil
	}
	return fetchDocument(ctx, w.src, desc)
}

// image fetches the configuration, which tells the platform unless an index has: not all builders write into it what they
// built for, and variants least of all.
func (w *documentWalk) image(ctx context.Context, desc ocispec.Descriptor, m *ocispec.Manifest, fits bool) (*foundImage, error) {
	if artifact := artifactType(m); artifact != "" {
		return artifactFound(desc, m, artifact), nil
	}
	config, err := w.document(ctx, m.Config)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", m.Config.Digest, err)
	}
	w.keep(m.Config, config)
	image, err := parseConfig(config, len(m.Layers))
	if err != nil {
		return nil, err
	}
	if !fits && (image.OS != "" || image.Architecture != "") {
		if !w.want.Match(platforms.Normalize(image.Platform)) {
			w.present = append(w.present, quote(platforms.Format(image.Platform)))
			return nil, nil
		}
	}
	return &foundImage{digest: desc.Digest, manifest: m, image: image, config: config}, nil
}
