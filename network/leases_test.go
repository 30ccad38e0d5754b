package network

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestGCGivesBackAddressesOfNoPod(t *testing.T) {
	n := bare(t)
	m := n.open()
	const owed = "a123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	m.owed.all[owed] = &debt{Pod: Pod{ID: owed}}
	var files []string
	for file, content := range map[string]string{
		"berth-00000001/10.1.0.2":           podID + "\r\neth0",
		"berth-00000001/10.1.0.3":           otherID + "\r\neth0", // nobody's
		"berth-00000001/10.1.0.4":           "",                   // torn
		"berth-00000001/10.1.0.5":           owed + "\r\neth0",
		"berth-00000001/last_reserved_ip.0": "10.1.0.5",
		"berth-00000001/lock":               "",
		"berth-00000002/fd00::2":            otherID + "\r\neth0", // nobody's, of a former range
		"berth-00000002/fd00::3":            podID,                // as host-local once wrote it
		"other/10.1.0.9":                    otherID + "\r\neth0",
	} {
		path := filepath.Join(m.leasesDir(), file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		n.write(path, content)
		if content != "" && !strings.HasPrefix(content, otherID) || strings.HasPrefix(file, "other") || strings.HasSuffix(file, "lock") {
			files = append(files, path)
		}
	}
	if err := m.GC(t.Context(), []string{podID}); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(m.leasesDir() + "/*/*")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(files)
	slices.Sort(left)
	if !slices.Equal(left, files) {
		t.Errorf("left are %q, want %q", left, files)
	}
	if log := n.daemonLog.String(); strings.Count(log, "an address that belongs to no pod is given back") != 3 {
		t.Errorf("log: %s", log)
	}
}
