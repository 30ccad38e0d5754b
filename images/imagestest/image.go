package imagestest

import (
	_ "crypto/sha512" // for images by other digests
	"encoding/json"
	"runtime"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LayerBlob is a layer as a registry has it.
type LayerBlob struct {
	Blob      []byte
	MediaType string
	DiffID    digest.Digest
	// Descriptor, if not nil, changes the descriptor that the manifest has of it.
	Descriptor func(*ocispec.Descriptor)
}

// Layer is a gzip layer of entries.
func Layer(entries ...Entry) LayerBlob { return GzipLayer(Tar(entries...)) }

// GzipLayer is a gzip layer of an archive.
func GzipLayer(tar []byte) LayerBlob {
	return LayerBlob{Blob: Gzip(tar), MediaType: ocispec.MediaTypeImageLayerGzip, DiffID: digest.FromBytes(tar)}
}

// ZstdLayer is a zstd layer of an archive.
func ZstdLayer(tar []byte) LayerBlob {
	return LayerBlob{Blob: Zstd(tar), MediaType: ocispec.MediaTypeImageLayerZstd, DiffID: digest.FromBytes(tar)}
}

// PlainLayer is an uncompressed layer.
func PlainLayer(tar []byte) LayerBlob {
	return LayerBlob{Blob: tar, MediaType: ocispec.MediaTypeImageLayer, DiffID: digest.FromBytes(tar)}
}

// Image is an image to be built. Change its fields before it is pushed.
type Image struct {
	Layers []LayerBlob
	Config ocispec.Image
	// Algorithm of its digests; sha256 if empty.
	Algorithm digest.Algorithm
	// Manifest, if not nil, changes the manifest before it is written.
	Manifest func(*ocispec.Manifest)
}

// NewImage is an image for this machine.
func NewImage(layers ...LayerBlob) *Image {
	img := &Image{Layers: layers}
	img.Config.OS, img.Config.Architecture = "linux", runtime.GOARCH
	img.Config.RootFS.Type = "layers"
	return img
}

// Built is an image as bytes.
type Built struct {
	Manifest   []byte
	Descriptor ocispec.Descriptor
	ConfigID   digest.Digest
	Blobs      map[digest.Digest][]byte
}

// Build makes the documents.
func (img *Image) Build() *Built {
	alg := img.Algorithm
	if alg == "" {
		alg = digest.Canonical
	}
	b := &Built{Blobs: map[digest.Digest][]byte{}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	config := img.Config
	config.RootFS.DiffIDs = nil
	for _, l := range img.Layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
		desc := ocispec.Descriptor{MediaType: l.MediaType, Digest: alg.FromBytes(l.Blob), Size: int64(len(l.Blob))}
		b.Blobs[desc.Digest] = l.Blob
		if l.Descriptor != nil {
			l.Descriptor(&desc)
		}
		m.Layers = append(m.Layers, desc)
	}
	data := marshal(config)
	b.ConfigID = alg.FromBytes(data)
	b.Blobs[b.ConfigID] = data
	m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: b.ConfigID, Size: int64(len(data))}
	if img.Manifest != nil {
		img.Manifest(&m)
	}
	b.Manifest = marshal(m)
	b.Descriptor = ocispec.Descriptor{
		MediaType: m.MediaType, Digest: alg.FromBytes(b.Manifest), Size: int64(len(b.Manifest)),
		Platform: &ocispec.Platform{OS: config.OS, Architecture: config.Architecture},
	}
	return b
}

func marshal(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}
