package integration

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// TestEveryAttackIsListed holds docs/security.md to the truth: what it names is there, and what is there it names.
func TestEveryAttackIsListed(t *testing.T) {
	text, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	tests := map[string]map[string]bool{}
	for _, ref := range regexp.MustCompile("`([a-z/]+)\\.(Test[A-Za-z0-9_]+)`").FindAllStringSubmatch(string(text), -1) {
		dir, name := ref[1], ref[2]
		if tests[dir] == nil {
			tests[dir] = testsIn(t, filepath.Join("..", dir), `func (?:\(s \*security\) )?(Test\w+)\(`)
		}
		if !tests[dir][name] {
			t.Errorf("docs/security.md names %s, which %s does not have", name, dir)
		}
		listed[dir+"."+name] = true
	}
	for name := range testsIn(t, ".", `func \(s \*security\) (Test\w+)\(`) {
		if !listed["integration."+name] {
			t.Errorf("docs/security.md does not name %s", name)
		}
	}
	if len(listed) < 60 {
		t.Errorf("docs/security.md names %d tests only", len(listed))
	}
}

func testsIn(t *testing.T, dir, pattern string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("tests of %s: %v, %v", dir, files, err)
	}
	names := map[string]bool{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(pattern).FindAllSubmatch(text, -1) {
			names[string(m[1])] = true
		}
	}
	return names
}
