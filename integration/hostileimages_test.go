//go:build integration

package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// hostileImage is an image that a registry holds, and what has to come of it.
type hostileImage struct {
	name  string
	image *imagestest.Image
	// document, if not nil, changes the manifest's bytes; damage changes the registry's copy of a blob of a layer or config.
	document func([]byte) []byte
	damage   func(data []byte) []byte
	config   bool // damage is done to the configuration

	code codes.Code
	text []string // which the error has beside the name of the image
	// check looks at the directory of the only layer.
	check func(root string) error
}

// layerFault is what errors of the only layer of an image have to name.
const layerFault = "layer 1 of 1: layer sha256:"

// hostileLayers makes an image of each layer that unpackers have been known to go wrong with.
func hostileLayers(outside string) []hostileImage {
	var list []hostileImage
	for _, l := range imagestest.Corpus(outside) {
		if len(l.Tar) == 0 {
			continue // no registry has a blob without bytes
		}
		h := hostileImage{name: l.Name, image: imagestest.NewImage(imagestest.GzipLayer(l.Tar)), check: l.Check}
		if l.Refused {
			h.code, h.text = codes.FailedPrecondition, []string{layerFault, "not a valid image"}
			if l.Entry != "" {
				h.text = append(h.text, `entry "`+l.Entry)
			}
		}
		list = append(list, h)
	}
	return list
}

// hostileDocuments are images whose manifests, configurations or blobs lie.
func hostileDocuments() []hostileImage {
	file := func() imagestest.LayerBlob { return imagestest.Layer(imagestest.File("f", "x")) }
	descriptor := func(change func(*ocispec.Descriptor)) *imagestest.Image {
		l := file()
		l.Descriptor = change
		return imagestest.NewImage(l)
	}
	config := func(change func(*ocispec.Image)) *imagestest.Image {
		img := imagestest.NewImage(file())
		change(&img.Config)
		return img
	}
	manifest := func(change func(*ocispec.Manifest)) *imagestest.Image {
		img := imagestest.NewImage(file())
		img.Manifest = change
		return img
	}
	blob := func(data []byte) *imagestest.Image {
		l := file()
		l.Blob = data
		return imagestest.NewImage(l)
	}
	tarOf := imagestest.Tar(imagestest.File("f", strings.Repeat("content ", 1000)))
	wrongDiffID := file()
	wrongDiffID.DiffID = digest.FromString("something else")
	var many []imagestest.LayerBlob
	for range 128 {
		many = append(many, file())
	}
	// A header that claims 200 GiB; nothing of it is there.
	claim := imagestest.Tar(imagestest.File("f", "").With(func(h *tar.Header) { h.Name = "claim" }))
	huge := append(sized("claim", 200<<30), claim...)
	const invalid, exhausted, lost = codes.FailedPrecondition, codes.ResourceExhausted, codes.DataLoss
	return []hostileImage{
		{name: "no layers", image: imagestest.NewImage()},
		{name: "one layer twice", image: imagestest.NewImage(file(), file())},
		{name: "data in the descriptor is not looked at", image: descriptor(func(d *ocispec.Descriptor) { d.Data = []byte("lie") })},
		{name: "unknown keys", image: imagestest.NewImage(file()), document: replace(`"layers":`, `"unknown":{"layers":[]},"layers":`)},

		{name: "diff id of something else", image: imagestest.NewImage(wrongDiffID), code: invalid, text: []string{layerFault, "diff id"}},
		{name: "more diff ids than layers", image: manifest(func(m *ocispec.Manifest) { m.Layers = nil }), code: invalid, text: []string{"configuration names 1 layers, the manifest 0"}},
		{name: "128 layers", image: imagestest.NewImage(many...), code: exhausted, text: []string{"128 layers"}},
		{name: "size too small", image: descriptor(func(d *ocispec.Descriptor) { d.Size-- }), code: lost, text: []string{layerFault}},
		{name: "size too large", image: descriptor(func(d *ocispec.Descriptor) { d.Size++ }), code: lost, text: []string{layerFault}},
		{name: "size of a terabyte", image: descriptor(func(d *ocispec.Descriptor) { d.Size = 1 << 40 }), code: exhausted, text: []string{"layer 1"}},
		{name: "configuration of a terabyte", image: manifest(func(m *ocispec.Manifest) { m.Config.Size = 1 << 40 }), code: exhausted, text: []string{"configuration"}},
		{name: "configuration of 5 MB", image: config(func(c *ocispec.Image) { c.Author = strings.Repeat("a", 5<<20) }), code: exhausted, text: []string{"configuration"}},
		{name: "squashfs", image: descriptor(func(d *ocispec.Descriptor) { d.MediaType = "application/vnd.oci.image.layer.v1.squashfs" }), code: invalid, text: []string{"layer 1 has media type", "squashfs"}},
		{name: "encrypted", image: descriptor(func(d *ocispec.Descriptor) { d.MediaType += "+encrypted" }), code: invalid, text: []string{"layer 1 has media type", "encrypted"}},
		{name: "layers twice", image: imagestest.NewImage(file()), document: replace(`"layers":`, `"layers":[],"layers":`), code: invalid, text: []string{"layers", "occurs twice"}},
		{name: "layers in capitals", image: imagestest.NewImage(file()), document: replace(`"layers":`, `"Layers":[],"layers":`), code: invalid, text: []string{"Layers"}},
		{name: "another platform", image: config(func(c *ocispec.Image) { c.Architecture = "mips64le" }), code: codes.NotFound, text: []string{"mips64le"}},
		{name: "a platform with control characters", image: config(func(c *ocispec.Image) { c.Architecture = "\x1b[2J\nlevel=ERROR" }), code: codes.NotFound},
		{name: "no JSON as configuration", image: imagestest.NewImage(file()), config: true, document: nil, damage: func(b []byte) []byte { return bytes.Repeat([]byte("#"), len(b)) }, code: lost, text: []string{"configuration sha256:"}},

		{name: "damaged layer", image: imagestest.NewImage(imagestest.PlainLayer(append(bytes.Clone(tarOf), make([]byte, 8192)...))), damage: flip, code: lost, text: []string{layerFault}},
		{name: "short layer", image: imagestest.NewImage(imagestest.GzipLayer(tarOf)), damage: func(b []byte) []byte { return b[:len(b)/2] }, code: lost, text: []string{layerFault}},
		{name: "layer with more behind", image: imagestest.NewImage(file()), damage: func(b []byte) []byte { return append(b, "more"...) }, code: lost, text: []string{layerFault}},
		{name: "damaged configuration", image: imagestest.NewImage(file()), config: true, damage: flip, code: lost, text: []string{"configuration sha256:"}},

		{name: "gzip, cut off", image: blob(imagestest.Gzip(tarOf)[:60]), code: invalid, text: []string{layerFault}},
		{name: "gzip, garbage after it", image: blob(append(imagestest.Gzip(tarOf), "garbage"...)), code: invalid, text: []string{layerFault}},
		{name: "zstd, cut off", image: blob(imagestest.Zstd(tarOf)[:60]), code: invalid, text: []string{layerFault}},
		{name: "zstd, window of 2 GiB", image: blob([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 1, 0, 0}), code: invalid, text: []string{layerFault, "window"}},
		{name: "zstd, unknown dictionary", image: blob([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x21, 0x07, 0, 1, 0, 0}), code: invalid, text: []string{layerFault}},
		{name: "bzip2", image: blob(append([]byte("BZh91AY&SY"), make([]byte, 600)...)), code: invalid, text: []string{layerFault}},
		{name: "a file of 200 GiB", image: blob(imagestest.Gzip(huge)), code: exhausted, text: []string{layerFault, `entry "claim"`}},
		{name: "zeros after the archive", image: imagestest.NewImage(imagestest.GzipLayer(append(bytes.Clone(tarOf), make([]byte, 64<<20)...)))},
	}
}

func replace(old, with string) func([]byte) []byte {
	return func(b []byte) []byte { return bytes.Replace(b, []byte(old), []byte(with), 1) }
}

func flip(b []byte) []byte { b[len(b)-1] ^= 1; return b }

// sized is the header of a file, in GNU's form for sizes beyond 8 GiB.
func sized(name string, size int64) []byte {
	var buf bytes.Buffer
	if err := tar.NewWriter(&buf).WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o644, Format: tar.FormatGNU}); err != nil {
		panic(err)
	}
	return buf.Bytes()
}

// TestHostileImages pulls images that want to get out, or to break something, from a real registry. Each ends as it has to,
// with an error that names host, image and layer, or with the right tree; nothing outside has changed, nothing is left,
// and the next pull of a good image works.
func TestHostileImages(t *testing.T) {
	n := idleNode(t, lab.Options{})
	if n.Foreign() {
		t.Skip("it looks at the directories of berth")
	}
	ctx := t.Context()
	must(t, n.StartEmptyRegistry(ctx))
	must(t, n.StartBerth(ctx))
	b, err := n.Builder()
	must(t, err)
	h := &hostileNode{Node: n, Builder: b, sentinel: imagestest.NewSentinel(t, filepath.Join(n.Root(), "images", "tmp", "outside"))}
	h.push(t, "good", imagestest.NewImage(imagestest.Layer(imagestest.File("good", "good"))), nil)
	h.good(t)

	list := append(hostileLayers(h.sentinel.Dir), hostileDocuments()...)
	if len(list) < 90 {
		t.Errorf("only %d images", len(list))
	}
	for i, image := range list {
		t.Run(image.name, func(t *testing.T) { h.attack(t, fmt.Sprintf("hostile/image-%d", i), image) })
	}
	t.Run("indexes", h.indexes)
	peak := peakKiB(t, n.Berth.PID())
	t.Logf("the daemon's memory was %d MiB at most", peak>>10)
	if peak > 96<<10 {
		t.Errorf("the daemon had %d MiB at a time", peak>>10)
	}
}

type hostileNode struct {
	*lab.Node
	*testimages.Builder
	sentinel *imagestest.Sentinel
}

func (h *hostileNode) ref(repo string) string { return h.Node.Registry + "/" + repo + ":1" }

// push builds an image and pushes it.
func (h *hostileNode) push(t *testing.T, repo string, img *imagestest.Image, document func([]byte) []byte) *imagestest.Built {
	t.Helper()
	built := img.Build()
	if document != nil {
		built.Manifest = document(built.Manifest)
		built.Descriptor.Digest, built.Descriptor.Size = digest.FromBytes(built.Manifest), int64(len(built.Manifest))
	}
	must(t, h.PushRaw(t.Context(), repo, "1", built.Descriptor.MediaType, built.Manifest, built.Blobs))
	return built
}

func (h *hostileNode) attack(t *testing.T, repo string, image hostileImage) {
	built := h.push(t, repo, image.image, image.document)
	if image.damage != nil {
		d := built.ConfigID
		if !image.config {
			d = digest.FromBytes(image.image.Layers[0].Blob)
		}
		path := filepath.Join(h.Dir, "registry/docker/registry/v2/blobs/sha256", d.Encoded()[:2], d.Encoded(), "data")
		data, err := os.ReadFile(path)
		must(t, err)
		whole := bytes.Clone(data)
		must(t, os.WriteFile(path, image.damage(data), 0o644))
		defer func() { must(t, os.WriteFile(path, whole, 0o644)) }()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	_, err := h.CRI.Pull(ctx, h.ref(repo))
	h.sentinel.Check(t)
	if image.code == codes.OK {
		must(t, err)
		if image.check != nil {
			id := image.image.Layers[0].DiffID // the chain id of a single layer
			if err := image.check(filepath.Join(h.Root(), "images", "layers", "sha256-"+id.Encoded())); err != nil {
				t.Error(err)
			}
		}
		h.remove(t, h.ref(repo))
	} else {
		h.refused(t, err, image.code, append(image.text, h.ref(repo))...)
	}
	h.nothingLeft(t)
	h.good(t)
}

// refused checks an error.
func (h *hostileNode) refused(t *testing.T, err error, code codes.Code, text ...string) {
	t.Helper()
	if err == nil {
		t.Error("pulled, want it refused")
		return
	}
	s, ok := status.FromError(errors.Unwrap(err))
	if !ok || s.Code() != code {
		t.Errorf("got %v, want the code %s", err, code)
		return
	}
	for _, part := range text {
		if !strings.Contains(s.Message(), part) {
			t.Errorf("%q is not in: %s", part, s.Message())
		}
	}
	if strings.ContainsFunc(s.Message(), unicode.IsControl) || len(s.Message()) > 2000 {
		t.Errorf("the error has control characters, or %d bytes: %q", len(s.Message()), s.Message())
	}
}

func (h *hostileNode) remove(t *testing.T, ref string) {
	t.Helper()
	_, err := h.CRI.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	must(t, err)
}

// nothingLeft checks that no image, no layer and no file of a pull is there.
func (h *hostileNode) nothingLeft(t *testing.T) {
	t.Helper()
	list, err := h.CRI.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	must(t, err)
	if len(list.Images) != 0 {
		t.Errorf("images are left: %v", list.Images)
	}
	for _, dir := range []string{"tmp", "layers", "records", "blobs"} {
		entries, err := os.ReadDir(filepath.Join(h.Root(), "images", dir))
		must(t, err)
		for _, e := range entries {
			if e.Name() != filepath.Base(h.sentinel.Dir) {
				t.Errorf("left in %s: %s", dir, e.Name())
			}
		}
	}
	if out, err := h.Tool(t.Context(), "images", "verify").CombinedOutput(); err != nil {
		t.Errorf("verify: %s: %v", out, err)
	}
}

// good pulls a good image and looks at what is in it.
func (h *hostileNode) good(t *testing.T) {
	t.Helper()
	if _, err := h.CRI.Pull(t.Context(), h.ref("good")); err != nil {
		t.Errorf("a good image: %v", err)
		return
	}
	layer := digest.FromBytes(imagestest.Tar(imagestest.File("good", "good")))
	data, err := os.ReadFile(filepath.Join(h.Root(), "images", "layers", "sha256-"+layer.Encoded(), "good"))
	if err != nil || string(data) != "good" {
		t.Errorf("a good image: %q, %v", data, err)
	}
	h.remove(t, h.ref("good"))
}

// indexes are those that do not have this platform, are nested, or name what is not theirs.
func (h *hostileNode) indexes(t *testing.T) {
	const repo = "hostile/indexes"
	mine := h.push(t, repo, imagestest.NewImage(imagestest.Layer(imagestest.File("f", "mine"))), nil)
	theirs := imagestest.NewImage(imagestest.Layer(imagestest.File("f", "theirs")))
	theirs.Config.Architecture = "mips64le"
	other := h.push(t, repo, theirs, nil)
	push := func(repo string, descs ...ocispec.Descriptor) ocispec.Descriptor {
		data, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: descs})
		must(t, err)
		must(t, h.PushRaw(t.Context(), repo, "1", ocispec.MediaTypeImageIndex, data, nil))
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(data), Size: int64(len(data))}
	}
	pull := func(code codes.Code, text ...string) {
		t.Helper()
		id, err := h.CRI.Pull(t.Context(), h.ref(repo))
		switch {
		case code != codes.OK:
			h.refused(t, err, code, append(text, h.ref(repo))...)
		case err != nil || id != mine.ConfigID.String():
			t.Errorf("got %s, %v; want %s", id, err, mine.ConfigID)
		default:
			h.remove(t, id)
		}
		h.nothingLeft(t)
	}
	attestation := mine.Descriptor
	attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	push(repo, attestation, other.Descriptor)
	pull(codes.NotFound, "mips64le")
	nested := push(repo, attestation, other.Descriptor, mine.Descriptor)
	pull(codes.OK)
	for range 3 {
		nested = push(repo, nested)
		pull(codes.OK)
	}
	for range 3 {
		nested = push(repo, nested)
	}
	pull(codes.ResourceExhausted, "nested")
	size := mine.Descriptor
	size.Size++
	push(repo, size)
	pull(codes.DataLoss, "manifest "+mine.Descriptor.Digest.String())
	kind := mine.Descriptor
	kind.MediaType = ocispec.MediaTypeImageIndex
	push(repo, kind)
	pull(codes.NotFound, "not found") // the registry has no index of that digest
	h.good(t)
}
