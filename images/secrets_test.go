package images

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/internal/step"
)

func TestSecretsAreRedactedInEachForm(t *testing.T) {
	var s secrets
	s.addCredentials(credentials{username: "al", secret: `p@ss "wörd"/?`})
	s.addHeaders("Bearer "+strings.Repeat("token", 100), "abc")
	for text, want := range map[string]string{
		"":                              "",
		"nothing, abc":                  "nothing, abc",
		`the password p@ss "wörd"/? is`: "the password REDACTED is",
		`"p@ss \"wörd\"/?"`:             `"REDACTED"`,
		"password=p%40ss+%22w%C3%B6rd%22%2F%3F&x":    "password=REDACTED&x",
		"/p@ss%20%22w%C3%B6rd%22%2F%3F/":             "/REDACTED/",
		"Basic YWw6cEBzcyAid8O2cmQiLz8=":             "Basic REDACTED=",
		"Basic YWw6cEBzcyAid8O2cmQiLz8":              "Basic REDACTED",
		strings.Repeat("token", 100) + ".":           "REDACTED.",
		quote("bad " + strings.Repeat("token", 100)): `"bad REDACTED…"`,
		"tokent…, token…":                            "tokent…, token…",
	} {
		if got := s.redact(text); got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}

// TestEchoedSecretsAreNotTold: a registry may repeat in its answers what it was sent. Neither the error nor the log nor the
// explanation of a pull has it, and the steps of one have it neither.
func TestEchoedSecretsAreNotTold(t *testing.T) {
	const key = "key-of-the-file"
	long := strings.Repeat("abcdefghij", 60)
	basic := strings.TrimRight(strings.TrimPrefix(imagestest.Basic(user, secret), "Basic "), "=")
	for name, c := range map[string]struct {
		require func(*imagestest.Registry)
		auth    *Auth
	}{
		"password":       {func(r *imagestest.Registry) { r.RequireBasic(user, secret) }, &Auth{Username: user, Password: secret}},
		"access token":   {func(r *imagestest.Registry) { r.RequireToken("", user, secret) }, &Auth{Username: user, Password: secret}},
		"registry token": {func(r *imagestest.Registry) { r.RequireToken("", user, secret) }, &Auth{RegistryToken: long}},
		"none":           {func(r *imagestest.Registry) {}, nil},
	} {
		for _, status := range []int{401, 403, 418, 503} {
			t.Run(fmt.Sprintf("%s, %d", name, status), func(t *testing.T) {
				reg := imagestest.NewRegistry(t)
				reg.Push("a", "b", smallImage("x"))
				c.require(reg)
				echoed := false
				reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
					sent := r.Header.Get("Authorization")
					if r.URL.Path == "/token" || sent == "" && c.auth != nil {
						return false
					}
					echoed = true
					conn, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return true
					}
					defer conn.Close()
					fmt.Fprintf(conn, "HTTP/1.1 %d no %s, no %s, no %s\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n", status, r.Header.Get("X-Key"), secret, sent)
					return true
				})
				var out bytes.Buffer
				var mu sync.Mutex
				told := func(text string) {
					mu.Lock()
					defer mu.Unlock()
					out.WriteString(text + "\n")
				}
				s := openStore(t, certs(t, map[string]string{reg.Host(): fmt.Sprintf("server = %q\n[header]\nX-Key = %q\n", reg.URL, key)}), func(o *Options) {
					o.Log = slog.New(slog.NewTextHandler(writerFunc(told), &slog.HandlerOptions{Level: slog.LevelDebug}))
					o.Observe = func(e step.Event) { told(fmt.Sprint(e.Step, ": ", e.Err)) }
				})
				fast(s)
				_, err := s.Pull(context.Background(), reg.Host()+"/a:b", c.auth)
				if err == nil || !echoed {
					t.Fatalf("pulled, or nothing was echoed: %v", err)
				}
				told(err.Error())
				e, err := s.Explain(context.Background(), reg.Host()+"/a:b", c.auth)
				if err != nil {
					t.Fatal(err)
				}
				text, err := json.Marshal(e)
				if err != nil {
					t.Fatal(err)
				}
				told(string(text))
				if !strings.Contains(out.String(), "REDACTED") {
					t.Errorf("nothing was redacted:\n%s", out.String())
				}
				for _, bad := range []string{key, basic, imagestest.Token, long[:20]} {
					if strings.Contains(out.String(), bad) {
						t.Errorf("%s was told:\n%s", bad, out.String())
					}
				}
				if c.auth != nil && c.auth.Password != "" && strings.Contains(out.String(), secret) {
					t.Errorf("the password was told:\n%s", out.String())
				}
			})
		}
	}
}

type writerFunc func(string)

// Write implements io.Writer.
func (f writerFunc) Write(p []byte) (int, error) {
	f(string(p))
	return len(p), nil
}

// TestSignedURLsAreNotTold: what a registry redirects to opens doors by its query, also to who reads of a step that fails.
func TestSignedURLsAreNotTold(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, "http://127.0.0.1:1/blob?X-Amz-Signature="+secret, http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	var mu sync.Mutex
	var failed []string
	s := openStore(t, func(o *Options) {
		o.Observe = func(e step.Event) {
			if e.Err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, e.Err.Error())
			}
		}
	})
	fast(s)
	failed = append(failed, pullErr(t, s, reg.Host()+"/a:b", nil).Error())
	mu.Lock()
	defer mu.Unlock()
	for _, text := range failed {
		if strings.Contains(text, secret) || !strings.Contains(text, "127.0.0.1:1/blob?…") {
			t.Errorf("told: %s", text)
		}
	}
	if len(failed) < 2 {
		t.Errorf("no step has failed: %q", failed)
	}
}
