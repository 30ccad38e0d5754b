package spec

import (
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestPureAndWithoutLibcontainer: the daemon computes specifications, and neither libcontainer nor I/O comes with them.
func TestPureAndWithoutLibcontainer(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range f.Imports {
			path := strings.Trim(i.Path.Value, `"`)
			if slices.Contains([]string{"os", "io", "net", "os/exec", "net/http"}, path) ||
				strings.HasPrefix(path, "github.com/opencontainers/runc") || strings.HasPrefix(path, "github.com/opencontainers/cgroups") ||
				strings.HasPrefix(path, "github.com/berth-run/berth") {
				t.Errorf("%s imports %s", name, path)
			}
		}
	}
}
