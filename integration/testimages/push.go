package testimages

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an image to push.
type Image struct {
	Repo   string
	Tags   []string
	Layers [][]byte // tar archives, bottom first
	Config ocispec.ImageConfig
}

// Push uploads the image under all its tags and returns the digest of its manifest.
func (b *Builder) Push(ctx context.Context, im Image) (digest.Digest, error) {
	return b.pushAs(ctx, im, gzipped)
}

func (b *Builder) pushAs(ctx context.Context, im Image, form compression) (digest.Digest, error) {
	d, err := b.push(ctx, im, form)
	if err != nil {
		return "", fmt.Errorf("push %s: %w", im.Repo, err)
	}
	b.logf("pushed %s:%s %s", im.Repo, strings.Join(im.Tags, ","), d)
	return d, nil
}

func (b *Builder) push(ctx context.Context, im Image, form compression) (digest.Digest, error) {
	created := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	config := ocispec.Image{
		Created:  &created,
		Platform: ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config:   im.Config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, layer := range im.Layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(layer))
		config.History = append(config.History, ocispec.History{Created: &created, CreatedBy: "berth integration tests"})
		packed, err := b.compress(layer, form)
		if err != nil {
			return "", err
		}
		desc, err := b.blob(ctx, im.Repo, form.mediaType, packed)
		if err != nil {
			return "", err
		}
		manifest.Layers = append(manifest.Layers, desc)
	}
	data, err := json.Marshal(config)
	if err != nil {
		return "", err
	}
	if manifest.Config, err = b.blob(ctx, im.Repo, ocispec.MediaTypeImageConfig, data); err != nil {
		return "", err
	}
	if data, err = json.Marshal(manifest); err != nil {
		return "", err
	}
	for _, tag := range im.Tags {
		where := fmt.Sprintf("http://%s/v2/%s/manifests/%s", b.Registry, im.Repo, tag)
		if _, err := b.do(ctx, http.MethodPut, where, ocispec.MediaTypeImageManifest, data, http.StatusCreated); err != nil {
			return "", fmt.Errorf("tag %s: %w", tag, err)
		}
	}
	return digest.FromBytes(data), nil
}

// PushRaw uploads blobs, and a document as it is, under a tag.
func (b *Builder) PushRaw(ctx context.Context, repo, tag, mediaType string, document []byte, blobs map[digest.Digest][]byte) error {
	for _, content := range blobs {
		if _, err := b.blob(ctx, repo, "", content); err != nil {
			return fmt.Errorf("push %s:%s: %w", repo, tag, err)
		}
	}
	where := fmt.Sprintf("http://%s/v2/%s/manifests/%s", b.Registry, repo, tag)
	if _, err := b.do(ctx, http.MethodPut, where, mediaType, document, http.StatusCreated); err != nil {
		return fmt.Errorf("push %s:%s: %w", repo, tag, err)
	}
	return nil
}

// compress remembers what it made: most images share their base layer.
func (b *Builder) compress(layer []byte, form compression) ([]byte, error) {
	key := packedLayer{digest.FromBytes(layer), form.mediaType}
	if packed, ok := b.packed[key]; ok {
		return packed, nil
	}
	var buf bytes.Buffer
	w, err := form.writer(&buf)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(layer); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	if b.packed == nil {
		b.packed = map[packedLayer][]byte{}
	}
	b.packed[key] = buf.Bytes()
	return buf.Bytes(), nil
}

// packedLayer is a layer in one of its compressed forms.
type packedLayer struct {
	archive   digest.Digest
	mediaType string
}

// compression is a form of layers.
type compression struct {
	mediaType string
	writer    func(io.Writer) (io.WriteCloser, error)
}

var (
	gzipped = compression{ocispec.MediaTypeImageLayerGzip, func(w io.Writer) (io.WriteCloser, error) {
		return gzip.NewWriterLevel(w, gzip.BestSpeed)
	}}
	zstandard = compression{ocispec.MediaTypeImageLayerZstd, func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }}
)

// blob uploads content unless the repository has it already.
func (b *Builder) blob(ctx context.Context, repo, mediaType string, content []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
	base := fmt.Sprintf("http://%s/v2/%s/blobs/", b.Registry, repo)
	if _, err := b.do(ctx, http.MethodHead, base+desc.Digest.String(), "", nil, http.StatusOK); err == nil {
		return desc, nil
	}
	header, err := b.do(ctx, http.MethodPost, base+"uploads/", "", nil, http.StatusAccepted)
	if err != nil {
		return desc, fmt.Errorf("blob %s: begin upload: %w", desc.Digest, err)
	}
	start, err := url.Parse(base)
	if err != nil {
		return desc, err
	}
	where, err := start.Parse(header.Get("Location"))
	if err != nil {
		return desc, fmt.Errorf("blob %s: location of upload: %w", desc.Digest, err)
	}
	query := where.Query()
	query.Set("digest", desc.Digest.String())
	where.RawQuery = query.Encode()
	if _, err := b.do(ctx, http.MethodPut, where.String(), "application/octet-stream", content, http.StatusCreated); err != nil {
		return desc, fmt.Errorf("blob %s: upload: %w", desc.Digest, err)
	}
	return desc, nil
}

// do makes a request and returns the answer's header; an answer other than want is an error that quotes it.
func (b *Builder) do(ctx context.Context, method, where, contentType string, body []byte, want int) (http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, where, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != want {
		return nil, fmt.Errorf("%s %s: %s: %s", method, where, resp.Status, bytes.TrimSpace(text))
	}
	return resp.Header, nil
}
