package testimages

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// The images for measurements of pulls, whose layers are parts of this machine's file system.
const (
	// Layers has eight layers, several hundred megabytes in all.
	Layers = "registry.k8s.io/lab/layers:latest"
	// LayersNext has another last layer.
	LayersNext = "registry.k8s.io/lab/layers:next"
	// LayersZstd has the same layers compressed otherwise.
	LayersZstd = "registry.k8s.io/lab/layers:zstd"
	// OneLayer has all of them in one.
	OneLayer = "registry.k8s.io/lab/one:latest"
	// ManyLayers has sixty small ones.
	ManyLayers = "registry.k8s.io/lab/many:latest"
)

// PushLayers pushes them.
func (b *Builder) PushLayers(ctx context.Context) error {
	sdk, err := goroot(ctx)
	if err != nil {
		return err
	}
	layers, err := systemLayers(sdk)
	if err != nil {
		return err
	}
	last := len(layers) - 1
	changed, err := tree(filepath.Join(sdk, "src/runtime"))
	if err != nil {
		return err
	}
	next := append(slices.Clone(layers[:last]), changed)
	many, err := sourceLayers(sdk, 60)
	if err != nil {
		return err
	}
	for _, im := range []struct {
		ref    string
		layers [][]byte
		form   compression
	}{
		{Layers, layers, gzipped},
		{LayersNext, next, gzipped},
		{LayersZstd, layers, zstandard},
		{OneLayer, [][]byte{joined(layers)}, gzipped},
		{ManyLayers, many, gzipped},
	} {
		repo, tag, _ := strings.Cut(strings.TrimPrefix(im.ref, "registry.k8s.io/"), ":")
		if _, err := b.pushAs(ctx, Image{Repo: repo, Tags: []string{tag}, Layers: im.layers, Config: config("", "/bin/true")}, im.form); err != nil {
			return err
		}
	}
	return nil
}

// archiveEnd is what archive/tar ends an archive with.
var archiveEnd [1024]byte

// joined is one archive of what several have.
func joined(archives [][]byte) []byte {
	var all []byte
	for _, a := range archives {
		all = append(all, a[:len(a)-len(archiveEnd)]...)
	}
	return append(all, archiveEnd[:]...)
}

func systemLayers(sdk string) ([][]byte, error) {
	var layers [][]byte
	for _, dir := range []string{
		"/usr/lib/git-core", "/usr/share/perl", "/usr/lib/python3", "/usr/lib/gcc", "/usr/share/doc", "/usr/bin",
		filepath.Join(sdk, "src/cmd"), filepath.Join(sdk, "pkg/tool"),
	} {
		if _, err := os.Stat(dir); err != nil {
			continue // not on this machine
		}
		layer, err := tree(dir)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer)
	}
	return layers, nil
}

// sourceLayers are those of n directories of Go's library.
func sourceLayers(sdk string, n int) ([][]byte, error) {
	dirs, err := filepath.Glob(filepath.Join(sdk, "src/*/*/"))
	if err != nil {
		return nil, err
	}
	var layers [][]byte
	for _, dir := range dirs {
		if st, err := os.Stat(dir); err != nil || !st.IsDir() || strings.Contains(dir, "/src/cmd/") {
			continue
		}
		if len(layers) == n {
			break
		}
		layer, err := tree(dir)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer)
	}
	return layers, nil
}

func goroot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOROOT: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}
