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

func TestUndoRulesTakesThePodsChainsAndLeavesSharedOnes(t *testing.T) {
	n := &Node{Index: 1}
	saved := []string{
		"*nat",
		":CNI-d05d CNI-HOSTPORT-DNAT - [0:0]",
		`-A POSTROUTING -s 10.91.1.2/32 -m comment --comment "name: \"berth-lab1\" id: \"63\"" -j CNI-d05d`,
		`-A POSTROUTING -s 10.91.11.2/32 -m comment --comment "name: \"berth-lab11\" id: \"64\"" -j CNI-other`,
		`-A CNI-d05d -d 10.91.1.0/24 -m comment --comment "name: \"berth-lab1\" id: \"63\"" -j ACCEPT`,
		`-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"berth-lab1\" id: \"63\"" -m multiport --dports 80 -j CNI-DN-d05d`,
		"-A CNI-DN-d05d -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.91.1.2:80",
		"COMMIT",
	}
	want := `*nat
-D POSTROUTING -s 10.91.1.2/32 -m comment --comment "name: \"berth-lab1\" id: \"63\"" -j CNI-d05d
-D CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"berth-lab1\" id: \"63\"" -m multiport --dports 80 -j CNI-DN-d05d
-F CNI-d05d
-F CNI-DN-d05d
-X CNI-d05d
-X CNI-DN-d05d
COMMIT
`
	if got := n.undoRules(saved); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	if got := n.undoRules(saved[:2]); got != "" {
		t.Errorf("without rules: %q", got)
	}
}

func TestKernelSettingsComeBackWithTheLastKubelet(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("kernel settings are root's")
	}
	if exists(settingsFile) {
		t.Skip("a kubelet of another test runs, or one was killed")
	}
	const name = "/proc/sys/kernel/panic"
	before, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	first, err := keepSettings()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte("17\n"), 0o644); err != nil { // as a kubelet does
		t.Fatal(err)
	}
	second, err := keepSettings()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.release(); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != "17\n" {
		t.Errorf("while a kubelet runs: %q (%v)", got, err)
	}
	if err := second.release(); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != string(before) {
		t.Errorf("after the last: %q (%v), want %q", got, err, before)
	}
	if exists(settingsFile) {
		t.Errorf("%s is left", settingsFile)
	}
}
