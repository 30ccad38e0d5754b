package images

import (
	"fmt"
	"strings"
	"testing"

	"github.com/berth-run/berth/images/imagestest"
)

func explain(t *testing.T, s *Store, ref string, auth *Auth) *Explanation {
	t.Helper()
	e, err := s.Explain(t.Context(), ref, auth)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(fmt.Sprintf("%+v", e), secret) {
		t.Errorf("the explanation has the secret: %+v", e)
	}
	return e
}

func TestExplainSaysWhoIsAskedWhyAndWhatIsAnswered(t *testing.T) {
	own, pullOnly, empty := imagestest.NewRegistry(t), imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	own.RequireToken("", user, secret)
	built := own.Push("a", "b", smallImage("x"))
	pullOnly.Push("a", "b", smallImage("x"))
	empty.RequireBasic(user, secret)
	s := openStore(t, certs(t, map[string]string{"registry.example": fmt.Sprintf(`# the registry of the office
server = %q

[host.%q]
  capabilities = ["pull"]
[host."http://127.0.0.1:1"]
  dial_timeout = "2s"

[host.%q]
  [host.%[3]q.header]
    X-Key = %[4]q
`, own.URL, pullOnly.URL, empty.URL, secret)}))
	e := explain(t, s, "registry.example/a:b", &Auth{Username: user, Password: secret})
	file := s.certsD + "/registry.example/hosts.toml"
	want := []HostExplanation{
		{URL: pullOnly.URL + "/v2", Line: 4, Why: "a mirror", Answer: "has it: " + built.Descriptor.Digest.String(), OK: true},
		{URL: "http://127.0.0.1:1/v2", Line: 6, Why: "a mirror", Answer: "connection refused"},
		{URL: empty.URL + "/v2", Line: 9, Why: "a mirror", Answer: "authorization failed"},
		{URL: own.URL + "/v2", Line: 2, Why: "server of the file: the registry itself", Answer: "has it: " + built.Descriptor.Digest.String(), OK: true},
	}
	if len(e.Hosts) != len(want) {
		t.Fatalf("%d hosts: %+v", len(e.Hosts), e.Hosts)
	}
	for i, w := range want {
		got := e.Hosts[i]
		if got.URL != w.URL || got.File != file || got.Line != w.Line || got.Why != w.Why || got.OK != w.OK || !strings.Contains(got.Answer, w.Answer) {
			t.Errorf("host %d is %+v, want %+v in %s", i+1, got, w, file)
		}
		sent := "not sent"
		if i == 3 {
			sent = "sent where it asks"
		}
		if !strings.HasPrefix(got.Credentials, sent) {
			t.Errorf("credentials of host %d: %q, want %s", i+1, got.Credentials, sent)
		}
	}
	if got := strings.Join(e.Hosts[1].Settings, ","); got != "dial_timeout = 2s" {
		t.Errorf("settings of the second: %s", got)
	}
	if got := strings.Join(e.Hosts[2].Settings, ","); got != "header X-Key" {
		t.Errorf("settings of the third: %s", got)
	}
	asked := strings.Join(e.Hosts[3].Requests, "\n")
	for _, part := range []string{"401 Unauthorized, wants a token of", own.URL + "/token", `with "Bearer": 200 OK`} {
		if !strings.Contains(asked, part) {
			t.Errorf("requests have no %q:\n%s", part, asked)
		}
	}
	if n := pullOnly.Count("HEAD", "/manifests/b"); n != 0 {
		t.Errorf("a mirror that resolves no tags was asked for one %d times", n)
	}
	for _, r := range []*imagestest.Registry{own, pullOnly, empty} {
		if n := r.Count("GET", "/blobs/"); n != 0 {
			t.Errorf("%d blobs fetched", n)
		}
	}
	if pullOnly.Saw(imagestest.Basic(user, secret)) || empty.Saw(imagestest.Basic(user, secret)) {
		t.Error("a mirror got the credentials")
	}
}

func TestExplainWithoutConfiguration(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	s := openStore(t)
	e := explain(t, s, reg.Host()+"/a:b", nil)
	if len(e.Hosts) != 1 || e.Hosts[0].File != "" || e.Hosts[0].Credentials != "none are given" || !strings.Contains(e.Hosts[0].Why, "nothing is configured") {
		t.Errorf("%+v", e)
	}
	if e.Hosts[0].OK || !strings.Contains(e.Hosts[0].Answer, "not found") {
		t.Errorf("the answer about an absent image is %q", e.Hosts[0].Answer)
	}
}

// Without a fallback the registry itself is not asked, and so not in the explanation.
func TestExplainHasNoRegistryWithoutFallback(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	s := openStore(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = \"http://127.0.0.1:1\"\nfallback = false\n[host.%q]\n", reg.URL)}))
	e := explain(t, s, "registry.example/a:b", nil)
	if len(e.Hosts) != 1 || e.Hosts[0].Line != 3 || e.Hosts[0].Why != "a mirror" || !e.Hosts[0].OK {
		t.Errorf("%+v", e.Hosts)
	}
}

// A misspelt key is noted once, however many hosts there are, and the error of a pull that fails has it, too.
func TestContainerd12636_UnknownKeysAreNoted(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	s := quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.\"http://127.0.0.1:1\"]\ncapabilitys = []\n", reg.URL)}))
	const want = "registry.example/hosts.toml:3: unknown key host.http://127.0.0.1:1.capabilitys"
	e, told := explain(t, s, "registry.example/a:b", nil), 0
	for _, note := range e.Notes {
		if strings.HasSuffix(note, want) {
			told++
		}
	}
	if told != 1 {
		t.Errorf("notes: %q, want %q once", e.Notes, want)
	}
	if err := pullErr(t, s, "registry.example/a:b", nil); !strings.Contains(err.Error(), want) {
		t.Errorf("the pull fails with %v, want %q in it", err, want)
	}
}

// A token server elsewhere gets no credentials, and the explanation says what to do about it.
func TestExplainNotesForeignTokenServers(t *testing.T) {
	reg, realm := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	reg.RequireToken(strings.Replace(realm.URL, "127.0.0.1", "localhost", 1)+"/token", user, secret)
	e := explain(t, openStore(t), reg.Host()+"/a:b", &Auth{Username: user, Password: secret})
	if len(e.Notes) != 1 || !strings.Contains(e.Notes[0], "token_hosts") {
		t.Errorf("notes: %q", e.Notes)
	}
	if realm.Saw(secret) {
		t.Error("the token server got the password")
	}
}

func TestExplainRefusesWhatIsNoReference(t *testing.T) {
	for _, ref := range []string{"", "UPPER:x", "a b", strings.Repeat("a", 64)} {
		if e, err := openStore(t).Explain(t.Context(), ref, nil); err == nil {
			t.Errorf("%q: %+v", ref, e)
		}
	}
}
