package imagestest

import (
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Registry is a registry in process. It answers as the distribution specification says, unless told otherwise.
type Registry struct {
	*httptest.Server

	mu        sync.Mutex
	blobs     map[digest.Digest][]byte
	manifests map[string]stored // "repo:tag" or "repo@digest"
	requests  []Request
	hook      func(http.ResponseWriter, *http.Request) bool
	user      string
	secret    string
	realm     string // "" for basic
}

type stored struct {
	data      []byte
	mediaType string
}

// Request is one that the registry saw.
type Request struct {
	Method, Host, Path, Query string
	Header                    http.Header
	Body                      string
}

// Token is what the registry's own token server gives out.
const Token = "token-of-imagestest"

// NewRegistry starts a registry on plain http, on a loopback address.
func NewRegistry(t testing.TB) *Registry { return start(t, (*httptest.Server).Start) }

// NewTLSRegistry starts one on https.
func NewTLSRegistry(t testing.TB) *Registry { return start(t, (*httptest.Server).StartTLS) }

// NewRegistryOn starts one after configure has set the server's listener or its TLS, which decides between http and https.
func NewRegistryOn(t testing.TB, configure func(*httptest.Server)) *Registry {
	return start(t, func(s *httptest.Server) {
		if configure(s); s.TLS != nil {
			s.StartTLS()
		} else {
			s.Start()
		}
	})
}

func start(t testing.TB, how func(*httptest.Server)) *Registry {
	r := &Registry{blobs: map[digest.Digest][]byte{}, manifests: map[string]stored{}}
	r.Server = httptest.NewUnstartedServer(r)
	r.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that break off are what tests are about
	how(r.Server)
	t.Cleanup(func() {
		r.CloseClientConnections()
		r.Close()
	})
	return r
}

// Host is its address, as it stands in references.
func (r *Registry) Host() string { return r.Listener.Addr().String() }

// Push puts an image into a repository, under a tag if it has one, and returns it built.
func (r *Registry) Push(repo, tag string, img *Image) *Built {
	b := img.Build()
	r.PutManifest(repo, tag, b.Manifest, b.Descriptor.MediaType, b.Descriptor.Digest)
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.Copy(r.blobs, b.Blobs)
	return b
}

// PutManifest puts any document into a repository.
func (r *Registry) PutManifest(repo, tag string, data []byte, mediaType string, d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifests[repo+"@"+d.String()] = stored{data, mediaType}
	if tag != "" {
		r.manifests[repo+":"+tag] = stored{data, mediaType}
	}
}

// PushIndex puts an index of descriptors into a repository and returns its own.
func (r *Registry) PushIndex(repo, tag string, descs ...ocispec.Descriptor) ocispec.Descriptor {
	data := marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: descs})
	d := digest.FromBytes(data)
	r.PutManifest(repo, tag, data, ocispec.MediaTypeImageIndex, d)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: d, Size: int64(len(data))}
}

// PutBlob puts bytes under a digest, which need not be theirs.
func (r *Registry) PutBlob(d digest.Digest, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[d] = data
}

// Hook has f see each request first; what it answers, by returning true, is not answered otherwise. Nil takes it away.
func (r *Registry) Hook(f func(w http.ResponseWriter, req *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hook = f
}

// RequireBasic has the registry ask for a user and a password.
func (r *Registry) RequireBasic(user, secret string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.user, r.secret, r.realm = user, secret, ""
}

// RequireToken has the registry ask for a token of realm; "" for its own at /token, which wants user and secret.
func (r *Registry) RequireToken(realm, user, secret string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if realm == "" {
		realm = r.URL + "/token"
	}
	r.user, r.secret, r.realm = user, secret, realm
}

// Requests returns what was asked so far.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.requests)
}

// Count returns how many requests had a method and contained a part in their path.
func (r *Registry) Count(method, part string) int {
	n := 0
	for _, q := range r.Requests() {
		if q.Method == method && strings.Contains(q.Path, part) {
			n++
		}
	}
	return n
}

// Saw says whether a text was in any header, query or body of any request.
func (r *Registry) Saw(text string) bool {
	for _, q := range r.Requests() {
		if strings.Contains(fmt.Sprintf("%v", q), text) {
			return true
		}
	}
	return false
}

// Basic is the Authorization of a user and password.
func Basic(user, secret string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+secret))
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body := make([]byte, 4096)
	n, _ := req.Body.Read(body)
	form := string(body[:n])
	r.mu.Lock()
	r.requests = append(r.requests, Request{req.Method, req.Host, req.URL.Path, req.URL.RawQuery, req.Header.Clone(), form})
	hook := r.hook
	r.mu.Unlock()
	if hook != nil && hook(w, req) {
		return
	}
	if req.URL.Path == "/token" {
		r.token(w, req, form)
		return
	}
	if !r.allowed(w, req) {
		return
	}
	path := strings.TrimPrefix(req.URL.Path, "/v2/")
	if i := strings.LastIndex(path, "/manifests/"); i > 0 {
		r.manifest(w, req, path[:i], path[i+len("/manifests/"):])
		return
	}
	if i := strings.LastIndex(path, "/blobs/"); i > 0 {
		r.blob(w, req, digest.Digest(path[i+len("/blobs/"):]))
		return
	}
	w.WriteHeader(http.StatusOK)
}

func (r *Registry) allowed(w http.ResponseWriter, req *http.Request) bool {
	r.mu.Lock()
	user, secret, realm := r.user, r.secret, r.realm
	r.mu.Unlock()
	switch {
	case user == "":
		return true
	case realm == "" && req.Header.Get("Authorization") == Basic(user, secret):
		return true
	case realm != "" && req.Header.Get("Authorization") == "Bearer "+Token:
		return true
	case realm == "":
		w.Header().Set("WWW-Authenticate", `Basic realm="imagestest"`)
	default:
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="imagestest",scope="repository:x:pull"`, realm))
	}
	w.WriteHeader(http.StatusUnauthorized)
	return false
}

// token answers the OAuth POST and the older GET.
func (r *Registry) token(w http.ResponseWriter, req *http.Request, form string) {
	r.mu.Lock()
	user, secret := r.user, r.secret
	r.mu.Unlock()
	values, err := url.ParseQuery(form)
	ok := err == nil && (values.Get("username") == user && values.Get("password") == secret || values.Get("refresh_token") == secret)
	if !ok && req.Header.Get("Authorization") != Basic(user, secret) {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	fmt.Fprintf(w, `{"access_token":%q,"token":%q}`, Token, Token)
}

func (r *Registry) manifest(w http.ResponseWriter, req *http.Request, repo, object string) {
	key := repo + ":" + object
	if strings.Contains(object, ":") {
		key = repo + "@" + object
	}
	r.mu.Lock()
	m, ok := r.manifests[key]
	r.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	d := digest.FromBytes(m.data).String()
	if strings.Contains(object, ":") {
		d = object
	}
	w.Header().Set("Content-Type", m.mediaType)
	w.Header().Set("Docker-Content-Digest", d)
	w.Header().Set("Content-Length", strconv.Itoa(len(m.data)))
	if req.Method != http.MethodHead {
		_, _ = w.Write(m.data)
	}
}

func (r *Registry) blob(w http.ResponseWriter, req *http.Request, d digest.Digest) {
	r.mu.Lock()
	data, ok := r.blobs[d]
	r.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	var from int
	if rng := req.Header.Get("Range"); rng != "" {
		if _, err := fmt.Sscanf(rng, "bytes=%d-", &from); err != nil || from >= len(data) {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(data)-1, len(data)))
		w.Header().Set("Content-Length", strconv.Itoa(len(data)-from))
		w.WriteHeader(http.StatusPartialContent)
	} else {
		w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	}
	_, _ = w.Write(data[from:])
}
