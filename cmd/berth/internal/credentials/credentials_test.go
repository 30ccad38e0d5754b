package credentials

import (
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/berth-run/berth/images/admin"
)

const secret = "s3cr3t-pass"

func file(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPair(t *testing.T) {
	want := &admin.Auth{Username: "alice", Password: "a:b " + secret}
	for _, text := range []string{"alice:a:b " + secret, "alice:a:b " + secret + "\n", "alice:a:b " + secret + "\r\n"} {
		if got, err := Pair(file(t, text), nil); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v", text, err)
		}
		if got, err := Pair("-", strings.NewReader(text)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q on standard input: %v", text, err)
		}
	}
	for _, text := range []string{"", secret, "alice:", ":" + secret, "alice:" + secret + "\nbob:x", strings.Repeat("x", maxFile+1)} {
		if _, err := Pair(file(t, text), nil); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%.30q: %v", text, err)
		}
	}
	if _, err := Pair("/no/such/file", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestDockerConfig(t *testing.T) {
	auth := base64.StdEncoding.EncodeToString([]byte("alice:" + secret))
	config := file(t, `{"auths":{
		"https://index.docker.io/v1/":{"auth":"`+auth+`"},
		"registry.example":{"username":"wide","password":"w"},
		"https://registry.example/team":{"username":"team","password":"t"},
		"registry.example/team/other":{"username":"other","password":"o"},
		"registry.example:5000":{"identitytoken":"it"},
		"token.example/v2/":{"registrytoken":"rt"},
		"helped.example":{},
		"bad.example":{"auth":"%%%`+secret+`"}
	},"credHelpers":{"helped.example":"ecr-login"},"HttpHeaders":{"x":"y"}}`)
	alice := &admin.Auth{Username: "alice", Password: secret}
	for image, want := range map[string]struct {
		auth *admin.Auth
		from string
	}{
		"busybox":                          {alice, "https://index.docker.io/v1/"},
		"docker.io/team/app:v1":            {alice, "https://index.docker.io/v1/"},
		"registry.example/app":             {&admin.Auth{Username: "wide", Password: "w"}, "registry.example"},
		"registry.example/team/app":        {&admin.Auth{Username: "team", Password: "t"}, "https://registry.example/team"},
		"registry.example/teammate/app":    {&admin.Auth{Username: "wide", Password: "w"}, "registry.example"},
		"registry.example/team/other:v1":   {&admin.Auth{Username: "other", Password: "o"}, "registry.example/team/other"},
		"registry.example:5000/team/other": {&admin.Auth{IdentityToken: "it"}, "registry.example:5000"},
		"token.example/a":                  {&admin.Auth{RegistryToken: "rt"}, "token.example/v2/"},
		"elsewhere.example/a":              {nil, ""},
		"evilregistry.example/a":           {nil, ""},
	} {
		got, from, err := Docker(config, nil, image)
		if err != nil || !reflect.DeepEqual(got, want.auth) || from != want.from {
			t.Errorf("%s: from %q, want %q: %v", image, from, want.from, err)
		}
	}
	for image, want := range map[string]string{"helped.example/a": "credential helper", "bad.example/a": `entry "bad.example"`, "bad.example/UPPER": "UPPER"} {
		if _, _, err := Docker(config, nil, image); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v, want %s", image, err, want)
		}
	}
	for _, text := range []string{"", secret, `{"auths":"` + secret + `"}`, `{"auths":{"a":` + secret} {
		if _, _, err := Docker(file(t, text), nil, "busybox"); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
