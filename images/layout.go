package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Files of a layout beside those of the OCI: what `docker load` reads, and what berth adds.
const (
	dockerIndex = "manifest.json"
	berthIndex  = "berth.json"
	// annotationName is containerd's for the full name of an image; the OCI's own holds only a tag in many layouts.
	annotationName = "io.containerd.image.name"
)

// berthLayout says which documents the images of a layout were known by where it was exported. An exported layer can be
// without its compression, so that the manifest that all tools read is another one; berth imports the documents as they
// were, and takes the layers by the digests that their configuration has of them uncompressed. So a digest that pods name
// leads to the image on any machine.
type berthLayout struct {
	Images []berthLayoutImage `json:"images"`
}

type berthLayoutImage struct {
	Name     string             `json:"name,omitempty"`
	Document ocispec.Descriptor `json:"document"`
}

// dockerLayoutImage is an image in manifest.json.
type dockerLayoutImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// layout is an OCI layout or a docker archive in a tar file. Nothing in it is trusted.
type layout struct {
	file  *os.File
	files map[string]layoutEntry // in it
	// made are documents and blobs that the layout has under other names than their digests.
	made  map[digest.Digest][]byte
	named map[digest.Digest]string
}

// layoutEntry is where a file lies in a tar file, or the entry that it is a link to.
type layoutEntry struct {
	offset, size int64
	link         string
}

// maxLayoutEntries bounds the index of a tar file.
const maxLayoutEntries = 100_000

// openLayout makes the index of a tar file.
func openLayout(f *os.File) (*layout, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	l := &layout{file: f, files: map[string]layoutEntry{}, made: map[digest.Digest][]byte{}, named: map[digest.Digest]string{}}
	return l, l.scan(size)
}

func (l *layout) scan(size int64) error {
	tr := tar.NewReader(l.file)
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return badImage("archive: %w", err)
		}
		if hdr.Typeflag == tar.TypeDir || hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if len(l.files) >= maxLayoutEntries {
			return fmt.Errorf("archive has more than %d files: %w", maxLayoutEntries, errdefs.ErrResourceExhausted)
		}
		name := path.Clean(hdr.Name)
		if !isLocal(name) {
			return badImage("archive: the name %s leads out of it", quote(hdr.Name))
		}
		if _, ok := l.files[name]; ok {
			return badImage("archive: %s is there twice", quote(name))
		}
		if isSparse(hdr) {
			return badImage("archive: %s is a sparse file", quote(name))
		}
		var e layoutEntry
		switch hdr.Typeflag {
		case tar.TypeReg:
			if e.offset, err = l.file.Seek(0, io.SeekCurrent); err != nil {
				return err
			}
			if e.size = hdr.Size; e.size > size-e.offset {
				return badImage("archive: %s has %d bytes, of which the archive has not all", quote(name), e.size)
			}
		case tar.TypeSymlink: // docker save of old has them for layers that several images have
			e.link = path.Join(path.Dir(name), hdr.Linkname)
		case tar.TypeLink:
			e.link = path.Clean(hdr.Linkname)
		default:
			return badImage("archive: %s is neither a file nor a link", quote(name))
		}
		if e.link != "" && (!isLocal(e.link) || path.IsAbs(hdr.Linkname)) {
			return badImage("archive: the link %s leads out of it", quote(name))
		}
		l.files[name] = e
	}
}

func isLocal(name string) bool {
	return name != "" && name != "." && name != ".." && !strings.HasPrefix(name, "../") && !path.IsAbs(name)
}

// open opens a file of the layout.
func (l *layout) open(name string) (*io.SectionReader, error) {
	if name = path.Clean(name); !isLocal(name) {
		return nil, badImage("%s leads out of the layout", quote(name))
	}
	e, ok := l.files[name]
	if ok && e.link != "" {
		if e, ok = l.files[e.link]; ok && e.link != "" {
			return nil, badImage("archive: %s is a link to a link", quote(name))
		}
	}
	if !ok {
		return nil, fmt.Errorf("%s is missing: %w", quote(name), errdefs.ErrNotFound)
	}
	return io.NewSectionReader(l.file, e.offset, e.size), nil
}

func blobName(d digest.Digest) string {
	return path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// openBlob opens what has a digest, which is not verified here.
func (l *layout) openBlob(d digest.Digest) (*io.SectionReader, error) {
	if data, ok := l.made[d]; ok {
		return io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))), nil
	}
	if name, ok := l.named[d]; ok {
		return l.open(name)
	}
	if err := d.Validate(); err != nil {
		return nil, badImage("digest %s: %w", quote(string(d)), err)
	}
	return l.open(blobName(d))
}

// small reads a document of the layout itself, which no digest vouches for.
func (l *layout) small(name string) ([]byte, error) {
	r, err := l.open(name)
	if err != nil {
		return nil, err
	}
	if r.Size() > maxDocument {
		return nil, fmt.Errorf("%s has %d bytes, more than %d: %w", quote(name), r.Size(), maxDocument, errdefs.ErrResourceExhausted)
	}
	return io.ReadAll(r)
}

// json reads what small does. False if it is not there.
func (l *layout) json(name string, v any) (bool, error) {
	data, err := l.small(name)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	err = json.Unmarshal(data, v)
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		// By the file's words alone, not by names of Go. What `skopeo copy dir:` writes has a manifest.json of another kind.
		return false, badImage("%s has %s where OCI layouts and docker archives have something else (at byte %d)", name, wrong.Value, wrong.Offset)
	}
	if err != nil {
		return false, badImage("%s: %w", name, err)
	}
	return true, nil
}

// layoutImage is an image of a layout, before anything of it was read.
type layoutImage struct {
	name string // as it stands there, or ""
	top  ocispec.Descriptor
	// unknown: the manifest was made up, so that nobody else knows the image by its digest.
	unknown bool
}

// images lists the images of a layout.
func (l *layout) images() ([]layoutImage, error) {
	var own berthLayout
	if ok, err := l.json(berthIndex, &own); err != nil {
		return nil, err
	} else if ok && len(own.Images) > 0 {
		var all []layoutImage
		for _, img := range own.Images {
			all = append(all, layoutImage{name: img.Name, top: img.Document})
		}
		return all, nil
	}
	var docker []dockerLayoutImage
	isDocker, err := l.json(dockerIndex, &docker)
	if err != nil {
		return nil, err
	}
	var index ocispec.Index
	isOCI, err := l.json(ocispec.ImageIndexFile, &index)
	if err != nil {
		return nil, err
	}
	switch {
	case isOCI:
		return ociImages(&index), nil
	case isDocker:
		var all []layoutImage
		for i, img := range docker {
			top, err := l.dockerManifest(img)
			if err != nil {
				return nil, fmt.Errorf("%s: image %d: %w", dockerIndex, i+1, err)
			}
			for _, name := range img.RepoTags {
				all = append(all, layoutImage{name, top, true})
			}
			if len(img.RepoTags) == 0 {
				all = append(all, layoutImage{top: top, unknown: true})
			}
		}
		return all, nil
	}
	return nil, badImage("it has neither %s nor %s: it is no OCI layout and no docker archive", ocispec.ImageIndexFile, dockerIndex)
}

func ociImages(index *ocispec.Index) []layoutImage {
	var all []layoutImage
	for _, desc := range index.Manifests {
		name := desc.Annotations[annotationName]
		if name == "" {
			// Some tools write a whole reference, most of them a tag, from which no name can be told.
			if ref := desc.Annotations[ocispec.AnnotationRefName]; strings.ContainsAny(ref, "/:") {
				name = ref
			}
		}
		desc.URLs, desc.Data, desc.Annotations = nil, nil, nil
		all = append(all, layoutImage{name: name, top: desc})
	}
	return all
}

// dockerManifest makes the manifest that a docker archive has not.
func (l *layout) dockerManifest(img dockerLayoutImage) (top ocispec.Descriptor, err error) {
	if len(img.Layers) > maxLayers {
		return top, fmt.Errorf("%d layers, more than %d: %w", len(img.Layers), maxLayers, errdefs.ErrResourceExhausted)
	}
	data, err := l.small(img.Config)
	if err != nil {
		return top, fmt.Errorf("configuration: %w", err)
	}
	config, err := parseConfig(data, len(img.Layers))
	if err != nil {
		return top, err
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: l.make(ocispec.MediaTypeImageConfig, data),
	}
	// The name is the image's id, where docker wrote it. That it is not would be damage.
	if hex := strings.TrimSuffix(path.Base(img.Config), ".json"); fullHex.MatchString(hex) && hex != m.Config.Digest.Encoded() {
		return top, fmt.Errorf("configuration %s: the digest of what is there is %s: %w", quote(img.Config), m.Config.Digest, errContent)
	}
	for i, name := range img.Layers {
		desc, err := l.dockerLayer(name, config.RootFS.DiffIDs[i])
		if err != nil {
			return top, fmt.Errorf("layer %d of %d: %w", i+1, len(img.Layers), err)
		}
		m.Layers = append(m.Layers, desc)
	}
	doc, err := json.Marshal(m)
	if err != nil {
		return top, err
	}
	return l.make(m.MediaType, doc), nil
}

// make adds a document to the layout.
func (l *layout) make(mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	l.made[d] = data
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

// dockerLayer describes a layer of a docker archive: its digest is the one that the configuration has of it, which is
// verified later, unless it is compressed.
func (l *layout) dockerLayer(name string, diffID digest.Digest) (desc ocispec.Descriptor, err error) {
	r, err := l.open(name)
	if err != nil {
		return desc, err
	}
	desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: diffID, Size: r.Size()}
	head := make([]byte, 4)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && err != io.EOF {
		return desc, err
	}
	if isCompressed(head[:n]) {
		desc.MediaType = ocispec.MediaTypeImageLayerGzip
		if desc.Digest, err = digest.FromReader(io.MultiReader(bytes.NewReader(head[:n]), r)); err != nil {
			return desc, err
		}
	}
	l.named[desc.Digest] = name
	return desc, nil
}

// layoutOrigin is one image of a layout, as the origin of a pull.
type layoutOrigin struct {
	*layout
	top ocispec.Descriptor
}

func (o *layoutOrigin) resolve(context.Context) (ocispec.Descriptor, error) { return o.top, nil }
func (o *layoutOrigin) allNotes() []string                                  { return nil }
func (o *layoutOrigin) redact(text string) string                           { return text }
func (o *layoutOrigin) close()                                              {}

// layers implements origin: in place of a compressed layer that the layout has not, it takes the archive in it, if it has
// that.
func (o *layoutOrigin) layers(descs []ocispec.Descriptor, diffIDs []digest.Digest) []ocispec.Descriptor {
	var all []ocispec.Descriptor
	for i, desc := range descs {
		if _, err := o.openBlob(desc.Digest); err != nil {
			if r, err := o.openBlob(diffIDs[i]); err == nil {
				desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: diffIDs[i], Size: r.Size()}
			}
		}
		all = append(all, desc)
	}
	return all
}

func (o *layoutOrigin) blob(ctx context.Context, desc ocispec.Descriptor, limit int64, consume func(io.Reader) error) error {
	if err := checkDescriptor(desc, max(limit, 1)); err != nil {
		return err
	}
	r, err := o.openBlob(desc.Digest)
	if err != nil {
		return err
	}
	v := &verifier{r: &contextReader{ctx, r}, desc: desc, hash: desc.Digest.Algorithm().Hash()}
	if err := consume(v); err != nil {
		return err
	}
	if !v.ended {
		return fmt.Errorf("%s was not read to its end", desc.Digest)
	}
	return nil
}
