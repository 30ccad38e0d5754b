package network

import (
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"
)

// referenceBin is the directory of the reference plugins.
func referenceBin(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("BERTH_CNI_BIN")
	if dir == "" {
		dir = "../bin/cni"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "bridge")); err != nil {
		t.Skip("no reference plugins: make build, or BERTH_CNI_BIN")
	}
	return dir
}

func TestProgramsThatAreNotTheReferenceAreRun(t *testing.T) {
	bin := referenceBin(t)
	n := newNode(t)
	n.plugin("portmap", good) // somebody else's
	for typ, of := range map[string]string{"bridge": "bridge", "loopback": "host-local", "calico": "bridge"} {
		if err := os.Symlink(filepath.Join(bin, of), filepath.Join(n.bin, typ)); err != nil {
			t.Fatal(err)
		}
	}
	program := func(typ string) string { return filepath.Join(n.bin, typ) }
	for _, tc := range []struct {
		typ, want string
		exec      []string
	}{
		{typ: "bridge", want: answered + "bridge"},
		{typ: "host-local", want: answered + "host-local"}, // not installed
		{typ: "portmap", want: program("portmap")},
		{typ: "loopback", want: program("loopback")}, // another plugin's program by that name
		{typ: "calico", want: program("calico")},
		{typ: "bridge", exec: []string{"portmap", "bridge"}, want: program("bridge")},
		{typ: "host-local", exec: []string{"bridge"}, want: answered + "host-local"},
		{typ: "bridge", exec: []string{ExecAll}, want: program("bridge")},
		{typ: "host-local", exec: []string{ExecAll}},
	} {
		e := &plugins{log: slog.New(slog.DiscardHandler), exec: tc.exec}
		got, err := e.FindInPath(tc.typ, []string{n.bin})
		if got != tc.want || (err != nil) != (tc.want == "") {
			t.Errorf("%s with --cni-exec %v: %q, %v; want %q", tc.typ, tc.exec, got, err, tc.want)
		}
	}
}

func TestProgramThatIsReplacedIsLookedAtAnew(t *testing.T) {
	bin := referenceBin(t)
	n := newNode(t)
	data, err := os.ReadFile(filepath.Join(bin, "loopback"))
	if err != nil {
		t.Fatal(err)
	}
	e := &plugins{log: slog.New(slog.DiscardHandler)}
	file := filepath.Join(n.bin, "loopback")
	for range 2 {
		n.writeMode(file, string(data), 0o700)
		if !e.answers("loopback", file) {
			t.Error("the reference plugin is run")
		}
		n.plugin("loopback", good)
		if e.answers("loopback", file) {
			t.Error("another plugin is not run")
		}
	}
}

func TestVersionOfProgram(t *testing.T) {
	dep := &debug.Module{Path: referenceModule, Version: "v1.9.1"}
	flags := debug.BuildSetting{Key: "-ldflags", Value: `-extldflags -static -X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=v1.9.0`}
	quoted := debug.BuildSetting{Key: "-ldflags", Value: `-X "github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=v1.9.0"`}
	for want, all := range map[string][]debug.BuildInfo{
		"v1.9.1":  {{Main: *dep}, {Main: debug.Module{Path: "tools"}, Deps: []*debug.Module{dep}}},
		"v1.9.0":  {{Main: debug.Module{Path: referenceModule, Version: "(devel)"}, Settings: []debug.BuildSetting{flags}}, {Settings: []debug.BuildSetting{quoted}}},
		"unknown": {{}, {Main: debug.Module{Path: referenceModule, Version: "(devel)"}}, {Main: debug.Module{Path: "example.org/plugins", Version: "v1.9.1"}}},
	} {
		for _, info := range all {
			if got := versionOf(&info); got != want {
				t.Errorf("%+v: %q, want %q", info, got, want)
			}
		}
	}
}
