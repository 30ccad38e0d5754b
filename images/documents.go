package images

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds of what a registry may make us read and keep (research: CVE-2023-25153, CVE-2017-14992).
const (
	maxDocument   = 4 << 20
	maxReferences = 10_000
	maxIndexDepth = 4
	maxLayers     = 127
)

// Media types of Docker's own formats, which image-spec does not name.
const (
	dockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	dockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig       = "application/vnd.docker.container.image.v1+json"
	dockerSchema1      = "application/vnd.docker.distribution.manifest.v1+json"
	dockerSchema1Sig   = "application/vnd.docker.distribution.manifest.v1+prettyjws"
	dockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeign      = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	ociLayer           = "application/vnd.oci.image.layer.v1.tar"
	ociForeign         = "application/vnd.oci.image.layer.nondistributable.v1.tar"
)

// errImage is in the chain of errors that say that an image itself is at fault: no registry or retry helps.
var errImage = fmt.Errorf("not a valid image: %w", errdefs.ErrFailedPrecondition)

func badImage(format string, args ...any) error {
	return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), errImage)
}

// document is a parsed index or manifest: exactly one of both.
type document struct {
	Index    *ocispec.Index
	Manifest *ocispec.Manifest
}

// documentKeys are the keys of indexes, manifests and their descriptors. Go reads JSON keys in any case and takes the
// last of duplicates; other tools do not, and could see another image in the same bytes.
var documentKeys = []string{
	"schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests", "subject", "annotations",
	"digest", "size", "urls", "data", "platform", "architecture", "os", "os.version", "os.features", "variant",
}

// configKeys are those of a configuration, and of its rootfs, that say which image it is.
var configKeys = []string{"architecture", "os", "variant", "rootfs", "config", "diff_ids", "type"}

// parseDocument parses an index or a manifest that a descriptor of the given media type led to.
func parseDocument(data []byte, mediaType string) (*document, error) {
	if mediaType == dockerSchema1 || mediaType == dockerSchema1Sig {
		return nil, badImage("the registry has it only in Docker's image format of 2014 (schema 1), which berth does not read; push it again with a current docker, podman or skopeo")
	}
	if err := checkKeys(data, documentKeys, maxDepth); err != nil {
		return nil, badImage("manifest: %w", err)
	}
	var probe struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Layers        json.RawMessage `json:"layers"`
		Config        json.RawMessage `json:"config"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(data, &probe); err != nil {
		return nil, badImage("manifest: %w", err)
	}
	if probe.SchemaVersion == 1 || probe.FSLayers != nil && probe.Manifests == nil && probe.Layers == nil {
		return parseDocument(nil, dockerSchema1)
	}
	if probe.SchemaVersion != 2 {
		return nil, badImage("manifest: schemaVersion is %d, not 2", probe.SchemaVersion)
	}
	// CVE-2021-41190: a document that is both lets two readers see two images.
	isIndex := probe.Manifests != nil
	if isIndex && (probe.Layers != nil || probe.Config != nil) || probe.FSLayers != nil {
		return nil, badImage("document is an index and a manifest at once")
	}
	for _, t := range []string{mediaType, probe.MediaType} {
		if isManifestType(t) && isIndex || isIndexType(t) && !isIndex {
			return nil, badImage("document has the media type %s, which does not fit its content", quote(t))
		}
	}
	if probe.MediaType != "" && (isManifestType(mediaType) || isIndexType(mediaType)) && probe.MediaType != mediaType {
		return nil, badImage("document says it has media type %s, its descriptor says %s", quote(probe.MediaType), quote(mediaType))
	}
	if probe.MediaType != "" && !isManifestType(probe.MediaType) && !isIndexType(probe.MediaType) {
		return nil, badImage("media type %s is neither an index nor a manifest", quote(probe.MediaType))
	}
	doc := &document{}
	if isIndex {
		doc.Index = new(ocispec.Index)
		if err := json.Unmarshal(data, doc.Index); err != nil {
			return nil, badImage("index: %w", err)
		}
		return doc, checkIndex(doc.Index)
	}
	doc.Manifest = new(ocispec.Manifest)
	if err := json.Unmarshal(data, doc.Manifest); err != nil {
		return nil, badImage("manifest: %w", err)
	}
	return doc, checkManifest(doc.Manifest)
}

func isManifestType(t string) bool { return t == ocispec.MediaTypeImageManifest || t == dockerManifest }

func isIndexType(t string) bool { return t == ocispec.MediaTypeImageIndex || t == dockerManifestList }

func checkIndex(index *ocispec.Index) error {
	if len(index.Manifests) > maxReferences {
		return fmt.Errorf("index names %d manifests, more than %d: %w", len(index.Manifests), maxReferences, errdefs.ErrResourceExhausted)
	}
	for i, desc := range index.Manifests {
		if err := checkDescriptor(desc, maxDocument); err != nil {
			return fmt.Errorf("index: manifest %d: %w", i, err)
		}
	}
	return nil
}

func checkManifest(m *ocispec.Manifest) error {
	if err := checkDescriptor(m.Config, maxDocument); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("%d layers, more than %d: %w", len(m.Layers), maxLayers, errdefs.ErrResourceExhausted)
	}
	for i, desc := range m.Layers {
		if !isLayerType(desc.MediaType) && artifactType(m) == "" {
			return badImage("layer %d has media type %s, which berth cannot unpack", i+1, quote(desc.MediaType))
		}
		if err := checkDescriptor(desc, math.MaxInt64); err != nil { // how large it may be is for the store to say
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	return nil
}

// checkDescriptor refuses a descriptor before its digest gets into a URL or a path, or its size into an allocation.
func checkDescriptor(desc ocispec.Descriptor, limit int64) error {
	if err := desc.Digest.Validate(); err != nil {
		return badImage("digest %s: %w", quote(string(desc.Digest)), err)
	}
	if desc.Size <= 0 {
		return badImage("%s has size %d", desc.Digest, desc.Size)
	}
	if desc.Size > limit {
		return fmt.Errorf("%s has %d bytes, more than %d: %w", desc.Digest, desc.Size, limit, errdefs.ErrResourceExhausted)
	}
	return nil
}

func isLayerType(t string) bool {
	for _, base := range []string{ociLayer, ociForeign, dockerLayer, dockerForeign} {
		if rest, ok := strings.CutPrefix(t, base); ok {
			return slices.Contains([]string{"", "+gzip", ".gzip", "+zstd", ".zstd"}, rest)
		}
	}
	return false
}

// parseConfig parses the configuration of an image with n layers.
func parseConfig(data []byte, n int) (*ocispec.Image, error) {
	if err := checkKeys(data, configKeys, 2); err != nil {
		return nil, badImage("configuration: %w", err)
	}
	cfg := new(ocispec.Image)
	if err := json.Unmarshal(data, cfg); err != nil {
		return nil, badImage("configuration: %w", err)
	}
	if len(cfg.RootFS.DiffIDs) != n {
		return nil, badImage("configuration names %d layers, the manifest %d", len(cfg.RootFS.DiffIDs), n)
	}
	for i, id := range cfg.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return nil, badImage("configuration: layer %d: diff id %s: %w", i+1, quote(string(id)), err)
		}
	}
	return cfg, nil
}

// checkKeys refuses JSON in which an object has a key twice, also when only the case differs, or has one of the known
// keys in another case, down to a depth. In maps with free keys (labels and the like) case is content.
func checkKeys(data []byte, known []string, deep int) error {
	exact := map[string]string{}
	for _, k := range known {
		exact[strings.ToLower(k)] = k
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	k := &keyChecker{dec: dec, exact: exact, deep: deep}
	if err := k.value(false, 0); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the JSON document")
	}
	return nil
}

// maxDepth bounds the nesting of documents.
const maxDepth = 64

type keyChecker struct {
	dec   *json.Decoder
	exact map[string]string // known keys by their lower-case form
	deep  int
}

func (k *keyChecker) value(free bool, depth int) error {
	dec := k.dec
	if depth > maxDepth {
		return errors.New("nested too deeply")
	}
	token, err := dec.Token()
	if err != nil {
		return err
	}
	switch token {
	case json.Delim('['):
		for dec.More() {
			if err := k.value(free, depth+1); err != nil {
				return err
			}
		}
		_, err = dec.Token()
		return err
	case json.Delim('{'):
		seen := map[string]bool{}
		for dec.More() {
			token, err := dec.Token()
			if err != nil {
				return err
			}
			key, ok := token.(string)
			if !ok {
				return errors.New("object key is not a string")
			}
			fold := key
			if !free {
				fold = strings.ToLower(key)
				if want, ok := k.exact[fold]; ok && want != key && depth < k.deep {
					return fmt.Errorf("key %s must be written %q", quote(key), want)
				}
			}
			if seen[fold] {
				return fmt.Errorf("key %s occurs twice", quote(key))
			}
			seen[fold] = true
			freeBelow := free || slices.Contains([]string{"annotations", "labels", "volumes", "exposedports"}, strings.ToLower(key))
			if err := k.value(freeBelow, depth+1); err != nil {
				return err
			}
		}
		_, err = dec.Token()
		return err
	}
	return nil
}

// candidates returns the entries of an index that fit the platform, best first. Entries that do not say theirs come
// last: the configuration tells. Attestations ("unknown/unknown") never fit.
func candidates(index *ocispec.Index, want platforms.MatchComparer) []ocispec.Descriptor {
	var fit, silent []ocispec.Descriptor
	for _, desc := range index.Manifests {
		switch {
		case !isManifestType(desc.MediaType) && !isIndexType(desc.MediaType):
		case desc.Platform == nil:
			silent = append(silent, desc)
		case want.Match(*desc.Platform):
			fit = append(fit, desc)
		}
	}
	slices.SortStableFunc(fit, func(a, b ocispec.Descriptor) int {
		switch {
		case want.Less(*a.Platform, *b.Platform):
			return -1
		case want.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return append(fit, silent...)
}

// platformsOf names the platforms that an index has, for the error that says that ours is not among them.
func platformsOf(index *ocispec.Index) []string {
	var names []string
	for _, desc := range index.Manifests {
		if p := desc.Platform; p != nil && p.OS != "unknown" {
			if name := unquoted(platforms.Format(*p)); !slices.Contains(names, name) && len(names) < 32 {
				names = append(names, name)
			}
		}
	}
	return names
}
