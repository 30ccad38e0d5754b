package lab

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func TestDiffTellsWhatCameAndWhatWent(t *testing.T) {
	before := Snapshot{"mount a": true, "mount b": true}
	after := Snapshot{"mount b": true, "link c": true}
	if got, want := before.Diff(after), []string{"+ link c", "- mount a"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := before.Diff(before); got != nil {
		t.Errorf("%q", got)
	}
}

func TestReportCountsCasesAndNotTheirSetUp(t *testing.T) {
	file := filepath.Join(t.TempDir(), "report.json")
	const text = `[{"SpecReports":[
	 {"LeafNodeType":"BeforeSuite","State":"passed"},
	 {"ContainerHierarchyTexts":["[k8s.io] A"],"LeafNodeText":"works","LeafNodeType":"It","State":"passed"},
	 {"ContainerHierarchyTexts":["[k8s.io] B"],"LeafNodeText":"fails","LeafNodeType":"It","State":"failed","Failure":{"Message":"why"}},
	 {"ContainerHierarchyTexts":["[k8s.io] C"],"LeafNodeText":"waits","LeafNodeType":"It","State":"skipped"},
	 {"LeafNodeType":"AfterSuite","State":"panicked","Failure":{"Message":"boom"}}]}]`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := readReport(file)
	if err != nil {
		t.Fatal(err)
	}
	want := &Report{Passed: 1, Failed: 2, Skipped: 1, Failures: map[string]string{"[k8s.io] B fails": "why", "": "boom"}, SkippedNames: []string{"[k8s.io] C waits"}}
	if !reflect.DeepEqual(r, want) {
		t.Errorf("%+v, want %+v", r, want)
	}
}
