package images

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-run/berth/images/imagestest"
)

// hostileRegistry is something that a registry does wrong. The image that it holds has one layer, of 300,000 bytes, plain.
type hostileRegistry struct {
	name string
	// answer gives the registry's answer to a request, or returns false for the right one.
	answer func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool
	// setup is done before.
	setup func(h *hostileCase)
	// is says which class an error must have; nil: the pull has to end well.
	is   func(error) bool
	text []string
	auth *Auth
	// most is how many requests may be made; 0 for 60.
	most int
}

type hostileCase struct {
	t     *testing.T
	reg   *imagestest.Registry
	built *imagestest.Built
	layer []byte
	digest.Digest
	asked atomic.Int32 // for what the answer is about
	done  chan struct{}
}

func isUnavailable(err error) bool { return errors.Is(err, ErrRegistryUnavailable) }

// layerOf narrows an answer to requests for the layer.
func layerOf(answer func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool) func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
	return func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+h.Digest.String()) {
			return false
		}
		h.asked.Add(1)
		return answer(h, w, r)
	}
}

func manifestOf(method string, answer func(h *hostileCase, w http.ResponseWriter)) func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
	return func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/manifests/") || method != "" && r.Method != method {
			return false
		}
		h.asked.Add(1)
		answer(h, w)
		return true
	}
}

// always gives one status to everything.
func always(status int, headers ...string) func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
	return func(_ *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
		return true
	}
}

// ranged answers a range as it should be answered, with other bytes if need be.
func ranged(w http.ResponseWriter, r *http.Request, data []byte, most int) {
	from := 0
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(data)-1, len(data)))
		w.Header().Set("Content-Length", strconv.Itoa(len(data)-from))
		w.WriteHeader(http.StatusPartialContent)
	} else {
		w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	}
	to := min(len(data), from+most)
	_, _ = w.Write(data[from:to])
	if to < len(data) {
		panic(http.ErrAbortHandler)
	}
}

// hang waits until the client gives up.
func (h *hostileCase) hang(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-h.done:
	}
}

// endless writes until the client gives up, 256 MiB at most.
func endless(w io.Writer) {
	block := []byte(strings.Repeat("a", 64<<10))
	for range 4096 {
		if _, err := w.Write(block); err != nil {
			return
		}
	}
}

// gzipBomb is 64 MiB of zeros in 64 KiB.
var gzipBomb = sync.OnceValue(func() []byte { return imagestest.Gzip(make([]byte, 64<<20)) })

const layerText = "layer 1 of 1"

var hostileRegistries = []hostileRegistry{
	{name: "layer cut once", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if h.asked.Load() == 1 {
			ranged(w, r, h.layer, 100_000)
		}
		return false
	})},
	{name: "layer cut each 30,000 bytes", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		ranged(w, r, h.layer, 30_000)
		return true
	})},
	{name: "range ignored after a cut", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if h.asked.Load() == 1 {
			ranged(w, r, h.layer, 100_000)
		}
		r.Header.Del("Range")
		ranged(w, r, h.layer, len(h.layer))
		return true
	})},
	{name: "another range than asked for", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if h.asked.Load() == 1 {
			ranged(w, r, h.layer, 100_000)
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 7-%d/%d", len(h.layer)-1, len(h.layer)))
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(h.layer[7:])
		return true
	}), is: func(err error) bool { return err != nil }, text: []string{layerText}},
	{name: "a range without being asked", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 7-%d/%d", len(h.layer)-1, len(h.layer)))
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(h.layer[7:])
		return true
	}), is: func(err error) bool { return err != nil }, text: []string{layerText}},
	{name: "no Content-Range", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if h.asked.Load() == 1 {
			ranged(w, r, h.layer, 100_000)
		}
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(h.layer[100_000:])
		return true
	}), is: func(err error) bool { return err != nil }, text: []string{layerText}},
	{name: "blob shrinks after a cut", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if h.asked.Load() == 1 {
			ranged(w, r, h.layer, 100_000)
		}
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return true
	}), is: func(err error) bool { return err != nil }, text: []string{layerText}},
	{name: "blob changes after a cut", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if h.asked.Load() == 1 {
			ranged(w, r, h.layer, 100_000)
		}
		ranged(w, r, []byte(strings.Repeat("another", len(h.layer))[:len(h.layer)]), len(h.layer))
		return true
	}), is: errdefs.IsDataLoss, text: []string{layerText}},
	{name: "no Content-Length", answer: func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		data := h.built.Blobs[digest.Digest(filepath.Base(r.URL.Path))]
		_, _ = w.Write(data[:len(data)/2])
		_ = http.NewResponseController(w).Flush()
		_, _ = w.Write(data[len(data)/2:])
		return true
	}},
	{name: "layer is endless", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		_, _ = w.Write(h.layer)
		endless(w)
		return true
	}), is: errdefs.IsDataLoss, text: []string{layerText}},
	{name: "layer says another length", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Length", strconv.Itoa(len(h.layer)+1))
		_, _ = w.Write(append(append([]byte(nil), h.layer...), 'x'))
		return true
	}), is: errdefs.IsDataLoss, text: []string{layerText}},
	{name: "layer ends early, orderly", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		_, _ = w.Write(h.layer[:1000])
		return true
	}), is: func(err error) bool { return errdefs.IsDataLoss(err) || isUnavailable(err) }, text: []string{layerText}},
	{name: "layer is an HTML page", answer: layerOf(func(_ *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		_, _ = io.WriteString(w, "<html>please log in</html>")
		return true
	}), is: func(err error) bool { return errdefs.IsDataLoss(err) || isUnavailable(err) }, text: []string{layerText}},
	{name: "layer is not there", answer: layerOf(always(http.StatusNotFound)), is: errdefs.IsNotFound, text: []string{layerText}},
	{name: "layer is forbidden", answer: layerOf(always(http.StatusForbidden)), is: errdefs.IsPermissionDenied, text: []string{layerText}},
	{name: "layer: 500 for ever", answer: layerOf(always(http.StatusInternalServerError)), is: isUnavailable, text: []string{layerText, "500"}},
	{name: "layer: 429 for ever", answer: layerOf(always(http.StatusTooManyRequests, "Retry-After", "0")), is: isUnavailable, text: []string{layerText, "429"}},
	{name: "layer: 418", answer: layerOf(always(http.StatusTeapot)), is: func(err error) bool { return err != nil }, text: []string{layerText, "418"}},
	{name: "layer: 500 twice", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		if h.asked.Load() > 2 {
			return false
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})},
	{name: "layer: 204", answer: layerOf(always(http.StatusNoContent)), is: func(err error) bool { return err != nil }, text: []string{layerText}},
	{name: "layer never begins", answer: layerOf(func(h *hostileCase, _ http.ResponseWriter, r *http.Request) bool {
		h.hang(r)
		return true
	}), is: isUnavailable, text: []string{layerText, "timeout awaiting response"}},
	{name: "manifest never begins", answer: func(h *hostileCase, _ http.ResponseWriter, r *http.Request) bool {
		h.hang(r)
		return true
	}, is: isUnavailable, text: []string{"timeout awaiting response"}},
	{name: "layer stops in the middle", answer: layerOf(func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", strconv.Itoa(len(h.layer)))
		_, _ = w.Write(h.layer[:1000])
		_ = http.NewResponseController(w).Flush()
		h.hang(r)
		return true
	}), is: isUnavailable, text: []string{layerText, "slow"}},

	{name: "HEAD is not allowed", answer: manifestOf(http.MethodHead, func(_ *hostileCase, w http.ResponseWriter) { w.WriteHeader(http.StatusMethodNotAllowed) })},
	{name: "HEAD says another digest than the body", answer: manifestOf(http.MethodHead, func(h *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", digest.FromString("another").String())
		w.Header().Set("Content-Length", strconv.Itoa(len(h.built.Manifest)))
	}), is: func(err error) bool { return errdefs.IsNotFound(err) || errdefs.IsDataLoss(err) }, text: []string{"manifest"}},
	{name: "manifest is not what its digest says", answer: manifestOf(http.MethodGet, func(h *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		_, _ = w.Write([]byte(strings.Repeat("x", len(h.built.Manifest))))
	}), is: errdefs.IsDataLoss, text: []string{"manifest sha256:"}},
	{name: "digest is a path", answer: manifestOf("", func(h *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", "../../../../etc/passwd")
		_, _ = w.Write(h.built.Manifest)
	}), is: func(err error) bool { return err != nil }},
	{name: "manifest without a digest, endless", answer: manifestOf("", func(_ *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		endless(w)
	}), is: errdefs.IsFailedPrecondition, text: []string{"too long"}},
	{name: "manifest of a terabyte, by its header", answer: manifestOf(http.MethodHead, func(h *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", h.built.Descriptor.Digest.String())
		w.Header().Set("Content-Length", "1000000000000")
	}), is: errdefs.IsFailedPrecondition, text: []string{"too long", "1000000000000"}},
	{name: "manifest is an HTML page", answer: manifestOf("", func(_ *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>please log in</html>")
	}), is: errdefs.IsFailedPrecondition, text: []string{"manifest"}},
	{name: "schema 1", answer: manifestOf("", func(_ *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", dockerSchema1Sig)
		_, _ = io.WriteString(w, `{"schemaVersion":1,"name":"a","tag":"b","fsLayers":[]}`)
	}), is: errdefs.IsFailedPrecondition, text: []string{"schema 1", "push it again"}},
	{name: "Content-Encoding bomb", answer: manifestOf(http.MethodGet, func(_ *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(gzipBomb())
	}), is: func(err error) bool { return errdefs.IsDataLoss(err) || isUnavailable(err) }, text: []string{"manifest sha256:"}},
	{name: "error page without end", answer: manifestOf("", func(_ *hostileCase, w http.ResponseWriter) {
		w.WriteHeader(http.StatusForbidden)
		endless(w)
	}), is: errdefs.IsPermissionDenied},
	{name: "error with control characters", answer: manifestOf("", func(_ *hostileCase, w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"errors":[{"code":"DENIED","message":"\u001b[2J\nlevel=ERROR msg=lie"}]}`)
	}), is: func(err error) bool { return err != nil }},
	{name: "redirects in a circle", answer: layerOf(func(_ *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		return true
	}), is: errdefs.IsFailedPrecondition, text: []string{layerText, "redirect refused"}, most: 20},
	{name: "redirect to a file", answer: layerOf(func(_ *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Location", "file:///etc/passwd")
		w.WriteHeader(http.StatusTemporaryRedirect)
		return true
	}), is: func(err error) bool { return err != nil }, text: []string{layerText}},
	{name: "redirect without a place", answer: layerOf(always(http.StatusTemporaryRedirect)), is: func(err error) bool { return err != nil }, text: []string{layerText}},
	{name: "redirect to nobody", answer: layerOf(func(_ *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, "http://127.0.0.1:1/?X-Amz-Signature="+secret, http.StatusTemporaryRedirect)
		return true
	}), is: isUnavailable, text: []string{layerText, "127.0.0.1:1"}},

	{name: "401 for ever, basic", answer: always(http.StatusUnauthorized, "WWW-Authenticate", `Basic realm="x"`), auth: &Auth{Username: user, Password: secret}, is: errdefs.IsPermissionDenied, most: 8},
	{name: "401 for ever, bearer", setup: func(h *hostileCase) { h.reg.RequireToken("", user, secret) }, answer: func(h *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x",scope="repository:a:pull"`, h.reg.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}, auth: &Auth{Username: user, Password: secret}, is: errdefs.IsPermissionDenied, most: 12},
	{name: "401 without a challenge", answer: always(http.StatusUnauthorized), is: errdefs.IsPermissionDenied, most: 8},
	{name: "401 with a challenge of 60 KB", answer: always(http.StatusUnauthorized, "WWW-Authenticate", `Bearer realm="`+strings.Repeat("x", 60<<10)), is: errdefs.IsPermissionDenied, most: 8},
	{name: "token without end", setup: func(h *hostileCase) { h.reg.RequireToken("", user, secret) }, answer: func(_ *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/token" {
			return false
		}
		if _, err := io.WriteString(w, `{"token":"`); err == nil {
			endless(w)
		}
		return true
	}, auth: &Auth{Username: user, Password: secret}, is: errdefs.IsFailedPrecondition, text: []string{"too long"}},
	{name: "token is none", setup: func(h *hostileCase) { h.reg.RequireToken("", user, secret) }, answer: func(_ *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			_, _ = io.WriteString(w, `{}`)
		}
		return r.URL.Path == "/token"
	}, auth: &Auth{Username: user, Password: secret}, is: func(err error) bool { return err != nil }, text: []string{"token"}},
	{name: "token server redirects elsewhere", setup: func(h *hostileCase) { h.reg.RequireToken("", user, secret) }, answer: func(_ *hostileCase, w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			http.Redirect(w, r, "http://127.0.0.1:1/token", http.StatusTemporaryRedirect)
		}
		return r.URL.Path == "/token"
	}, auth: &Auth{Username: user, Password: secret}, is: errdefs.IsFailedPrecondition, text: []string{"redirect refused"}},

	{name: "not HTTP", answer: func(_ *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			_, _ = io.WriteString(conn, "SSH-2.0-OpenSSH_9.9\r\n")
			_ = conn.Close()
		}
		return true
	}, is: isUnavailable},
	{name: "headers without end", answer: func(_ *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\nX: "); err == nil {
				endless(conn)
			}
			_ = conn.Close()
		}
		return true
	}, is: isUnavailable},
	{name: "informational answers without end", answer: func(_ *hostileCase, w http.ResponseWriter, _ *http.Request) bool {
		for range 1000 {
			w.WriteHeader(http.StatusEarlyHints)
		}
		panic(http.ErrAbortHandler)
	}, is: isUnavailable},
	{name: "hangs up", answer: func(*hostileCase, http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }, is: isUnavailable},
}

// TestHostileRegistries: whatever a registry does, a pull ends, right or with an error that says what is wrong, and where;
// no part of an image stays, and the next pull from it, when it is itself again, works.
func TestHostileRegistries(t *testing.T) {
	for _, c := range hostileRegistries {
		t.Run(c.name, func(t *testing.T) {
			content := make([]byte, 0, 300_000)
			for i := 0; len(content) < 300_000; i++ {
				content = fmt.Appendf(content, "line %d of the layer\n", i)
			}
			img := imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(imagestest.File("f", string(content)))))
			h := &hostileCase{t: t, reg: imagestest.NewRegistry(t), layer: img.Layers[0].Blob, done: make(chan struct{})}
			defer close(h.done)
			h.Digest = img.Layers[0].DiffID
			h.built = h.reg.Push("team/app", "v1", img)
			if c.setup != nil {
				c.setup(h)
			}
			h.reg.Hook(func(w http.ResponseWriter, r *http.Request) bool { return c.answer(h, w, r) })
			s := openStore(t)
			fast(s)
			ref := h.reg.Host() + "/team/app:v1"
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			_, err := s.Pull(ctx, ref, c.auth)
			checkOutcome(t, s, err, c.is, append(c.text, ref))
			if most := max(c.most, 60*min(1, 60-c.most)); len(h.reg.Requests()) > most {
				t.Errorf("%d requests were made, %d are enough", len(h.reg.Requests()), most)
			}
			h.reg.Hook(nil)
			if img, err := s.Pull(ctx, ref, &Auth{Username: user, Password: secret}); err != nil || img.ID != h.built.ConfigID {
				t.Errorf("when the registry is itself again: %+v, %v", img, err)
			}
		})
	}
}

// fast has a store wait less for registries than a node does.
func fast(s *Store) {
	s.pace.Window, s.pace.Floor, s.pace.RetryAfter = 500*time.Millisecond, 1000, time.Second
}

// checkOutcome checks the end of a pull: of the only image when is is nil, or an error of that class and with these texts.
func checkOutcome(t *testing.T, s *Store, err error, is func(error) bool, text []string) {
	t.Helper()
	if is == nil {
		if err != nil {
			t.Errorf("got %v, want the image", err)
		}
		return
	}
	if err == nil || !is(err) {
		t.Errorf("got %v, want another class", err)
		return
	}
	if errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("only the deadline ended it: %v", err)
	}
	for _, part := range text {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is not in: %v", part, err)
		}
	}
	if strings.Contains(err.Error(), secret) || strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > 4096 {
		t.Errorf("the error has a secret, control characters, or %d bytes: %q", len(err.Error()), err)
	}
	if imgs := s.Images(); len(imgs) != 0 {
		t.Errorf("images after a failed pull: %v", imgs)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestMirrorsThatMisbehave: a mirror's fault is made good by the next host, and where there is none, it is the mirror that
// the error names.
func TestMirrorsThatMisbehave(t *testing.T) {
	for _, name := range []string{
		"another range than asked for", "blob changes after a cut", "layer is endless", "layer is an HTML page", "layer is not there", "layer: 500 for ever",
		"layer: 429 for ever", "layer never begins", "manifest never begins", "layer stops in the middle", "manifest is not what its digest says",
		"redirect to nobody", "401 for ever, basic", "hangs up", "not HTTP",
	} {
		i := -1
		for j, c := range hostileRegistries {
			if c.name == name {
				i = j
			}
		}
		if i < 0 {
			t.Fatalf("no behaviour %q", name)
		}
		c := hostileRegistries[i]
		t.Run(name, func(t *testing.T) {
			img := imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(imagestest.File("f", strings.Repeat("0123456789", 30_000)))))
			mirror, upstream := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
			h := &hostileCase{t: t, reg: mirror, layer: img.Layers[0].Blob, done: make(chan struct{}), Digest: img.Layers[0].DiffID}
			defer close(h.done)
			h.built = mirror.Push("team/app", "v1", img)
			upstream.Push("team/app", "v1", img)
			mirror.Hook(func(w http.ResponseWriter, r *http.Request) bool { return c.answer(h, w, r) })
			s := openStore(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.%q]\n", upstream.URL, mirror.URL)}))
			fast(s)
			got, err := s.Pull(context.Background(), "registry.example/team/app:v1", nil)
			if err != nil || got.ID != h.built.ConfigID {
				t.Errorf("from the registry behind it: %+v, %v", got, err)
			}
			if err := s.Remove(context.Background(), string(h.built.ConfigID)); err != nil {
				t.Error(err)
			}
			upstream.Close()
			_, err = s.Pull(context.Background(), "registry.example/team/app:v1", nil)
			checkOutcome(t, s, err, func(err error) bool { return err != nil }, []string{"registry.example/team/app:v1", mirror.Host() + ": ", upstream.Host() + ": "})
		})
	}
}

// TestHostileTLS: certificates of nobody and for another name, and protocols of the last century.
func TestHostileTLS(t *testing.T) {
	for name, c := range map[string]struct {
		trusted    bool
		host       string // instead of the address, which the certificate has
		maxVersion uint16
		text       string
	}{
		"unknown authority": {text: "certificate"},
		"another name":      {trusted: true, host: "localhost", text: "certificate"},
		"old protocol":      {trusted: true, maxVersion: tls.VersionTLS11, text: "protocol version"},
	} {
		t.Run(name, func(t *testing.T) {
			reg := imagestest.NewTLSRegistry(t)
			reg.Push("a", "b", smallImage("x"))
			reg.TLS.MaxVersion = c.maxVersion
			_, port, err := net.SplitHostPort(reg.Host())
			if err != nil {
				t.Fatal(err)
			}
			host := net.JoinHostPort(cmp.Or(c.host, "127.0.0.1"), port)
			toml := fmt.Sprintf("server = \"https://%s\"\n", host)
			if c.trusted {
				toml += fmt.Sprintf("ca = %q\n", writeCA(t, reg, t.TempDir()))
			}
			s := openStore(t, certs(t, map[string]string{host: toml}))
			fast(s)
			_, err = s.Pull(context.Background(), host+"/a:b", nil)
			checkOutcome(t, s, err, isUnavailable, []string{c.text, host + "/a:b"})
		})
	}
}
