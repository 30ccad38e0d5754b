package config

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func none(string) bool { return false }

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDefaultsWork(t *testing.T) {
	c, err := Load(nil, Config{}, none)
	if err != nil {
		t.Fatal(err)
	}
	if c.Socket != "/run/berth/berth.sock" || c.Root != "/var/lib/berth" || !slices.Equal(c.CNIBin, []string{"/opt/cni/bin"}) {
		t.Errorf("%+v", c)
	}
}

func TestDisabledIsEmpty(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	write(t, file, "cadvisorSocket: disabled\n")
	c, err := Load([]string{file}, Config{NRISocket: Disabled}, func(name string) bool { return name == "nriSocket" })
	if err != nil || c.CadvisorSocket != "" || c.NRISocket != "" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestPodCIDRs(t *testing.T) {
	for value, want := range map[string]string{"": "[]", Kubelet: "[]", Disabled: "[]", "10.1.0.0/24, fd00::/64": "[10.1.0.0/24 fd00::/64]"} {
		c, err := Load(nil, Config{PodCIDR: value}, func(name string) bool { return name == "podCIDR" })
		if err != nil || fmt.Sprint(c.PodCIDRs()) != want || (c.PodCIDR == "") != (value == "" || value == Disabled) {
			t.Errorf("%q: %q, %v, %v", value, c.PodCIDR, c.PodCIDRs(), err)
		}
	}
	if c, err := Load(nil, Config{}, none); err != nil || c.PodCIDR != Kubelet {
		t.Errorf("without a word: %q, %v", c.PodCIDR, err)
	}
}

func TestFlagsOverDropInsOverFileOverDefaults(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "config.yaml"), "root: /file\nrun: /file-run\ncniBin: [/a, /b]\nlogLevel: debug\n")
	write(t, filepath.Join(dir, "config.d", "20-last.yaml"), "run: /last-run\n")
	write(t, filepath.Join(dir, "config.d", "10-first.yaml"), "run: /first-run\nlogFormat: json\n")
	write(t, filepath.Join(dir, "config.d", "ignored.yaml.bak"), "nonsense: 1\n")
	files, err := Files("", dir)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Load(files, Config{LogLevel: "warn", Root: "not given"}, func(name string) bool { return name == "logLevel" })
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Root, want.Run, want.Socket, want.CNIBin = "/file", "/last-run", "/last-run/berth.sock", []string{"/a", "/b"}
	want.LogLevel, want.LogFormat = "warn", "json"
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("%+v\nwant %+v", *c, want)
	}
}

func TestAFileThatSetsNothing(t *testing.T) {
	for _, content := range []string{"", "# nothing\n", "---\n", "{}"} {
		if _, err := Load([]string{write(t, filepath.Join(t.TempDir(), "c.yaml"), content)}, Config{}, none); err != nil {
			t.Errorf("%q: %v", content, err)
		}
	}
}

func TestMissingFiles(t *testing.T) {
	if files, err := Files("", t.TempDir()); err != nil || len(files) != 0 {
		t.Errorf("missing default: %v %v", files, err)
	}
	files, err := Files("/does/not/exist.yaml", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Load(files, Config{}, none); err == nil || !strings.Contains(err.Error(), "/does/not/exist.yaml") {
		t.Errorf("missing file that was named: %v", err)
	}
}

func TestErrorsNameFileLineFieldAndValue(t *testing.T) {
	for content, want := range map[string]string{
		"root: /r\nrooot: /r\n":          `c.yaml:2: unknown field "rooot", the nearest known is "root"`,
		"\n# x\ncni-conf: /x\n":          `c.yaml:3: unknown field "cni-conf", the nearest known is "cniConf"`,
		"CNIBIN: [/x]\n":                 `c.yaml:1: unknown field "CNIBIN", the nearest known is "cniBin"`,
		"certs_d: /x\n":                  `unknown field "certs_d", the nearest known is "certsD"`,
		"certsD: /x:y\n":                 `c.yaml:1: certsD: "y" is not an absolute path`,
		"\"log-levl\": info\n":           `c.yaml:1: unknown field "log-levl", the nearest known is "logLevel"`,
		"{root: /r, rum: /x}":            `c.yaml:1: unknown field "rum", the nearest known is "run"`,
		"Root: /r\n":                     `unknown field "Root", the nearest known is "root"`,
		"a: 1\n\n\nb: 2\n":               `c.yaml:4: unknown field "b"`,
		"root: /r\ncniBin: /x\n":         `c.yaml:2: cniBin: a string cannot be a list of strings`,
		"root:\n  - /x\n":                `c.yaml:1: root: a list cannot be a string`,
		"root: /a\nroot: /b\n":           `line 2: key "root" already set in map`,
		"root: /a\n\tx: y\n":             `line 2`,
		"just text":                      `c.yaml: `,
		"[1, 2]":                         `c.yaml: `,
		"run: /r\nlogLevel: loud\n":      `c.yaml:2: logLevel: "loud" is none of debug, info, warn, error`,
		"logFormat: xml\n":               `c.yaml:1: logFormat: "xml" is none of text, json`,
		"\nroot: relative/path\n":        `c.yaml:2: root: "relative/path" is not an absolute path`,
		"root: \"\"\n":                   `c.yaml:1: root: must not be empty`,
		"root: \"/a\\nb\"\n":             `c.yaml:1: root: "/a\nb" is not an absolute path`,
		"cniBin: [1]\n":                  `c.yaml:1: cniBin: "1" is not an absolute path`,
		"shim: {a: b}\n":                 `c.yaml:1: shim: a mapping cannot be a string`,
		"cniBin: []\n":                   `c.yaml:1: cniBin: must not be empty`,
		"cniExec: [bridge, calico]\n":    `c.yaml:1: cniExec: "calico" is none of all, bandwidth, bridge, firewall, host-local, loopback, portmap, ptp, static, tuning`,
		"cdiSpecDirs: [/a, b]\n":         `c.yaml:1: cdiSpecDirs: "b" is not an absolute path`,
		"cniBin: [/a, b]\n":              `c.yaml:1: cniBin: "b" is not an absolute path`,
		"root: /x\nrun: /x\n":            `c.yaml:2: run: "/x": must be neither inside nor around root "/x"`,
		"root: /x\nrun: /x/run\n":        `c.yaml:2: run: "/x/run": must be neither inside nor around root "/x"`,
		"root: /x/root\nrun: /x\n":       `c.yaml:2: run: "/x": must be neither inside nor around root "/x/root"`,
		"streamIdle: soon\n":             `c.yaml:1: streamIdle: "soon" is no duration such as 4h or 90s`,
		"streamIdle: 10ms\n":             `c.yaml:1: streamIdle: "10ms" is less than a second`,
		"maxLayerBytes: much\n":          `c.yaml:1: maxLayerBytes: "much" is no number such as 1000000, 512Mi or 100Gi`,
		"minPullRate: 0\n":               `c.yaml:1: minPullRate: "0" is no number`,
		"whenRegistryDown: x\n":          `c.yaml:1: whenRegistryDown: "x" is none of fail, local`,
		"podCIDR: cluster\n":             `c.yaml:1: podCIDR: pod CIDR "cluster" is no address range`,
		"podCIDR: 10.1.0.0/31\n":         `c.yaml:1: podCIDR: pod CIDR 10.1.0.0/31 is too small`,
		"nodeRoutes: bgp\n":              `c.yaml:1: nodeRoutes: "bgp" is none of off, host-gw, vxlan, auto`,
		"nodeRoutes: auto\n":             `c.yaml:1: nodeRoutes: auto needs a kubeconfig (--kubeconfig) that may list and watch Nodes`,
		"kubeconfig: conf\n":             `c.yaml:1: kubeconfig: "conf" is not an absolute path`,
		"nodeName: Node_1\n":             `c.yaml:1: nodeName: "Node_1" is no name of a node`,
		"cgroupDriver: x\n":              `c.yaml:1: cgroupDriver: "x" is none of auto, cgroupfs, systemd`,
		"defaultUlimits: [nofile=2:1]\n": `c.yaml:1: defaultUlimits: ulimit: "nofile=2:1" has a soft limit above the hard one`,
	} {
		file := write(t, filepath.Join(t.TempDir(), "c.yaml"), content)
		_, err := Load([]string{file}, Config{}, none)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%q:\n got %v\nwant %s", content, err, want)
		}
	}
}

func TestAmounts(t *testing.T) {
	for text, want := range map[string]int64{
		"1": 1, "1000000": 1_000_000, "10Ki": 10 << 10, "512Mi": 512 << 20, "100Gi": 100 << 30, "2Ti": 2 << 40,
		"": 0, "Ki": 0, "0": 0, "-1": 0, "1.5Gi": 0, "1 Gi": 0, "1G": 0, "0x10": 0, "9000000Ti": 0, "9223372036854775807": 0,
	} {
		if got := Amount(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	c, err := Load([]string{write(t, filepath.Join(t.TempDir(), "c.yaml"), "maxLayerEntries: 3000000\nmaxLayerBytes: 1Ti\n")}, Config{MinPullRate: "1"}, func(name string) bool { return name == "minPullRate" })
	if err != nil || c.MaxLayerEntries != "3000000" || c.MaxLayerBytes != "1Ti" || c.MinPullRate != "1" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestErrorsNameTheFlag(t *testing.T) {
	_, err := Load(nil, Config{CNIConf: "x"}, func(name string) bool { return name == "cniConf" })
	if err == nil || err.Error() != `--cni-conf: "x" is not an absolute path` {
		t.Errorf("%v", err)
	}
}

func TestHugeFileIsRefused(t *testing.T) {
	file := write(t, filepath.Join(t.TempDir(), "c.yaml"), "#"+strings.Repeat("x", maxFile))
	if _, err := Load([]string{file}, Config{}, none); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("%v", err)
	}
}

// A field that fields does not list would be silently ignored.
func TestEveryFieldIsListed(t *testing.T) {
	c := Config{}
	listed := map[string]bool{}
	for _, f := range c.fields() {
		listed[f.name] = true
		if f.flag == "" || (f.text == nil) == (f.list == nil) {
			t.Errorf("%+v", f)
		}
	}
	typ := reflect.TypeOf(c)
	for i := range typ.NumField() {
		name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		if !listed[name] {
			t.Errorf("%s is not listed", name)
		}
		delete(listed, name)
	}
	if len(listed) > 0 {
		t.Errorf("%v are no fields", listed)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "root: /x", "root: [", "rooot: 1", "{run: /x}", "&a root: *a", "<<: {root: /x}", "? root\n: /x", "root: !!binary aGk=", "\xff", "1: 2", "null: x", "--- a\n--- b",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, lines, err := parse("f.yaml", []byte(s))
		if err != nil {
			if !strings.HasPrefix(err.Error(), "f.yaml") {
				t.Errorf("%q: the error does not name the file: %v", s, err)
			}
			return
		}
		known := names(&c)
		for name, line := range lines {
			if !slices.Contains(known, name) {
				t.Errorf("%q: unknown field %q passed", s, name)
			}
			if line < 1 || line > strings.Count(s, "\n")+1 {
				t.Errorf("%q: %s is in line %d", s, name, line)
			}
		}
	})
}
