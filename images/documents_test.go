package images

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	descJSON   = `{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:` + someHex + `","size":7}`
	layerJSON  = `{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:` + someHex + `","size":7}`
	childJSON  = `{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:` + someHex + `","size":7,"platform":{"os":"linux","architecture":"amd64"}}`
	manifestOK = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":` + descJSON + `,"layers":[` + layerJSON + `],"annotations":{"A":"x","a":"y"}}`
	indexOK    = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[` + childJSON + `]}`
)

func TestParseDocument(t *testing.T) {
	for _, c := range []struct{ data, mediaType string }{
		{manifestOK, ocispec.MediaTypeImageManifest},
		{manifestOK, ""},
		{manifestOK, "application/json"},
		{strings.Replace(manifestOK, `"mediaType":"application/vnd.oci.image.manifest.v1+json",`, "", 1), ocispec.MediaTypeImageManifest},
		{indexOK, ocispec.MediaTypeImageIndex},
		{indexOK, ""},
		{`{"schemaVersion":2,"manifests":[]}`, dockerManifestList},
		{strings.Replace(manifestOK, "application/vnd.oci.image.config.v1+json", "application/vnd.example", 1), ""}, // an artifact
	} {
		doc, err := parseDocument([]byte(c.data), c.mediaType)
		if err != nil {
			t.Errorf("%s as %q: %v", c.data, c.mediaType, err)
			continue
		}
		if (doc.Index == nil) == (doc.Manifest == nil) {
			t.Errorf("%s: index %v, manifest %v", c.data, doc.Index, doc.Manifest)
		}
	}
}

// TestCVE_2021_41190_DocumentOfTwoKinds, and everything else by which one document could be two, or none.
func TestCVE_2021_41190_DocumentOfTwoKinds(t *testing.T) {
	manifest := func(old, with string) string { return strings.Replace(manifestOK, old, with, 1) }
	for name, c := range map[string]struct{ data, mediaType string }{
		"manifests and layers":      {manifest(`"layers"`, `"manifests":[],"layers"`), ""},
		"manifests and config":      {`{"schemaVersion":2,"manifests":[],"config":` + descJSON + `}`, ""},
		"fsLayers":                  {manifest(`"layers"`, `"fsLayers":[],"layers"`), ""},
		"index called manifest":     {indexOK, ocispec.MediaTypeImageManifest},
		"manifest called index":     {manifestOK, ocispec.MediaTypeImageIndex},
		"docker's type, oci's body": {manifestOK, dockerManifest},
		"own type of another kind":  {manifest(`"application/vnd.oci.image.manifest.v1+json"`, `"application/vnd.oci.image.index.v1+json"`), ""},
		"own type of nothing":       {manifest(`"application/vnd.oci.image.manifest.v1+json"`, `"text/html"`), ""},
		"layers twice":              {manifest(`"layers"`, `"layers":[],"layers"`), ""},
		"layers in two cases":       {manifest(`"layers"`, `"Layers":[],"layers"`), ""},
		"layers in another case":    {manifest(`"layers"`, `"LAYERS"`), ""},
		"digest in another case":    {manifest(`"size":7`, `"Digest":"sha256:`+someHex+`","size":7`), ""},
		"only a digest in caps":     {manifest(`"digest"`, `"DIGEST"`), ""},
		"schemaVersion 3":           {manifest(`"schemaVersion":2`, `"schemaVersion":3`), ""},
		"no schemaVersion":          {manifest(`"schemaVersion":2,`, ``), ""},
		"unknown layer type":        {manifest("layer.v1.tar+gzip", "layer.v1.squashfs"), ""},
		"digest is a path":          {manifest("sha256:"+someHex, "../../../etc/passwd"), ""},
		"digest by md5":             {manifest("sha256:"+someHex, "md5:d41d8cd98f00b204e9800998ecf8427e"), ""},
		"size 0":                    {manifest(`"size":7`, `"size":0`), ""},
		"size negative":             {manifest(`"size":7`, `"size":-1`), ""},
		"size is a string":          {manifest(`"size":7`, `"size":"7"`), ""},
		"data after it":             {manifestOK + "{}", ""},
		"cut off":                   {manifestOK[:50], ""},
		"null":                      {"null", ""},
		"array":                     {"[]", ""},
		"empty":                     {"", ""},
		"nested":                    {strings.Repeat(`{"a":`, 10000), ""},
	} {
		if doc, err := parseDocument([]byte(c.data), c.mediaType); !errors.Is(err, errImage) {
			t.Errorf("%s: got %v, %v; want it refused as the image's fault", name, doc, err)
		}
	}
}

func TestSchema1IsRefusedWithAHint(t *testing.T) {
	for _, c := range []struct{ data, mediaType string }{
		{"", dockerSchema1}, {"", dockerSchema1Sig}, {`{"schemaVersion":1,"fsLayers":[]}`, ""}, {`{"schemaVersion":1,"name":"a"}`, "application/json"},
	} {
		_, err := parseDocument([]byte(c.data), c.mediaType)
		if !errors.Is(err, errImage) || !strings.Contains(err.Error(), "schema 1") || !strings.Contains(err.Error(), "push it again") {
			t.Errorf("%q as %q: %v", c.data, c.mediaType, err)
		}
	}
}

// TestCVE_2023_25153_BoundsOfDocuments: sizes that a document claims are refused before anything is allocated for them.
func TestCVE_2023_25153_BoundsOfDocuments(t *testing.T) {
	big := strings.Replace(manifestOK, `"size":7`, `"size":1000000000000`, 1)
	layers := strings.Replace(manifestOK, layerJSON, strings.Repeat(layerJSON+",", maxLayers)+layerJSON, 1)
	index := strings.Replace(indexOK, childJSON, strings.Repeat(childJSON+",", maxReferences)+childJSON, 1)
	for name, data := range map[string]string{"config of a terabyte": big, "128 layers": layers, "10001 manifests": index} {
		if _, err := parseDocument([]byte(data), ""); !errdefs.IsResourceExhausted(err) {
			t.Errorf("%s: got %v, want ErrResourceExhausted", name, err)
		}
	}
}

func TestParseConfig(t *testing.T) {
	one := `{"os":"linux","architecture":"amd64","config":{"Env":["A=b"],"Labels":{"x":"1","X":"2"}},"rootfs":{"type":"layers","diff_ids":["sha256:` + someHex + `"]},"container_config":{"Env":["A=c"]}}`
	cfg, err := parseConfig([]byte(one), 1)
	if err != nil || len(cfg.Config.Env) != 1 || cfg.Config.Env[0] != "A=b" {
		t.Errorf("got %+v, %v", cfg, err)
	}
	for name, c := range map[string]struct {
		data string
		n    int
	}{
		"fewer layers":       {one, 2},
		"more layers":        {one, 0},
		"diff id":            {strings.Replace(one, someHex, "12", 1), 1},
		"config twice":       {strings.Replace(one, `"config":`, `"config":{},"config":`, 1), 1},
		"config, other case": {strings.Replace(one, `"config":`, `"Config":`, 1), 1},
		"env is a string":    {strings.Replace(one, `["A=b"]`, `"A=b"`, 1), 1},
		"not JSON":           {"#!/bin/sh", 1},
	} {
		if _, err := parseConfig([]byte(c.data), c.n); !errors.Is(err, errImage) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestCandidates(t *testing.T) {
	p := func(os, arch, variant string) *ocispec.Platform {
		return &ocispec.Platform{OS: os, Architecture: arch, Variant: variant}
	}
	d := func(size int64, p *ocispec.Platform) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Size: size, Platform: p}
	}
	index := &ocispec.Index{Manifests: []ocispec.Descriptor{
		d(1, p("unknown", "unknown", "")), d(2, p("windows", "arm64", "")), d(3, p("linux", "arm", "v7")), d(4, nil),
		d(5, p("linux", "arm64", "v8")), d(6, p("linux", "amd64", "")),
		{MediaType: "application/vnd.example", Size: 7, Platform: p("linux", "arm64", "")},
		d(8, &ocispec.Platform{OS: "linux", Architecture: "arm64", OSFeatures: []string{"unheard-of"}}),
	}}
	var got []int64
	for _, c := range candidates(index, platforms.Only(platforms.MustParse("linux/arm64"))) {
		got = append(got, c.Size)
	}
	if fmt.Sprint(got) != "[5 3 4]" {
		t.Errorf("got %v, want the best first, attestations never, and what says nothing last", got)
	}
	levels := &ocispec.Index{Manifests: []ocispec.Descriptor{
		d(1, p("linux", "386", "")), d(2, p("linux", "amd64", "")), d(3, p("linux", "amd64", "v3")), d(4, p("linux", "amd64", "v2")), d(5, p("linux", "amd64", "v4")),
	}}
	for want, order := range map[string]string{"linux/amd64": "[2 1]", "linux/amd64/v2": "[4 2 1]", "linux/amd64/v3": "[3 4 2 1]"} {
		got := []int64{}
		for _, c := range candidates(levels, platforms.Only(platforms.MustParse(want))) {
			got = append(got, c.Size)
		}
		if fmt.Sprint(got) != order {
			t.Errorf("%s: got %v, want %s", want, got, order)
		}
	}
}

// TestNodePlatform: a node takes an image for the level of its processor, and never one for a higher level.
func TestNodePlatform(t *testing.T) {
	p := nodePlatform()
	if p.OS != "linux" || p.Architecture != runtime.GOARCH {
		t.Errorf("got %+v", p)
	}
	want := platforms.Only(p)
	if !want.Match(ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}) {
		t.Errorf("%+v does not fit an image that says no variant", p)
	}
	if want.Match(ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH, Variant: "v99"}) {
		t.Errorf("%+v fits any variant", p)
	}
}
