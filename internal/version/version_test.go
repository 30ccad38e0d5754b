package version

import "testing"

func TestStringNamesTheCommitOnlyWhereItIsKnown(t *testing.T) {
	v, c := Version, Commit
	t.Cleanup(func() { Version, Commit = v, c })
	Version, Commit = "1.2.3", ""
	if got := String(); got != "1.2.3" {
		t.Errorf("without a commit: %q", got)
	}
	Commit = "0123abcd"
	if got := String(); got != "1.2.3 (0123abcd)" {
		t.Errorf("with a commit: %q", got)
	}
}
