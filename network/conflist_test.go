package network

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

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
		"bad one is not skipped": {map[string]string{"10-a.conflist": "{", "20-b.conflist": list("b", "x")}, "", "10-a.conflist:1: not a configuration"},
		"empty file":             {map[string]string{"10-a.conflist": ""}, "", "not a configuration"},
		"null":                   {map[string]string{"10-a.conflist": "null"}, "", "10-a.conflist:1: name is missing"},
		"no name":                {map[string]string{"10-a.conflist": `{"plugins":[{"type":"x"}]}`}, "", "name is missing"},
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

// What is wrong is told with the line, so that nobody has to look for it.
func TestErrorsNameFileAndLine(t *testing.T) {
	for name, tc := range map[string]struct{ content, want string }{
		"syntax":                           {"{\n \"name\": \"a\",\n \"plugins\": [}\n}", "10-a.conflist:3: not a configuration: invalid character '}'"},
		"cut off":                          {"{\n \"name\": \"a\",\n", "10-a.conflist:3: not a configuration: unexpected end"},
		"more behind":                      {list("a", "x") + "\n\n{}", "10-a.conflist:3: not a configuration: invalid character '{' after"},
		"a byte order mark":                {"\xef\xbb\xbf" + list("a", "x"), "10-a.conflist:1: not a configuration"},
		"binary":                           {"\x00\x01\x02", "10-a.conflist:1: not a configuration"},
		"name is a number":                 {"{\n\n\"name\": 1}", "10-a.conflist:3: not a configuration: json: cannot unmarshal number"},
		"plugins are an object":            {"{\"name\": \"a\",\n\"plugins\": {}}", "10-a.conflist:2: not a configuration"},
		"a plugin without a type":          {"{\"name\": \"a\", \"plugins\": [\n{\"type\": \"x\"},\n\n{\"mtu\": 1}]}", "10-a.conflist:4: plugin 2: "},
		"a plugin that is null":            {"{\"name\": \"a\", \"plugins\": [\nnull]}", "10-a.conflist:2: plugin 1: "},
		"a type that is a path":            {"{\"name\": \"a\", \"plugins\": [{\"type\": \"x\"},\n{\"type\": \"../y\"}]}", "10-a.conflist:2: plugin 2: plugin type \"../y\""},
		"ipam that is a path":              {"{\"name\": \"a\", \"plugins\": [\n{\"type\": \"x\",\n\"ipam\": {\"type\": \"/y\"}}]}", "10-a.conflist:2: plugin 1: x: ipam: plugin type \"/y\""},
		"inside of a plugin":               {"{\"name\": \"a\", \"plugins\": [\n{\n\"type\": \"x\",\n\"capabilities\": 1}]}", "10-a.conflist:4: plugin 1: "},
		"a version to come":                {"{\"name\": \"a\",\n\"cniVersion\": \"9.0.0\", \"plugins\": [{\"type\": \"x\"}]}", "10-a.conflist:2: network a: CNI version \"9.0.0\" is none of 0.1.0"},
		"a version that is none":           {"{\"name\": \"a\", \"cniVersion\": \"new\", \"plugins\": [{\"type\": \"x\"}]}", "10-a.conflist:1: network a: CNI version \"new\""},
		"plugins before the error":         {"{\"plugins\": [{\"type\": \"x\"}],\n\n\"cniVersion\": \"9\", \"name\": \"a\"}", "10-a.conflist:3: network a: "},
		"no name":                          {"{\n\"plugins\": [{\"type\": \"x\"}]}", "10-a.conflist:1: name is missing"},
		"a name that is empty":             {"{\n\"name\": \"\", \"plugins\": [{\"type\": \"x\"}]}", "10-a.conflist:2: name is missing"},
		"a name that is a path":            {"{\n\"name\": \"../x\", \"plugins\": [{\"type\": \"x\"}]}", "10-a.conflist:2: name \"../x\": invalid characters found in network name"},
		"no plugins":                       {"{\n\"name\": \"a\"}", "10-a.conflist:1: network a has no plugins"},
		"plugins that are none":            {"{\n\"name\": \"a\",\n\"plugins\": []}", "10-a.conflist:3: network a has no plugins"},
		"plugins that are null":            {"{\n\"name\": \"a\",\n\"plugins\": null}", "10-a.conflist:3: network a has no plugins"},
		"a single one without IPAM's name": {"{\"name\": \"a\", \"type\": \"x\",\n\"ipam\": 1}", "10-a.conflist:2: "},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(dir+"/10-a.conflist", []byte(tc.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := loadDir(dir); err == nil || !strings.Contains(err.Error(), "network configuration "+dir+"/"+tc.want) {
				t.Errorf("%v, want %s", err, tc.want)
			}
		})
	}
}

func TestErrorsOfFurtherFilesNameThose(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/a", 0o700); err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string]string{
		"10-a.conflist": "\n\n" + `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"x"}]}`, "a/10.conf": "{\n\"type\": 1}",
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := loadDir(dir); err == nil || !strings.Contains(err.Error(), "network configuration "+dir+"/10-a.conflist: "+dir+"/a/10.conf:2: ") {
		t.Errorf("%v", err)
	}
}

// Tools replace a file by rename, and each read is of the one or of the other.
func TestConfigurationThatIsReplacedWhileItIsRead(t *testing.T) {
	dir := t.TempDir()
	text := func(c string) []byte {
		return fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":%q,%s"plugins":[{"type":%q}]}`, c, strings.Repeat(" ", maxConf/2), c)
	}
	replace := func(i int) error {
		if err := os.WriteFile(dir+"/~", text(string("ab"[i%2])), 0o600); err != nil {
			return err
		}
		return os.Rename(dir+"/~", dir+"/10-a.conflist")
	}
	if err := replace(0); err != nil {
		t.Fatal(err)
	}
	var writer sync.WaitGroup
	defer writer.Wait()
	stop := make(chan struct{})
	defer close(stop)
	writer.Go(func() {
		for i := 1; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := replace(i); err != nil {
				t.Error(err)
				return
			}
		}
	})
	read := map[string]int{}
	for start := time.Now(); time.Since(start) < time.Second/2 || len(read) < 2 && time.Since(start) < time.Minute; {
		c, err := loadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		if c.Name != c.Plugins[0].Network.Type {
			t.Fatalf("network %s has the plugin of %s", c.Name, c.Plugins[0].Network.Type)
		}
		read[c.Name]++
	}
	t.Log(read)
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
