package main

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cmd/berth/internal/config"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/internal/version"
)

func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := command()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.Execute()
	return out.String(), err
}

func TestVersionCommand(t *testing.T) {
	for _, arg := range []string{"version", "--version"} {
		if out, err := run(t, arg); err != nil || out != "berth "+version.String()+"\n" {
			t.Errorf("%s: %q %v", arg, out, err)
		}
	}
}

func TestBoundsOfPullsReachTheStore(t *testing.T) {
	c := config.Default()
	if o := storeOptions(&c, nil); o.MaxLayerBytes != images.DefaultMaxLayerBytes || o.MaxLayerEntries != images.DefaultMaxLayerEntries || o.MinPullRate != images.DefaultMinPullRate {
		t.Errorf("defaults of the command and of the store differ: %+v", o)
	}
	c.MaxLayerBytes, c.MaxLayerEntries, c.MinPullRate = "1Gi", "20", "30Ki"
	if o := storeOptions(&c, nil); o.MaxLayerBytes != 1<<30 || o.MaxLayerEntries != 20 || o.MinPullRate != 30<<10 {
		t.Errorf("got %+v", o)
	}
}

func TestServeRefusesBadFlagsAndFilesInOneLine(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte("# berth\nsockte: /x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		file + `:2: unknown field "sockte", the nearest known is "socket"`: {"serve", "--config", file},
		`--root: "rel" is not an absolute path`:                            {"serve", "--root", "rel"},
		`--cni-bin: "b" is not an absolute path`:                           {"serve", "--cni-bin", "/a:b"},
		`--log-level: "loud" is none of debug, info, warn, error`:          {"serve", "--log-level", "loud"},
		`configuration file: open /no/such: no such file or directory`:     {"serve", "--config", "/no/such"},
		`unknown flag: --rooot`:                                            {"serve", "--rooot", "/x"},
		`unknown command "extra" for "berth serve"`:                        {"serve", "extra"},
	} {
		out, err := run(t, args...)
		if err == nil || err.Error() != want {
			t.Errorf("%v: %v, want %s", args, err, want)
		}
		if out != "" {
			t.Errorf("%v: also prints %q", args, out)
		}
	}
}

// Directories that are not there are told at the start, and not passed over as if nobody had named them.
func TestContainerd12636_MissingRegistryConfigurationIsTold(t *testing.T) {
	there := t.TempDir()
	file := filepath.Join(there, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for certsD, want := range map[string]string{
		"":                        "",
		there:                     "",
		config.Default().CertsD:   "",
		"/no/such":                "/no/such",
		there + ":/no/such":       "/no/such",
		file:                      "not a directory",
		"/no/such/a:/no/such/b/c": "/no/such/b/c",
	} {
		var out bytes.Buffer
		warnOfCertsD(slog.New(slog.NewTextHandler(&out, nil)), certsD)
		if got := out.String(); !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%q: %q, want %q", certsD, got, want)
		}
	}
}

func TestServeHasAFlagForEveryField(t *testing.T) {
	out, err := run(t, "serve", "--help")
	if err != nil {
		t.Fatal(err)
	}
	for name := range new(config.Config).Values() {
		if flag := "--" + config.Flag(name) + " "; !strings.Contains(out, flag) {
			t.Errorf("%s is not in the help:\n%s", flag, out)
		}
	}
}

// `crictl info` is where a person looks for what is in force.
func TestShownConfigurationHasEveryOption(t *testing.T) {
	c, err := config.Load(nil, config.Config{Root: "/srv/berth"}, func(name string) bool { return name == "root" })
	if err != nil {
		t.Fatal(err)
	}
	all := shown(c, cgroups.Cgroupfs)
	for name, want := range map[string]any{
		"root": "/srv/berth", "socket": "/run/berth/berth.sock", "cgroupDriver": cgroups.Cgroupfs, "shim": "", "logLevel": "info",
		"stateDir": "/run/berth/containers",
	} {
		if got, ok := all[name]; !ok || got != want {
			t.Errorf("%s is %v (%t), want %v", name, got, ok, want)
		}
	}
	fields := reflect.TypeFor[config.Config]()
	for i := range fields.NumField() {
		name, _, _ := strings.Cut(fields.Field(i).Tag.Get("json"), ",")
		if _, ok := all[name]; !ok {
			t.Errorf("%s is not shown", name)
		}
	}
}

// What ends before the daemon is told to, as after an error, must not wait for that.
func TestCadvisorsAnswersEndWhenTheyAreToldTo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	end := answerCadvisor(t.Context(), slog.New(slog.DiscardHandler), path, "", nil, nil)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ended := make(chan struct{})
	go func() { end(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("it waits")
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestAModeThatBerthDoesNotHaveIsRefusedWithItsPlace(t *testing.T) {
	dir := t.TempDir()
	kubeconfig, file := filepath.Join(dir, "kubeconfig"), filepath.Join(dir, "config.conf")
	for name, text := range map[string]string{
		kubeconfig: "apiVersion: v1\nkind: Config\nclusters: [{name: a, cluster: {server: 'http://127.0.0.1:1'}}]\ncontexts: [{name: a, context: {cluster: a}}]\ncurrent-context: a\n",
		file:       "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclientConnection: {kubeconfig: " + kubeconfig + "}\nmode: ipvs\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for want, args := range map[string][]string{
		file + `:4: mode: "ipvs": berth has nftables and iptables`: {"proxy", "--init-only", "--config", file},
		`--proxy-mode: "ipvs": berth has nftables and iptables`:    {"proxy", "--init-only", "--kubeconfig", kubeconfig, "--proxy-mode", "ipvs"},
	} {
		if _, err := run(t, args...); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
