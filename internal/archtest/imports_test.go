package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/berth-run/berth"

// pkg is what `go list` tells of a package.
type pkg struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	Imports    []string
	ImportMap  map[string]string
}

// graph is the import graph of all packages of the module and of all that they reach.
type graph map[string]pkg

// load lists the packages as `make build` builds them.
func load(t *testing.T) graph {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-e", "-tags", "seccomp,osusergo,netgo,runc_nocriu",
		"-json=ImportPath,Dir,GoFiles,Imports,ImportMap", module+"/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, errs.String())
	}
	g := graph{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		g[p.ImportPath] = p
		if !strings.HasPrefix(p.ImportPath, module) {
			continue
		}
		// go test remembers a result until a file changes that the test itself has read.
		for _, name := range p.GoFiles {
			if _, err := os.ReadFile(filepath.Join(p.Dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(g) < 100 {
		t.Fatalf("go list names only %d packages", len(g))
	}
	return g
}

// find is the shortest chain of imports from a package to one that the predicate picks; nil if none is reached.
func (g graph) find(from string, bad func(string) bool) []string {
	type node struct {
		name string
		via  *node
	}
	seen := map[string]bool{from: true}
	for queue := []*node{{name: from}}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		if at.name != from && bad(at.name) {
			var chain []string
			for n := at; n != nil; n = n.via {
				chain = append([]string{n.name}, chain...)
			}
			return chain
		}
		for _, next := range g[at.name].Imports {
			if real, ok := g[at.name].ImportMap[next]; ok {
				next = real
			}
			if !seen[next] {
				seen[next] = true
				queue = append(queue, &node{next, at})
			}
		}
	}
	return nil
}

// below picks the packages of the module in the folders, and below them.
func below(folders ...string) func(string) bool {
	return func(name string) bool {
		rel, ok := strings.CutPrefix(name, module+"/")
		return ok && slices.ContainsFunc(folders, func(f string) bool { return rel == f || strings.HasPrefix(rel, f+"/") })
	}
}

// matching picks packages by their import path; a pattern that ends with /... includes what is below.
func matching(patterns ...string) func(string) bool {
	return func(name string) bool {
		return slices.ContainsFunc(patterns, func(p string) bool {
			if prefix, ok := strings.CutSuffix(p, "/..."); ok {
				return name == prefix || strings.HasPrefix(name, prefix+"/")
			}
			return name == p
		})
	}
}

func TestImports(t *testing.T) {
	g := load(t)
	for _, rule := range []struct {
		name string
		from func(string) bool // who is judged
		bad  func(string) bool // what they must not reach, by whatever way
	}{
		{
			"the shim stays small and quick: no gRPC, HTTP or Kubernetes in it",
			below("cmd/berth-shim"), matching("google.golang.org/grpc/...", "net/http/...", "k8s.io/...", "sigs.k8s.io/...", "go.etcd.io/bbolt/..."),
		},
		{
			"the shim stands on cri/shim and cgroups, nothing above",
			below("cmd/berth-shim"), func(name string) bool {
				return below("cri")(name) && !below("cri/shim")(name) || below("images", "network", "proxy")(name)
			},
		},
		{"the daemon runs no container itself", below("cmd/berth"), matching("github.com/opencontainers/runc/...")},
		{"what is below the CRI knows nothing of it", below("images", "network", "cgroups", "proxy", "internal"), func(name string) bool {
			return below("cri", "cmd")(name) || matching("k8s.io/cri-api/...")(name)
		}},
		{"images stands alone", below("images"), below("network", "cgroups", "proxy")},
		{"network stands alone", below("network"), below("images", "cgroups", "proxy")},
		{"cgroups stands alone", below("cgroups"), below("images", "network", "proxy", "internal")},
		{"proxy stands alone", below("proxy"), below("images", "network", "cgroups")},
		{"the life of pods does not know the service above it", below("cri/pods", "cri/spec", "cri/shim", "cri/streaming"), matching(module + "/cri")},
		{"the shared mechanisms need the standard library only", below("internal/step", "internal/thread", "internal/version"), func(name string) bool { return strings.Contains(name, ".") && !strings.HasPrefix(name, "vendor/") }},
		{"the thin shim's OOM counter is light", below("cgroups/oom"), func(name string) bool { return strings.Contains(name, ".") && !strings.HasPrefix(name, "vendor/") }},
		{"no product code reaches into the tests", below("cmd", "cri", "images", "network", "cgroups", "proxy"), func(name string) bool { return below("integration", "examples")(name) || name == "testing" }},
	} {
		t.Run(rule.name, func(t *testing.T) {
			judged := 0
			for name := range g {
				if !rule.from(name) || strings.HasSuffix(path.Base(name), "test") {
					continue
				}
				judged++
				if chain := g.find(name, rule.bad); chain != nil {
					t.Errorf("%s", strings.Join(chain, "\n\timports "))
				}
			}
			if judged == 0 && !strings.HasPrefix(rule.name, "proxy ") { // proxy comes with an issue of its own
				t.Error("the rule judges no package: was a folder renamed?")
			}
		})
	}
}

// TestSpecDoesNoIO looks at direct imports: that a library on the way links os is no matter, that cri/spec calls it is.
// (It has golang.org/x/sys/unix for the names of signals.)
func TestSpecDoesNoIO(t *testing.T) {
	g := load(t)
	io := matching("os", "os/...", "net", "net/http/...", "io/ioutil", "log", "log/...", "time/tzdata")
	spec, ok := g[module+"/cri/spec"]
	if !ok {
		t.Fatal("there is no package cri/spec")
	}
	for _, name := range spec.Imports {
		if io(name) || strings.HasPrefix(name, module+"/") && !below("cri/spec")(name) {
			t.Errorf("cri/spec imports %s", name)
		}
	}
}
