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
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExportReport says what an export wrote.
type ExportReport struct {
	Images []ExportedImage `json:"images"`
}

// ExportedImage is an image as it was written.
type ExportedImage struct {
	ID    digest.Digest `json:"id"`
	Names []string      `json:"names"`
	// Manifest is the digest of the manifest that was pulled, and Exported that of the one that was written for other
	// tools: another one if a layer could not be compressed again as it was. The image's id stays, and berth imports it by
	// the digests that it had.
	Manifest digest.Digest   `json:"manifest"`
	Exported digest.Digest   `json:"exported"`
	Layers   []ExportedLayer `json:"layers"`
}

// Exact tells whether the image was written byte for byte as it was pulled.
func (e *ExportedImage) Exact() bool { return e.Manifest == e.Exported }

// ExportedLayer is a layer as it was written.
type ExportedLayer struct {
	// Digest is the one that the image was pulled with, and Exported the one that was written.
	Digest   digest.Digest `json:"digest"`
	Exported digest.Digest `json:"exported"`
	Size     int64         `json:"size"`
	// Why it is another one; "" if it is not.
	Why string `json:"why,omitempty"`
}

// Export writes images, by any of their names, as a tar file that is an OCI layout and a docker archive in one: `berth
// images import`, `ctr images import`, `docker load`, `podman load` and `skopeo copy oci-archive:` read it.
//
// A layer that is kept compressed is written as it is. Another one is made again from its directory; its compression is
// tried anew, and where that gives other bytes it is written uncompressed, which the report says. What is written was
// verified against its digests. The error is errdefs.ErrNotFound for an image that is not there, ErrFailedPrecondition for
// one that cannot be made again, ErrDataLoss for a layer that is damaged, which the next pull mends.
func (s *Store) Export(ctx context.Context, names []string, w io.Writer) (*ExportReport, error) {
	e := &exporter{s: s, ctx: ctx, w: tar.NewWriter(w), report: &ExportReport{}, written: map[digest.Digest]bool{}}
	for _, name := range names {
		id, err := s.find(name)
		if err != nil {
			return e.report, fmt.Errorf("export: %w", err)
		}
		if err := e.image(id); err != nil {
			return e.report, fmt.Errorf("export image %s: %w", quote(name), err)
		}
	}
	if len(names) == 0 {
		return e.report, fmt.Errorf("export: no image is named: %w", errdefs.ErrInvalidArgument)
	}
	if err := e.finish(); err != nil {
		return e.report, err
	}
	// Only now: half an archive must not look like a whole one.
	return e.report, e.w.Close()
}

type exporter struct {
	s       *Store
	ctx     context.Context
	w       *tar.Writer
	report  *ExportReport
	written map[digest.Digest]bool

	index  []ocispec.Descriptor
	docker []dockerLayoutImage
	own    berthLayout
}

func (e *exporter) image(id digest.Digest) error {
	s := e.s
	if err := e.ctx.Err(); err != nil {
		return err
	}
	if slices.ContainsFunc(e.report.Images, func(i ExportedImage) bool { return i.ID == id }) {
		return nil // by another of its names
	}
	held, err := s.holdImage(id)
	if err != nil {
		return err
	}
	defer func() {
		if err := s.letGo(held); err != nil {
			s.log.Warn("unused layers stay until the next removal", "error", err)
		}
	}()
	s.mu.RLock()
	rec, refs := s.images[id], s.refsOf(id)
	s.mu.RUnlock()
	if rec == nil {
		return errdefs.ErrNotFound
	}
	if len(rec.Documents) == 0 || len(rec.Blobs) != len(rec.Layers) {
		return fmt.Errorf("it was pulled by an earlier version of berth, which kept no manifests; pull it again: %w", errdefs.ErrFailedPrecondition)
	}
	documents := map[digest.Digest][]byte{}
	for _, d := range rec.Documents {
		if documents[d.Digest], err = s.document(d.Digest); err != nil {
			return err
		}
	}
	out := ExportedImage{ID: id, Names: refs, Manifest: rec.Manifest}
	var layers []ocispec.Descriptor
	for i, chain := range rec.Layers {
		desc, why, err := e.layer(chain, rec.Blobs[i])
		if err == nil && why != "" && rec.Artifact != "" {
			err = fmt.Errorf("%s, and an artifact has no configuration that names it otherwise; keep blobs and pull it again: %w", why, errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(rec.Layers), err)
		}
		layers = append(layers, desc)
		out.Layers = append(out.Layers, ExportedLayer{Digest: rec.Blobs[i].Digest, Exported: desc.Digest, Size: desc.Size, Why: why})
	}
	if rec.Artifact != "" {
		// Its configuration says nothing, and is not kept: where it is the empty one, that is known without it.
		if err := e.blob(ocispec.DescriptorEmptyJSON.Digest, ocispec.DescriptorEmptyJSON.Data); err != nil {
			return err
		}
	}
	for _, d := range rec.Documents {
		if err := e.blob(d.Digest, documents[d.Digest]); err != nil {
			return err
		}
	}
	desc, manifest, err := withLayers(rec, documents[rec.Manifest], layers)
	if err != nil {
		return err
	}
	if err := e.blob(desc.Digest, manifest); err != nil {
		return err
	}
	out.Exported = desc.Digest
	e.report.Images = append(e.report.Images, out)
	e.list(rec, refs, desc, layers)
	return nil
}

// withLayers returns the manifest of an image with other layers, or as it is if they are its own.
func withLayers(rec *imageRecord, data []byte, layers []ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	i := slices.IndexFunc(rec.Documents, func(d ocispec.Descriptor) bool { return d.Digest == rec.Manifest })
	if i < 0 {
		return ocispec.Descriptor{}, nil, fmt.Errorf("its manifest %s: %w", rec.Manifest, errdefs.ErrNotFound)
	}
	desc := rec.Documents[i]
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return desc, nil, fmt.Errorf("its manifest %s: %w", rec.Manifest, err)
	}
	same := true
	for i, l := range layers {
		if m.Layers[i].Digest == l.Digest {
			continue
		}
		same = false
		mediaType := ocispec.MediaTypeImageLayer
		if m.MediaType == dockerManifest {
			mediaType = dockerLayer
		}
		m.Layers[i] = ocispec.Descriptor{MediaType: mediaType, Digest: l.Digest, Size: l.Size, Annotations: m.Layers[i].Annotations}
	}
	if same {
		return desc, data, nil
	}
	data, err := json.Marshal(m)
	if err != nil {
		return desc, nil, err
	}
	return ocispec.Descriptor{MediaType: desc.MediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, data, nil
}

// list adds an image to the indexes of the layout.
func (e *exporter) list(rec *imageRecord, refs []string, manifest ocispec.Descriptor, layers []ocispec.Descriptor) {
	var config ocispec.Image
	if err := json.Unmarshal(rec.Config, &config); err == nil && config.OS != "" {
		manifest.Platform = &ocispec.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant}
	}
	document := func(d digest.Digest) (ocispec.Descriptor, bool) {
		i := slices.IndexFunc(rec.Documents, func(o ocispec.Descriptor) bool { return o.Digest == d })
		return rec.Documents[max(i, 0)], i >= 0
	}
	byRepo := map[string]ocispec.Descriptor{}
	for _, ref := range refs {
		if repo, d, ok := strings.Cut(ref, "@"); ok {
			if desc, ok := document(digest.Digest(d)); ok {
				byRepo[repo] = desc
				e.own.Images = append(e.own.Images, berthLayoutImage{Name: ref, Document: desc})
			}
		}
	}
	var tags []string
	for _, ref := range refs {
		named, err := reference.ParseNormalizedNamed(ref)
		tagged, ok := named.(reference.NamedTagged)
		if err != nil || !ok || strings.Contains(ref, "@") {
			continue
		}
		desc, ok := byRepo[named.Name()]
		if !ok {
			desc, _ = document(rec.Manifest)
		}
		e.own.Images = append(e.own.Images, berthLayoutImage{Name: ref, Document: desc})
		entry := manifest
		entry.Annotations = map[string]string{annotationName: ref, ocispec.AnnotationRefName: tagged.Tag()}
		e.index = append(e.index, entry)
		// In full: podman takes a short one for one of its own, and names the image localhost/….
		tags = append(tags, named.String())
	}
	if len(refs) == 0 {
		desc, _ := document(rec.Manifest)
		e.own.Images = append(e.own.Images, berthLayoutImage{Document: desc})
	}
	if len(tags) == 0 {
		e.index = append(e.index, manifest)
	}
	if rec.Artifact != "" {
		return // nothing that docker could load
	}
	img := dockerLayoutImage{RepoTags: tags, Layers: []string{}}
	for _, l := range layers {
		img.Layers = append(img.Layers, blobName(l.Digest))
	}
	for _, d := range rec.Documents {
		if d.MediaType == ocispec.MediaTypeImageConfig || d.MediaType == dockerConfig {
			img.Config = blobName(d.Digest)
		}
	}
	e.docker = append(e.docker, img)
}

// finish writes the indexes.
func (e *exporter) finish() error {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: e.index}
	for name, v := range map[string]any{
		ocispec.ImageLayoutFile: ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion},
		ocispec.ImageIndexFile:  index,
		dockerIndex:             e.docker,
		berthIndex:              e.own,
	} {
		data, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if err := e.file(name, int64(len(data)), func(w io.Writer) error { _, err := w.Write(data); return err }); err != nil {
			return fmt.Errorf("export: %s: %w", name, err)
		}
	}
	return nil
}

// blob writes a document.
func (e *exporter) blob(d digest.Digest, data []byte) error {
	if e.written[d] {
		return nil
	}
	if d.Algorithm().FromBytes(data) != d {
		return fmt.Errorf("document %s: %w", d, errContent)
	}
	e.written[d] = true
	return e.file(blobName(d), int64(len(data)), func(w io.Writer) error { _, err := io.Copy(w, bytes.NewReader(data)); return err })
}

// layer writes a layer, as it was pulled if that can be done, and tells why it is another one if it is.
func (e *exporter) layer(chain ChainID, was ocispec.Descriptor) (desc ocispec.Descriptor, why string, err error) {
	s := e.s
	s.mu.RLock()
	rec := s.layers[chain]
	s.mu.RUnlock()
	if rec == nil {
		return desc, "", errdefs.ErrNotFound
	}
	if rec.Blob != nil && (rec.Blob.Digest == was.Digest || rec.Tape == "") {
		err := e.kept(rec)
		if err == nil || !errdefs.IsDataLoss(err) || rec.Tape == "" {
			return *rec.Blob, notAsPulled(rec.Blob.Digest, was.Digest), err
		}
	}
	if rec.File != "" {
		return was, "", e.soleFile(chain, rec, was)
	}
	if rec.Tape == "" {
		return desc, "", fmt.Errorf("layer %s was unpacked by an earlier version of berth, or has entries that replace each other, and its blob was not kept; keep blobs and pull it again: %w", chain, errdefs.ErrFailedPrecondition)
	}
	desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: rec.Archive, Size: rec.Size}
	if desc.Digest == was.Digest {
		return desc, "", e.archive(chain, rec, desc)
	}
	if e.written[was.Digest] {
		return was, "", nil
	}
	f, err := s.recompress(e.ctx, rec, was, func(w io.Writer) error { return e.play(chain, rec, w) })
	if err != nil {
		return desc, "", err
	}
	if f == nil {
		return desc, "its compression cannot be made again", e.archive(chain, rec, desc)
	}
	defer f.Close()
	e.written[was.Digest] = true
	return was, "", e.file(blobName(was.Digest), was.Size, func(w io.Writer) error { _, err := io.Copy(w, f); return err })
}

func notAsPulled(is, was digest.Digest) string {
	if is == was {
		return ""
	}
	return "it was imported without its compression"
}

// kept writes a blob that is kept. What is not as its digest says is found before anything is written.
func (e *exporter) kept(rec *layerRecord) error {
	if e.written[rec.Blob.Digest] {
		return nil
	}
	f, why, err := e.s.openKept(e.ctx, rec.Blob, true)
	if why != "" {
		err = fmt.Errorf("%s: %w", why, errdefs.ErrDataLoss)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	e.written[rec.Blob.Digest] = true
	return e.file(blobName(rec.Blob.Digest), rec.Blob.Size, func(w io.Writer) error {
		_, err := io.Copy(w, f)
		return err
	})
}

// soleFile writes the layer of an artifact that is one file.
func (e *exporter) soleFile(chain ChainID, rec *layerRecord, desc ocispec.Descriptor) error {
	if e.written[desc.Digest] {
		return nil
	}
	root, err := e.s.openLayerAs(chain, rec)
	if err != nil {
		return err
	}
	defer root.Close()
	dir, err := os.OpenRoot(root.Name())
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := dir.Open(rec.File)
	if err != nil {
		return err
	}
	defer f.Close()
	e.written[desc.Digest] = true
	return e.file(blobName(desc.Digest), desc.Size, func(w io.Writer) error {
		v := &verifier{r: &contextReader{e.ctx, f}, desc: desc, hash: desc.Digest.Algorithm().Hash()}
		_, err := io.Copy(w, v)
		return err
	})
}

// archive makes a layer's archive again.
func (e *exporter) archive(chain ChainID, rec *layerRecord, desc ocispec.Descriptor) error {
	if e.written[desc.Digest] {
		return nil
	}
	e.written[desc.Digest] = true
	return e.file(blobName(desc.Digest), desc.Size, func(w io.Writer) error {
		hash := desc.Digest.Algorithm().Hash()
		if err := e.play(chain, rec, io.MultiWriter(hash, w)); err != nil {
			return err
		}
		if got := digest.NewDigest(desc.Digest.Algorithm(), hash); got != desc.Digest {
			return fmt.Errorf("layer %s: made again it is %s: %w", chain, got, errContent)
		}
		return nil
	})
}

// play writes a layer's archive. Damage that it finds is put on record.
func (e *exporter) play(chain ChainID, rec *layerRecord, w io.Writer) error {
	root, err := e.s.openLayerAs(chain, rec)
	if err != nil {
		return err
	}
	defer root.Close()
	tape, err := os.Open(e.s.recordFile(chain, rec, tapeExt))
	if err != nil {
		return fmt.Errorf("layer %s: its record: %w: %w", chain, err, errDamaged)
	}
	defer tape.Close()
	err = playTape(e.ctx, root, tape, w, nil)
	if damage, ok := errors.AsType[*damageError](err); ok {
		return errors.Join(fmt.Errorf("layer %s: %w: %w", chain, damage, errDamaged), e.s.markDamaged(chain, rec, damage.Error()))
	}
	return err
}

// file writes a file of size bytes, which write gives.
func (e *exporter) file(name string, size int64, write func(io.Writer) error) error {
	// No times: the same images give the same archive.
	if err := e.w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}); err != nil {
		return err
	}
	if err := write(e.w); err != nil {
		return err
	}
	return e.w.Flush()
}
