package images

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/berth-run/berth/images/imagestest"
)

const (
	user   = "alice"
	secret = "s3cr3t-pass"
)

// certs writes registry configuration: file contents by registry.
func certs(t *testing.T, hosts map[string]string) func(*Options) {
	t.Helper()
	dir := t.TempDir()
	for host, toml := range hosts {
		if err := os.Mkdir(filepath.Join(dir, host), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(toml), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return func(o *Options) { o.CertsD = dir }
}

func smallImage(text string) *imagestest.Image {
	return imagestest.NewImage(imagestest.Layer(imagestest.File("f", text)))
}

func pullErr(t *testing.T, s *Store, ref string, auth *Auth) error {
	t.Helper()
	img, err := s.Pull(context.Background(), ref, auth)
	if err == nil {
		t.Fatalf("pull of %s gave %+v, want an error", ref, img)
	}
	if strings.Contains(err.Error(), secret) {
		t.Errorf("the error has the secret: %v", err)
	}
	if imgs := s.Images(); len(imgs) != 0 {
		t.Errorf("images after a failed pull: %v", imgs)
	}
	return err
}

func TestBasicAndBearerAuthentication(t *testing.T) {
	basic := &Auth{Username: user, Password: secret}
	for name, c := range map[string]struct {
		require func(*imagestest.Registry)
		auth    *Auth
		ok      bool
	}{
		"basic":                    {func(r *imagestest.Registry) { r.RequireBasic(user, secret) }, basic, true},
		"basic, auth field":        {func(r *imagestest.Registry) { r.RequireBasic(user, secret) }, &Auth{Auth: strings.TrimPrefix(imagestest.Basic(user, secret), "Basic ")}, true},
		"basic, wrong":             {func(r *imagestest.Registry) { r.RequireBasic(user, "other") }, basic, false},
		"basic, none given":        {func(r *imagestest.Registry) { r.RequireBasic(user, secret) }, nil, false},
		"basic, for another host":  {func(r *imagestest.Registry) { r.RequireBasic(user, secret) }, &Auth{Username: user, Password: secret, ServerAddress: "other.example"}, false},
		"bearer":                   {func(r *imagestest.Registry) { r.RequireToken("", user, secret) }, basic, true},
		"bearer, wrong":            {func(r *imagestest.Registry) { r.RequireToken("", user, "other") }, basic, false},
		"bearer, identity token":   {func(r *imagestest.Registry) { r.RequireToken("", user, secret) }, &Auth{IdentityToken: secret}, true},
		"bearer, anonymous":        {anonymousTokens, nil, true},
		"bearer, registry token":   {func(r *imagestest.Registry) { r.RequireToken("", user, secret) }, &Auth{RegistryToken: imagestest.Token}, true},
		"bearer, bad registry tok": {func(r *imagestest.Registry) { r.RequireToken("", user, secret) }, &Auth{RegistryToken: secret}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", smallImage("x"))
			c.require(reg)
			if c.ok {
				if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", c.auth); err != nil {
					t.Error(err)
				}
				return
			}
			if err := pullErr(t, s, reg.Host()+"/a:b", c.auth); !errdefs.IsPermissionDenied(err) {
				t.Errorf("got %v, want ErrPermissionDenied", err)
			}
			if n := reg.Count("", ""); len(reg.Requests()) > 12 {
				t.Errorf("%d requests (%d): want it to give up soon", len(reg.Requests()), n)
			}
		})
	}
}

// anonymousTokens has a registry give a token to whoever says nothing about himself, as Docker Hub does.
func anonymousTokens(r *imagestest.Registry) {
	r.RequireToken("", user, secret)
	r.Hook(func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path != "/token" {
			return false
		}
		if req.Method != http.MethodGet || req.Header.Get("Authorization") != "" || req.URL.Query().Get("scope") == "" {
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		fmt.Fprintf(w, `{"token":%q}`, imagestest.Token)
		return true
	})
}

func TestBadCredentialsAreInvalidArgument(t *testing.T) {
	for _, a := range []*Auth{{Auth: "%%%"}, {Auth: "bm9jb2xvbg=="}} {
		if _, err := a.parse(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", a, err)
		}
	}
	if s := fmt.Sprintf("%v %s", credentials{secret: secret}, credentials{bearer: secret}); strings.Contains(s, secret) {
		t.Errorf("printed credentials have the secret: %s", s)
	}
}

// TestCVE_2020_15157_CredentialsToForeignRealm: a registry that names a token server elsewhere gets an anonymous token from
// it, at most; unless the node's configuration says that it is the registry's.
func TestCVE_2020_15157_CredentialsToForeignRealm(t *testing.T) {
	evil := imagestest.NewRegistry(t)
	evil.RequireBasic(user, secret) // its token server wants credentials
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	reg.RequireToken(evil.URL+"/token", user, secret)
	auth := &Auth{Username: user, Password: secret}

	s := openStore(t)
	err := pullErr(t, s, reg.Host()+"/a:b", auth)
	if evil.Saw(secret) || evil.Saw(imagestest.Basic(user, secret)) || evil.Saw(user) {
		t.Errorf("the foreign token server saw credentials: %+v", evil.Requests())
	}
	if len(evil.Requests()) == 0 {
		t.Error("no anonymous token was asked for")
	}
	if !strings.Contains(err.Error(), "token_hosts") || !errdefs.IsPermissionDenied(err) {
		t.Errorf("got %v, want ErrPermissionDenied and how to allow it", err)
	}

	s = openStore(t, certs(t, map[string]string{reg.Host(): fmt.Sprintf("server = %q\ntoken_hosts = [%q]\n", reg.URL, evil.URL)}))
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", auth); err != nil {
		t.Errorf("with token_hosts: %v", err)
	}
}

// TestCVE_2019_10214_CredentialsInTheClear: an https registry cannot have credentials, or a redirect, sent over http.
func TestCVE_2019_10214_CredentialsInTheClear(t *testing.T) {
	plain := imagestest.NewRegistry(t)
	plain.RequireBasic(user, secret)
	reg := imagestest.NewTLSRegistry(t)
	built := reg.Push("a", "b", smallImage("x"))
	for d, b := range built.Blobs {
		plain.PutBlob(d, b)
	}
	s := openStore(t, tlsCerts(t, reg, ""))
	auth := &Auth{Username: user, Password: secret}

	reg.RequireToken(plain.URL+"/token", user, secret)
	if err := pullErr(t, s, reg.Host()+"/a:b", auth); !errdefs.IsPermissionDenied(err) {
		t.Errorf("realm over http: %v", err)
	}
	reg.RequireBasic(user, secret)
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, plain.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	if err := pullErr(t, s, reg.Host()+"/a:b", auth); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "redirect") {
		t.Errorf("redirect from https to http: %v", err)
	}
	if len(plain.Requests()) != 0 {
		t.Errorf("the http server was asked: %+v", plain.Requests())
	}
}

// tlsCerts configures a registry's own certificate as its CA.
func tlsCerts(t *testing.T, reg *imagestest.Registry, more string) func(*Options) {
	t.Helper()
	ca := writeCA(t, reg, t.TempDir())
	return certs(t, map[string]string{reg.Host(): fmt.Sprintf("server = %q\nca = %q\n%s", reg.URL, ca, more)})
}

// writeCA writes a registry's own certificate into a directory, and returns the file's path.
func writeCA(t *testing.T, reg *imagestest.Registry, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTLSIsVerified(t *testing.T) {
	reg := imagestest.NewTLSRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	reg.RequireToken("", user, secret)
	s := openStore(t, certs(t, map[string]string{reg.Host(): fmt.Sprintf("server = %q\n", reg.URL)}))
	if err := pullErr(t, s, reg.Host()+"/a:b", nil); !errors.Is(err, ErrRegistryUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without its CA: %v", err)
	}
	s = openStore(t, tlsCerts(t, reg, ""))
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", &Auth{Username: user, Password: secret}); err != nil {
		t.Errorf("with its CA: %v", err)
	}
}

// TestRedirectedRequestsCarryNoSecrets: what goes to another host has neither Authorization nor headers of hosts.toml.
func TestRedirectedRequestsCarryNoSecrets(t *testing.T) {
	other := imagestest.NewRegistry(t)
	reg := imagestest.NewRegistry(t)
	built := reg.Push("a", "b", smallImage("x"))
	for d, b := range built.Blobs {
		other.PutBlob(d, b)
	}
	reg.RequireBasic(user, secret)
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Authorization") != "" {
			http.Redirect(w, r, other.URL+r.URL.Path+"?signature=abc", http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	s := openStore(t, certs(t, map[string]string{reg.Host(): fmt.Sprintf("server = %q\n[header]\nX-Api-Key = \"key-of-the-node\"\n", reg.URL)}))
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", &Auth{Username: user, Password: secret}); err != nil {
		t.Fatal(err)
	}
	if !reg.Saw("key-of-the-node") {
		t.Error("the registry did not see its own header")
	}
	if len(other.Requests()) == 0 || other.Saw("key-of-the-node") || other.Saw(imagestest.Basic(user, secret)) {
		t.Errorf("the other host saw %+v", other.Requests())
	}
}

func TestEndlessRedirects(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, r.URL.Path+"x", http.StatusFound)
		return true
	})
	if err := pullErr(t, openStore(t), reg.Host()+"/a:b", nil); !strings.Contains(err.Error(), "redirect refused") {
		t.Error(err)
	}
	if n := len(reg.Requests()); n > maxRedirects+2 {
		t.Errorf("%d requests", n)
	}
}

// TestEndlessAnswers: tokens, manifests and error pages without end are cut.
func TestEndlessAnswers(t *testing.T) {
	endless := func(w http.ResponseWriter, r *http.Request, status int) {
		if status != http.StatusOK {
			w.WriteHeader(status)
		}
		line := []byte(strings.Repeat("a", 32<<10))
		for range 4096 { // 128 MiB
			if _, err := w.Write(line); err != nil {
				return
			}
		}
	}
	for name, hook := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"token": func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/token" {
				return false
			}
			if _, err := io.WriteString(w, `{"token":"`); err == nil {
				endless(w, r, 200)
			}
			return true
		},
		"manifest without digest": func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") || r.Header.Get("Authorization") == "" {
				return false
			}
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			if r.Method == http.MethodHead {
				return true
			}
			endless(w, r, 200)
			return true
		},
		"error page": func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/manifests/") && r.Header.Get("Authorization") != "" {
				endless(w, r, 403)
				return true
			}
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", smallImage("x"))
			reg.RequireToken("", user, secret)
			reg.Hook(hook)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			err := pullErr(t, openStore(t), reg.Host()+"/a:b", &Auth{Username: user, Password: secret})
			runtime.ReadMemStats(&after)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 64<<20 {
				t.Errorf("allocated %d MiB", grown>>20)
			}
			if time.Since(start) > 5*time.Second {
				t.Errorf("took %v: %v", time.Since(start), err)
			}
			if len(err.Error()) > 4096 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
		})
	}
}

// TestContentEncodingIsNotObeyed: compressed answers are not unpacked, so cannot be bombs.
func TestContentEncodingIsNotObeyed(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	built := reg.Push("a", "b", smallImage("x"))
	reg.Push("a", "c", smallImage("y"))
	bomb := imagestest.Gzip(make([]byte, 64<<20))
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Accept-Encoding") != "identity" {
			t.Errorf("Accept-Encoding %q", r.Header.Get("Accept-Encoding"))
		}
		switch {
		case r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/manifests/"+string(built.Descriptor.Digest)):
			w.Header().Set("Content-Encoding", "gzip")
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			_, _ = w.Write(bomb)
			return true
		case strings.Contains(r.URL.Path, "/blobs/"):
			w.Header().Set("Content-Encoding", "gzip") // a store that labels what is gzip: its bytes are right
		}
		return false
	})
	s := openStore(t)
	_ = pullErr(t, s, reg.Host()+"/a:b", nil)
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:c", nil); err != nil {
		t.Errorf("labelled layer: %v", err)
	}
}

// TestWrongBytesAreNeverVisible: wrong digest, wrong size, cut off.
func TestWrongBytesAreNeverVisible(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"other bytes": func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"cut off":     func(b []byte) []byte { return b[:len(b)/2] },
		"longer":      func(b []byte) []byte { return append(b, "more"...) },
		"empty":       func([]byte) []byte { return nil },
	} {
		for _, what := range []string{"layer", "config", "manifest"} {
			t.Run(name+" "+what, func(t *testing.T) {
				reg := imagestest.NewRegistry(t)
				img := smallImage(strings.Repeat("x", 1000))
				built := reg.Push("a", "b", img)
				switch what {
				case "layer":
					d := digest.FromBytes(img.Layers[0].Blob)
					reg.PutBlob(d, change(append([]byte(nil), built.Blobs[d]...)))
				case "config":
					reg.PutBlob(built.ConfigID, change(append([]byte(nil), built.Blobs[built.ConfigID]...)))
				case "manifest":
					bad := change(append([]byte(nil), built.Manifest...))
					reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
						if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/manifests/") {
							return false
						}
						w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
						_, _ = w.Write(bad)
						return true
					})
				}
				s := openStore(t)
				_ = pullErr(t, s, reg.Host()+"/a:b", nil)
				if left := leftovers(t, s); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
			})
		}
	}
}

// leftovers are the layers, whatever is staged, and what lies among records, blobs and documents and belongs to nothing.
func leftovers(t *testing.T, s *Store) []string {
	t.Helper()
	var left []string
	s.mu.RLock()
	known := s.knownFiles()
	s.mu.RUnlock()
	for _, dir := range []string{tmpDir, layersDir, recordsDir, blobsDir} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if dir == tmpDir || dir == layersDir || !known[e.Name()] {
				left = append(left, dir+"/"+e.Name())
			}
		}
	}
	switch stray, err := s.strayDocs(&changes{}); {
	case errors.Is(err, berrors.ErrDatabaseNotOpen):
	case err != nil:
		t.Fatal(err)
	case stray:
		left = append(left, "documents of no image")
	}
	return left
}

func TestInterruptedDownloadIsResumed(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	img := imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(imagestest.File("f", strings.Repeat("0123456789", 50_000)))))
	blob := img.Layers[0].Blob
	reg.Push("a", "b", img)
	cut := 0
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, string(digest.FromBytes(blob))) && cut < 2 {
			cut++
			from := 0
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(blob)-1, len(blob)))
				w.Header().Set("Content-Length", strconv.Itoa(len(blob)-from))
				w.WriteHeader(http.StatusPartialContent)
			} else {
				w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
			}
			_, _ = w.Write(blob[from : from+100_000])
			panic(http.ErrAbortHandler)
		}
		return false
	})
	if _, err := openStore(t).Pull(context.Background(), reg.Host()+"/a:b", nil); err != nil || cut != 2 {
		t.Errorf("cut %d times: %v", cut, err)
	}
}

func TestMirrors(t *testing.T) {
	mirror, upstream := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	for _, r := range []*imagestest.Registry{mirror, upstream} {
		r.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "1")), imagestest.Layer(imagestest.File("f", "2")), imagestest.Layer(imagestest.File("f", "3"))))
	}
	config := certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.%q]\n", upstream.URL, mirror.URL)})
	pull := func(t *testing.T) error {
		_, err := openStore(t, config).Pull(context.Background(), "registry.example/a:b", &Auth{Username: user, Password: secret})
		return err
	}
	t.Run("is asked first, without credentials", func(t *testing.T) {
		upstream.RequireBasic(user, secret)
		defer upstream.RequireBasic("", "")
		if err := pull(t); err != nil {
			t.Fatal(err)
		}
		if len(upstream.Requests()) != 0 {
			t.Errorf("upstream was asked: %+v", upstream.Requests())
		}
	})
	t.Run("that wants credentials does not get them", func(t *testing.T) {
		mirror.RequireBasic(user, secret)
		upstream.RequireBasic(user, secret)
		defer mirror.RequireBasic("", "")
		defer upstream.RequireBasic("", "")
		if err := pull(t); err != nil {
			t.Fatal(err)
		}
		if mirror.Saw(imagestest.Basic(user, secret)) {
			t.Error("the mirror saw the registry's credentials")
		}
		if !upstream.Saw(imagestest.Basic(user, secret)) {
			t.Error("the registry did not see its credentials")
		}
	})
	t.Run("that fails is left out for the rest of the pull", func(t *testing.T) {
		before := len(mirror.Requests())
		mirror.Hook(func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusBadGateway)
			return true
		})
		defer mirror.Hook(nil)
		if err := pull(t); err != nil {
			t.Fatal(err)
		}
		if n := len(mirror.Requests()) - before; n > 2 {
			t.Errorf("the mirror was asked %d times", n)
		}
	})
	t.Run("with wrong bytes is replaced by the next", func(t *testing.T) {
		mirror.Hook(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				_, _ = io.WriteString(w, "not that")
				return true
			}
			return false
		})
		defer mirror.Hook(nil)
		if err := pull(t); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("with 429 is not waited for", func(t *testing.T) {
		mirror.Hook(func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Retry-After", "30")
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		})
		defer mirror.Hook(nil)
		start := time.Now()
		if err := pull(t); err != nil || time.Since(start) > 5*time.Second {
			t.Fatalf("%v after %v", err, time.Since(start))
		}
	})
}

func TestRetryAfterIsWaitedFor(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	var first time.Time
	n := 0
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if n++; n == 1 {
			first = time.Now()
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}
		if n == 2 && time.Since(first) < 900*time.Millisecond {
			t.Errorf("asked again after %v", time.Since(first))
		}
		return false
	})
	if _, err := openStore(t).Pull(context.Background(), reg.Host()+"/a:b", nil); err != nil {
		t.Error(err)
	}
	p := pace{RetryAfter: time.Minute, BackOff: time.Second}
	for header, want := range map[string]time.Duration{"": 2 * time.Second, "30": 30 * time.Second, "99999999999999": time.Minute, "-1": 2 * time.Second, "x": 2 * time.Second, "Thu, 01 Jan 1970 00:00:00 GMT": 0} {
		if got := p.retryAfter(http.Header{"Retry-After": {header}}, 2); got < want || got > want+want/4 {
			t.Errorf("%q: %v, want %v", header, got, want)
		}
	}
}

// TestContainerd11650_StuckDownloadEnds: bytes that trickle in do not count as progress (containerd#11650), nor does silence.
func TestContainerd11650_StuckDownloadEnds(t *testing.T) {
	for name, each := range map[string]string{"trickle": "x", "silence": ""} {
		t.Run(name, func(t *testing.T) {
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", smallImage(strings.Repeat("x", 100_000)))
			done := make(chan struct{})
			defer close(done)
			reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/blobs/") {
					return false
				}
				w.Header().Set("Content-Length", "1000000")
				w.WriteHeader(http.StatusOK)
				for {
					_, _ = io.WriteString(w, each)
					if err := http.NewResponseController(w).Flush(); err != nil {
						return true
					}
					select {
					case <-done:
						return true
					case <-r.Context().Done():
						return true
					case <-time.After(20 * time.Millisecond):
					}
				}
			})
			s := openStore(t)
			s.pace = pace{Window: 200 * time.Millisecond, Floor: 1000, RetryAfter: time.Second}
			start := time.Now()
			err := pullErr(t, s, reg.Host()+"/a:b", nil)
			if !errors.Is(err, ErrRegistryUnavailable) || time.Since(start) > 5*time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
		})
	}
}

// TestMinimumRate: what brings less than a third of the default is given up, and what brings more is not. The setting is named.
func TestMinimumRate(t *testing.T) {
	const scale = 100 // of window and bytes, so that nobody waits half a minute
	reg := imagestest.NewRegistry(t)
	img := imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(imagestest.File("f", strings.Repeat("x", 9_000)))))
	blob := img.Layers[0].Blob
	reg.Push("a", "b", img)
	for _, c := range []struct {
		name    string
		rate    int64 // of the setting
		percent int64 // that come of the default
		ok      bool
	}{
		{"a third", 0, 33, false}, {"three times as much", 0, 300, true}, {"a third, where less is asked for", DefaultMinPullRate / 10, 33, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := openStore(t, func(o *Options) { o.MinPullRate = c.rate })
			s.pace.Window /= scale
			s.pace.Floor /= scale
			s.pace.BackOff = time.Millisecond
			reg.Hook(blobsOf(img.Layers, func(w http.ResponseWriter, r *http.Request) {
				var from int
				if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(blob)-1, len(blob)))
					w.WriteHeader(http.StatusPartialContent)
				}
				const pause = 10 * time.Millisecond
				for chunk := range slices.Chunk(blob[from:], int(DefaultMinPullRate*c.percent/100/int64(time.Second/pause))) {
					if _, err := w.Write(chunk); err != nil {
						return
					}
					_ = http.NewResponseController(w).Flush()
					time.Sleep(pause)
				}
			}))
			_, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil)
			if c.ok && err != nil || !c.ok && (!errors.Is(err, ErrRegistryUnavailable) || !strings.Contains(err.Error(), "minPullRate")) {
				t.Errorf("got %v", err)
			}
		})
	}
	if p := paceOf(DefaultMinPullRate); p.Window != 30*time.Second || p.Floor < 100<<10 || p.Floor > 3<<20 {
		t.Errorf("by default %d bytes in %v; want it to be kilobytes a second, and less than a slow line has", p.Floor, p.Window)
	}
}

func TestOddButHonestRegistries(t *testing.T) {
	for name, hook := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"no HEAD": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodHead {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return true
			}
			return false
		},
		"generic media type": func(w http.ResponseWriter, r *http.Request) bool {
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			reg := imagestest.NewRegistry(t)
			built := reg.Push("a", "b", smallImage("x"))
			if name == "generic media type" {
				reg.PutManifest("a", "b", built.Manifest, "application/json", built.Descriptor.Digest)
			}
			reg.Hook(hook)
			if _, err := openStore(t).Pull(context.Background(), reg.Host()+"/a:b", nil); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestForeignLayerURLsAreNotFetched: an image could have this node ask any address that it reaches.
func TestForeignLayerURLsAreNotFetched(t *testing.T) {
	other, reg := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	img := smallImage("x")
	img.Layers[0].MediaType = ociForeign + "+gzip"
	img.Layers[0].Descriptor = func(d *ocispec.Descriptor) { d.URLs = []string{other.URL + "/latest/meta-data"} }
	reg.Push("a", "b", img)
	if _, err := openStore(t).Pull(context.Background(), reg.Host()+"/a:b", nil); err != nil {
		t.Error(err)
	}
	if n := len(other.Requests()); n != 0 {
		t.Errorf("%d requests to the layer's URL", n)
	}
}

func TestUnreachableRegistries(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	broken := imagestest.NewRegistry(t)
	broken.Hook(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	aborting := imagestest.NewRegistry(t)
	aborting.Hook(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
	for name, host := range map[string]string{"refused": closed, "503": broken.Host(), "no such name": "does-not-exist.invalid", "hangs up": aborting.Host()} {
		t.Run(name, func(t *testing.T) {
			err := pullErr(t, openStore(t), host+"/a:b", nil)
			if !errors.Is(err, ErrRegistryUnavailable) || !strings.HasPrefix(err.Error(), "RegistryUnavailable: ") {
				t.Errorf("got %v", err)
			}
			if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
				t.Errorf("%v looks like the caller's context", err)
			}
		})
	}
}

func TestUnknownImagesAreNotFound(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	img := smallImage("x")
	img.Config.OS, img.Config.Architecture = "plan9", "mips"
	built := reg.Push("a", "plan9", img)
	desc := built.Descriptor
	desc.Platform = &ocispec.Platform{OS: "plan9", Architecture: "mips"}
	reg.PushIndex("a", "index", desc)
	s := openStore(t)
	for ref, text := range map[string]string{"/a:none": "not found", "/none:b": "not found", "/a@sha256:" + someHex: "not found", "/a:plan9": "plan9/mips", "/a:index": "plan9/mips"} {
		if err := pullErr(t, s, reg.Host()+ref, nil); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v", ref, err)
		}
	}
	if _, err := s.Pull(context.Background(), "A B", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad reference: %v", err)
	}
}

func TestIndexesByPlatform(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	mine := reg.Push("a", "", smallImage("mine"))
	other := smallImage("other")
	other.Config.Architecture = "mips64le"
	theirs := reg.Push("a", "", other)
	attestation := mine.Descriptor
	attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	inner := reg.PushIndex("a", "", attestation, theirs.Descriptor, mine.Descriptor)
	outer := reg.PushIndex("a", "nested", inner)
	s := openStore(t)
	img, err := s.Pull(context.Background(), reg.Host()+"/a:nested", nil)
	if err != nil || img.ID != mine.ConfigID {
		t.Fatalf("got %+v, %v; want %s", img, err, mine.ConfigID)
	}
	if want := reg.Host() + "/a@" + outer.Digest.String(); len(img.RepoDigests) != 1 || img.RepoDigests[0] != want {
		t.Errorf("digests %v, want that of the index, %s", img.RepoDigests, want)
	}
	deep := theirs.Descriptor
	for range maxIndexDepth + 2 {
		deep = reg.PushIndex("a", "deep", deep)
	}
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:deep", nil); !errdefs.IsResourceExhausted(err) {
		t.Errorf("nested too deep: %v", err)
	}
}

// TestWideIndexes: so many documents are fetched at most, and so many names read, of all indexes together.
func TestWideIndexes(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	foreign := func(i int) ocispec.Descriptor {
		img := smallImage(fmt.Sprint(i))
		img.Config.Architecture = "mips64le"
		desc := reg.Push("a", "", img).Descriptor
		desc.Platform = nil // so that each has to be looked at
		return desc
	}
	var wide []ocispec.Descriptor
	for i := range maxDocuments + 8 {
		wide = append(wide, foreign(i))
	}
	reg.PushIndex("a", "wide", wide...)
	named := wide[0]
	named.Platform = &ocispec.Platform{OS: "linux", Architecture: "mips64le"}
	var inner []ocispec.Descriptor
	for i := range 3 {
		inner = append(inner, reg.PushIndex("a", "", slices.Repeat([]ocispec.Descriptor{named}, 4*maxReferences/10+i)...))
	}
	reg.PushIndex("a", "names", inner...)
	for ref, said := range map[string]string{"wide": "more than 32 indexes and manifests", "names": "more than 10000 manifests"} {
		before := len(reg.Requests())
		if err := pullErr(t, openStore(t), reg.Host()+"/a:"+ref, nil); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), said) {
			t.Errorf("%s: got %v, want it to say %q", ref, err, said)
		}
		if n := len(reg.Requests()) - before; n > 2*maxDocuments+1 {
			t.Errorf("%s: %d requests", ref, n)
		}
	}
}

// TestHostsFileMistakesAreSaid: containerd ignores a file that it cannot read, and pulls from elsewhere.
func TestHostsFileMistakesAreSaid(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	s := openStore(t, certs(t, map[string]string{reg.Host(): "server = \"" + reg.URL + "\"\n[host.\nx"}))
	err := pullErr(t, s, reg.Host()+"/a:b", nil)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "hosts.toml: line 2") {
		t.Errorf("got %v", err)
	}
	if n := len(reg.Requests()); n != 0 {
		t.Errorf("%d requests", n)
	}
}

// TestCVE_2021_20291_ReadersOfAbortedPulls: no goroutine, connection or file stays behind a pull that breaks off.
func TestCVE_2021_20291_ReadersOfAbortedPulls(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	img := smallImage(strings.Repeat("x", 10_000))
	built := reg.Push("a", "b", img)
	d := digest.FromBytes(img.Layers[0].Blob)
	reg.PutBlob(d, built.Blobs[d][:20])
	s := openStore(t)
	_ = pullErr(t, s, reg.Host()+"/a:b", nil)
	time.Sleep(100 * time.Millisecond)
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	for range 200 {
		_ = pullErr(t, s, reg.Host()+"/a:b", nil)
	}
	for range 100 {
		if runtime.NumGoroutine() <= goroutines+5 && openFiles(t) <= files+5 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("goroutines %d, were %d; files %d, were %d", runtime.NumGoroutine(), goroutines, openFiles(t), files)
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
