package oom

import (
	"errors"
	"os"
	"strings"
	"testing"
)

func TestKills(t *testing.T) {
	for name, tc := range map[string]struct {
		file, content string
		want          uint64
		ok            bool
	}{
		"v2":              {"memory.events", "low 0\nhigh 0\nmax 4\noom 2\noom_kill 3\noom_group_kill 7\n", 3, true},
		"v2, none":        {"memory.events", "oom 2\noom_kill 0\n", 0, true},
		"v1":              {"memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 12\n", 12, true},
		"v1, old kernel":  {"memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", 0, false},
		"no newline":      {"memory.events", "oom_kill 5", 5, true},
		"no number":       {"memory.events", "oom_kill x\n", 0, false},
		"negative number": {"memory.events", "oom_kill -1\n", 0, false},
		"empty":           {"memory.events", "", 0, false},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(dir+"/"+tc.file, []byte(tc.content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Kills(dir)
		if got != tc.want || (err == nil) != tc.ok {
			t.Errorf("%s: %d, %v", name, got, err)
		}
	}
	if _, err := Kills(t.TempDir() + "/gone"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("oom_kill 3\n")
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parse(s)
		if err == nil && !strings.Contains(s, "oom_kill ") {
			t.Errorf("%q: %d", s, n)
		}
	})
}
