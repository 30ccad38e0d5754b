package network

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFirstConfigurationIsUsed(t *testing.T) {
	for name, tc := range map[string]struct {
		files map[string]string
		want  string // name of the network
		err   string // or a part of the error
	}{
		"lexical order":    {map[string]string{"20-b.conflist": list("b", "x"), "10-a.conflist": list("a", "x")}, "a", ""},
		"conf before list": {map[string]string{"20-b.conflist": list("b", "x"), "10-a.conf": `{"cniVersion":"0.3.1","name":"a","type":"x"}`}, "a", ""},
		"json":             {map[string]string{"10-a.json": `{"cniVersion":"0.3.1","name":"a","type":"x"}`}, "a", ""},
		"list in a .conf":  {map[string]string{"10-a.conf": list("a", "x")}, "a", ""},
		"other files":      {map[string]string{"00.conflist.bak": "x", "01": "x", "10-a.conflist": list("a", "x")}, "a", ""},
		"loopback alone is no network": {map[string]string{
			"00-lo.conf": `{"cniVersion":"1.0.0","name":"lo","type":"loopback"}`, "10-a.conflist": list("a", "x"),
		}, "a", ""},
		"only loopback":          {map[string]string{"99-lo.conf": `{"cniVersion":"1.0.0","name":"lo","type":"loopback"}`}, "", "no network configuration"},
		"none":                   {nil, "", "no network configuration"},
		"bad one is not skipped": {map[string]string{"10-a.conflist": "{", "20-b.conflist": list("b", "x")}, "", "10-a.conflist: not a configuration"},
		"empty file":             {map[string]string{"10-a.conflist": ""}, "", "not a configuration"},
		"null":                   {map[string]string{"10-a.conflist": "null"}, "", "network name"},
		"no name":                {map[string]string{"10-a.conflist": `{"plugins":[{"type":"x"}]}`}, "", "network name"},
		"name is a path":         {map[string]string{"10-a.conflist": list("../x", "x")}, "", "network name"},
		"no plugins":             {map[string]string{"10-a.conflist": `{"name":"a","plugins":[]}`}, "", "no plugins"},
		"nothing at all":         {map[string]string{"10-a.conflist": `{"name":"a"}`}, "", "no plugins"},
		"no type":                {map[string]string{"10-a.conflist": `{"name":"a","plugins":[{}]}`}, "", "type"},
		"plugin is no object":    {map[string]string{"10-a.conflist": `{"name":"a","plugins":[1]}`}, "", "a.conflist"},
		"version to come":        {map[string]string{"10-a.conflist": `{"cniVersion":"9.0.0","name":"a","plugins":[{"type":"x"}]}`}, "", `CNI version "9.0.0"`},
		"no version is 0.1.0":    {map[string]string{"10-a.conflist": `{"name":"a","plugins":[{"type":"x"}]}`}, "a", ""},
		"of several versions":    {map[string]string{"10-a.conflist": `{"cniVersion":"0.4.0","cniVersions":["1.0.0","9.0.0"],"name":"a","plugins":[{"type":"x"}]}`}, "a", ""},
		"too large":              {map[string]string{"10-a.conflist": list("a", "x") + strings.Repeat(" ", maxConf)}, "", "larger than"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for f, content := range tc.files {
				if err := os.WriteFile(filepath.Join(dir, f), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			c, err := loadDir(dir)
			switch {
			case tc.err != "":
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("%v, want %q", err, tc.err)
				}
			case err != nil:
				t.Error(err)
			case c.Name != tc.want:
				t.Errorf("network %s, want %s", c.Name, tc.want)
			default:
				again, err := parseConflist(c.Bytes, nil)
				if err != nil || again.Name != c.Name || len(again.Plugins) != len(c.Plugins) {
					t.Errorf("its own bytes: %+v, %v", again, err)
				}
			}
		})
	}
}

// CNI 1.1 lets plugins be in files beside the list; Teardown has only the bytes that were stored.
func TestPluginsOfFurtherFilesAreInTheBytes(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{
		"10-a.conflist": `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"x"}]}`,
		"a/20.conf":     `{"type":"z"}`, "a/10.conf": `{"type":"y","k":1}`, "a/ignored.txt": "x", "b/10.conf": `{"type":"b"}`,
	}
	for _, d := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for f, content := range files {
		if err := os.WriteFile(filepath.Join(dir, f), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := loadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := parseConflist(c.Bytes, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(types(again.NetworkConfigList), " "); got != "x y z" || !again.LoadOnlyInlinedPlugins {
		t.Errorf("plugins %s in %s", got, c.Bytes)
	}
	if err := os.WriteFile(dir+"/a/20.conf", []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadDir(dir); err == nil {
		t.Error("a bad further file was ignored")
	}
}

func TestConfigurationThatIsNoFileDoesNotHang(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(dir+"/10-a.conflist", 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadDir(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("%v", err)
	}
}

func TestCVE_2021_20206_TypeIsNoPath(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(outside+"/evil", []byte("#!/bin/sh\ntouch "+outside+"/ran\n"), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	for _, typ := range []string{"../../../../../../.." + outside + "/evil", outside + "/evil", "./x", "..", ".", "a/b", "x\\n", "x\\u0000"} {
		for name, conf := range map[string]string{
			"plugin": `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"` + typ + `"}]}`,
			"ipam":   `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x","ipam":{"type":"` + typ + `"}}]}`,
			"single": `{"cniVersion":"1.0.0","name":"a","type":"` + typ + `"}`,
		} {
			if _, err := parseConflist([]byte(conf), nil); err == nil || !strings.Contains(err.Error(), "is not a file name") {
				t.Errorf("%s %q: %v", name, typ, err)
			}
		}
		if file, err := (&plugins{}).FindInPath(strings.ReplaceAll(typ, "\\n", "\n"), []string{"/"}); err == nil {
			t.Errorf("%q was found: %s", typ, file)
		}
	}
}

func FuzzConflist(f *testing.F) {
	f.Add([]byte(list("a", "x", "y")))
	f.Add([]byte(`{"cniVersion":"0.3.1","name":"a","type":"x","ipam":{"type":"host-local"}}`))
	f.Add([]byte(`{"name":"a","cniVersions":["1.0.0"],"disableGC":"true","plugins":[{"type":"x"}]}`))
	f.Add([]byte(`{"name":"a","plugins":[null]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		further := func(string) ([][]byte, error) { return [][]byte{data, []byte(`{"type":"more"}`)}, nil }
		for _, more := range []func(string) ([][]byte, error){nil, further} {
			c, err := parseConflist(data, more)
			if err != nil {
				continue
			}
			if len(c.Plugins) == 0 || c.Name == "" || strings.ContainsRune(c.Name, '/') {
				t.Errorf("accepted: %+v", c.NetworkConfigList)
			}
			for _, typ := range types(c.NetworkConfigList) {
				if filepath.Base(typ) != typ {
					t.Errorf("type %q", typ)
				}
			}
			again, err := parseConflist(c.Bytes, nil)
			if err != nil || again.Name != c.Name || len(again.Plugins) != len(c.Plugins) {
				t.Errorf("its own bytes %q: %v", c.Bytes, err)
			}
		}
	})
}
