package podview

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestDifferencesAreExplained holds that of every line that only berth or only containerd shows somebody has said why, and
// that no explanation is left of what has changed.
func TestDifferencesAreExplained(t *testing.T) {
	text, err := os.ReadFile("testdata/differences.txt")
	if err != nil {
		t.Fatal(err)
	}
	explanations, err := ParseExplanations(string(text))
	if err != nil {
		t.Fatalf("differences.txt: %v", err)
	}
	files, err := filepath.Glob("testdata/berth/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < len(Kinds) {
		t.Fatalf("only the views %v", files)
	}
	used := make([]bool, len(explanations))
	for _, file := range files {
		kind, _, _ := strings.Cut(filepath.Base(file), ".")
		if !slices.Contains(Kinds, kind) {
			t.Errorf("%s: no such kind of pod", file)
		}
		for _, d := range Compare(kind, "berth", read(t, file), "containerd", read(t, strings.Replace(file, "/berth/", "/containerd/", 1))) {
			why := 0
			for i, e := range explanations {
				if e.Explains(d) {
					used[i], why = true, why+1
				}
			}
			if why != 1 {
				t.Errorf("%s: %d explanations of: %v", filepath.Base(file), why, d)
			}
		}
	}
	for i, e := range explanations {
		if !used[i] {
			t.Errorf("nothing is explained by: %s %s %s", strings.Join(e.Kinds, ","), e.Only, e.Line)
		}
	}
}

func read(t *testing.T, file string) []string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

func TestNormalise(t *testing.T) {
	got := Normalise("device loop0 brw-rw---- 0 6 7,0\ndevice loop1 brw-rw---- 0 6 7,1\n" +
		"mount /etc/hosts rw,relatime private ext4 /dev/vda rw\nfile /etc/hosts 10.91.3.7 pod\n" +
		"cgroup-path memory:/berth-it3/" + strings.Repeat("ab", 32) + "\ndescriptor 1 pipe:[1234]\n\n")
	want := []string{
		"cgroup-path memory:/PARENT/ID", "descriptor 1 pipe", "device others", "file /etc/hosts ADDRESS pod",
		"mount /etc/hosts rw,relatime private HOST",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
}

func TestParseExplanations(t *testing.T) {
	es, err := ParseExplanations("# for people\nall berth device x.*\nplain containerd mount /x\n  since it is so\n")
	if err != nil || len(es) != 2 || es[0].Why != "since it is so" || es[1].Only != "containerd" {
		t.Errorf("%+v, %v", es, err)
	}
	if !es[0].Explains(Difference{"restricted", "berth", "device xyz"}) || es[1].Explains(Difference{"plain", "containerd", "mount /xy"}) {
		t.Error("a pattern is for whole lines, of its kinds and its runtime")
	}
	for _, bad := range []string{"  a reason", "all berth", "all berth (\n why", "all berth x\n"} {
		if _, err := ParseExplanations(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
