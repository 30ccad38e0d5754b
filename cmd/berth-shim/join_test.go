package main

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/cgroups"
)

const madeState = `{"id":"c","cgroup_paths":{"":"/u/c","cpu":"/cpu/c","cpuacct":"/cpu/c"},"config":{"rootfs":"/r","cgroups":{"Name":"c","Systemd":true}},"later":[1.50]}`

// made is the state directory of a container as libcontainer leaves it.
func made(t *testing.T) (stateRoot string) {
	t.Helper()
	if cgroups.IsCgroup2UnifiedMode() {
		t.Skip("on cgroup v2 libcontainer moves exec'd processes")
	}
	stateRoot = t.TempDir()
	if err := os.Mkdir(filepath.Join(stateRoot, "c"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(stateRoot, "c", "state.json"), []byte(madeState), 0o600); err != nil {
		t.Fatal(err)
	}
	return stateRoot
}

func TestStateForExecsKnowsNoCgroups(t *testing.T) {
	root := made(t)
	if err := writeExecState(root, "c"); err != nil {
		t.Fatal(err)
	}
	var state map[string]json.RawMessage
	var paths map[string]string
	for file, to := range map[string]any{"state.json": &state, joinFile: &paths} {
		data, err := os.ReadFile(filepath.Join(execRoot(root, "c"), "c", file))
		if err == nil {
			err = json.Unmarshal(data, to)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if string(state["cgroup_paths"]) != "{}" || string(state["config"]) != `{"cgroups":{"Name":"c"},"rootfs":"/r"}` || string(state["later"]) != "[1.50]" {
		t.Errorf("state %s", state)
	}
	if !maps.Equal(paths, map[string]string{"cpu": "/cpu/c", "cpuacct": "/cpu/c"}) {
		t.Errorf("joined are %v", paths)
	}
}

// One that is half written would have every exec fail.
func TestStateForExecsIsWholeOrNotThere(t *testing.T) {
	root := made(t)
	if err := os.MkdirAll(filepath.Join(execRoot(root, "c"), "c", joinFile), 0o700); err != nil { // in the way
		t.Fatal(err)
	}
	if err := writeExecState(root, "c"); err == nil {
		t.Fatal("no error")
	}
	if _, err := os.Lstat(execRoot(root, "c")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is left: %v", err)
	}
}
