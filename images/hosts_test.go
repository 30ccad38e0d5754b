package images

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
)

// asked lists what a registry was asked for, each once, without digests.
func asked(reg *imagestest.Registry) []string {
	var list []string
	for _, r := range reg.Requests() {
		line := r.Method + " " + r.Path
		if i := strings.Index(line, "sha256:"); i >= 0 {
			line = line[:i] + "…"
		}
		if !slices.Contains(list, line) {
			list = append(list, line)
		}
	}
	return list
}

func TestCapabilitiesOfMirrors(t *testing.T) {
	for caps, want := range map[string]struct{ mirror, upstream []string }{
		`["pull", "resolve"]`: {[]string{"HEAD /v2/a/manifests/b", "GET /v2/a/manifests/…", "GET /v2/a/blobs/…"}, nil},
		`["pull"]`:            {[]string{"GET /v2/a/manifests/…", "GET /v2/a/blobs/…"}, []string{"HEAD /v2/a/manifests/b"}},
		`["resolve"]`:         {nil, []string{"HEAD /v2/a/manifests/b", "GET /v2/a/manifests/…", "GET /v2/a/blobs/…"}},
		`["push"]`:            {nil, []string{"HEAD /v2/a/manifests/b", "GET /v2/a/manifests/…", "GET /v2/a/blobs/…"}},
	} {
		t.Run(caps, func(t *testing.T) {
			mirror, upstream := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
			mirror.Push("a", "b", smallImage("x"))
			upstream.Push("a", "b", smallImage("x"))
			s := quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = %s\n", upstream.URL, mirror.URL, caps)}))
			mustPull(t, s, "registry.example/a:b")
			if got := asked(mirror); !slices.Equal(got, want.mirror) {
				t.Errorf("the mirror was asked for %q, want %q", got, want.mirror)
			}
			if got := asked(upstream); !slices.Equal(got, want.upstream) {
				t.Errorf("upstream was asked for %q, want %q", got, want.upstream)
			}
		})
	}
}

// TestContainerd7043_UpstreamIsNotAskedWhereItIsForbidden: fallback = false.
func TestContainerd7043_UpstreamIsNotAskedWhereItIsForbidden(t *testing.T) {
	mirror, upstream := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	mirror.Push("a", "b", smallImage("x"))
	upstream.Push("a", "only-upstream", smallImage("x"))
	s := quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\nfallback = false\n[host.%q]\n", upstream.URL, mirror.URL)}))
	if err := pullErr(t, s, "registry.example/a:only-upstream", nil); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	mustPull(t, s, "registry.example/a:b")
	if n := len(upstream.Requests()); n != 0 {
		t.Errorf("%d requests to upstream", n)
	}
	s = quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\nfallback = false\n", upstream.URL)}))
	if err := pullErr(t, s, "registry.example/a:b", nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}

func TestOverridePath(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		rest, ok := strings.CutPrefix(r.URL.Path, "/artifacts/docker/")
		r.URL.Path = "/v2/" + rest
		if !ok {
			w.WriteHeader(http.StatusNotFound)
		}
		return !ok
	})
	s := quick(t, certs(t, map[string]string{
		"one.example": fmt.Sprintf("server = \"%s/artifacts/docker\"\noverride_path = true\n", reg.URL),
		"two.example": fmt.Sprintf("server = \"%s/artifacts/docker\"\n", reg.URL),
	}))
	mustPull(t, s, "one.example/a:b")
	if _, err := s.Pull(context.Background(), "two.example/a:b", nil); !errdefs.IsNotFound(err) {
		t.Errorf("without override_path /v2 is added: %v", err)
	}
}

// TestHostsFileChangesCountAtOnce: also where the directory was not there before.
func TestHostsFileChangesCountAtOnce(t *testing.T) {
	one, two := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	first, second := one.Push("a", "b", smallImage("1")), two.Push("a", "b", smallImage("2"))
	dir := t.TempDir()
	s := quick(t, func(o *Options) { o.CertsD = dir })
	write := func(name, url string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, "hosts.toml"), []byte(fmt.Sprintf("server = %q\n", url)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("_default", one.URL)
	if img := mustPull(t, s, "registry.example/a:b"); img.ID != first.ConfigID {
		t.Errorf("by _default: %s", img.ID)
	}
	write("registry.example", two.URL)
	if img := mustPull(t, s, "registry.example/a:b"); img.ID != second.ConfigID {
		t.Errorf("by a directory that is new: %s", img.ID)
	}
	write("registry.example", one.URL)
	if img := mustPull(t, s, "registry.example/a:b"); img.ID != first.ConfigID {
		t.Errorf("by a file that was changed: %s", img.ID)
	}
}

// TestContainerd12636_HostsFileIsNeverIgnored: containerd takes a file that it cannot read for none, and asks upstream.
func TestContainerd12636_HostsFileIsNeverIgnored(t *testing.T) {
	upstream := imagestest.NewRegistry(t)
	upstream.Push("a", "b", smallImage("x"))
	for text, want := range map[string]string{
		"server = 5\n":                                   "line 1",
		"server = \"ftp://x\"\n":                         "server",
		"[host.\"https://\"]\n":                          "host",
		"capabilities = [\"pul\"]\n":                     "capabilities",
		"capabilities = \"pull\"\n":                      "capabilities",
		"[host.\"https://m\"]\nca = 1\n":                 "host.\"https://m\".ca",
		"client = [[\"a\"]]\n":                           "client",
		"skip_verify = \"yes\"\n":                        "skip_verify",
		"override_path = 1\n":                            "override_path",
		"dial_timeout = \"5 seconds\"\n":                 "dial_timeout",
		"dial_timeout = 5\n":                             "dial_timeout",
		"[header]\nX-A = 1\n":                            "header",
		"ca = \"missing.pem\"\n":                         "missing.pem",
		"client = \"missing.pem\"\n":                     "missing.pem",
		"[host.\"https://m\"\n":                          "line 1",
		"server = \"a\"\nserver = \"b\"\n":               "server",
		"[header]\nX-Secret = [\"" + secret + "\", 1]\n": "header",
	} {
		s := quick(t, certs(t, map[string]string{upstream.Host(): text}))
		err := pullErr(t, s, upstream.Host()+"/a:b", nil)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
	if n := len(upstream.Requests()); n != 0 {
		t.Errorf("%d requests", n)
	}
}

// TestContainerd12636_SeveralDirectories: the first that has a registry's configuration counts, as in containerd's
// config_path, and none is left unread.
func TestContainerd12636_SeveralDirectories(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	server := func(url string) string { return fmt.Sprintf("server = %q\n", url) }
	first, second := &Options{}, &Options{}
	certs(t, map[string]string{"one.example": server(reg.URL)})(first)
	certs(t, map[string]string{"one.example": server("http://127.0.0.1:1"), "two.example": server(reg.URL)})(second)
	s := quick(t, func(o *Options) { o.CertsD = "/no/such/directory:" + first.CertsD + ":" + second.CertsD })
	mustPull(t, s, "one.example/a:b")
	mustPull(t, s, "two.example/a:b")
}

// TestContainerd6438_PasswordsOfMirrors: a mirror's own have their place in the file, and go to no other host.
func TestContainerd6438_PasswordsOfMirrors(t *testing.T) {
	mirror, upstream := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	mirror.Push("a", "b", smallImage("x"))
	mirror.RequireBasic(user, secret)
	upstream.Push("a", "only-upstream", smallImage("y"))
	s := quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.%q.header]\nAuthorization = %q\n",
		upstream.URL, mirror.URL, imagestest.Basic(user, secret))}))
	for _, tag := range []string{"b", "only-upstream"} {
		mustPull(t, s, "registry.example/a:"+tag)
	}
	if n := upstream.Count("GET", "/blobs/"); n != 2 {
		t.Errorf("upstream was asked for %d blobs, want those of its image", n)
	}
	if upstream.Saw(imagestest.Basic(user, secret)) {
		t.Error("upstream saw the mirror's password")
	}
}

// TestDefaultServerGetsNoCredentials: what is configured for all registries would see the passwords of all.
func TestDefaultServerGetsNoCredentials(t *testing.T) {
	auth := &Auth{Username: user, Password: secret}
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	reg.RequireBasic(user, secret)
	server := fmt.Sprintf("server = %q\n", reg.URL)
	s := quick(t, certs(t, map[string]string{"_default": server}))
	err := pullErr(t, s, "registry.example/a:b", auth)
	if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "make it the server of registry.example/hosts.toml") {
		t.Errorf("got %v, want ErrPermissionDenied and what to do", err)
	}
	e := explain(t, s, "registry.example/a:b", auth)
	if got := e.Hosts[0].Credentials; !strings.Contains(got, "names this host for every registry") {
		t.Errorf("explained: %s", got)
	}
	if reg.Saw(imagestest.Basic(user, secret)) {
		t.Error("the server of _default saw the credentials")
	}
	for name, c := range map[string]struct {
		hosts map[string]string
		ref   string
		auth  *Auth
	}{
		"the registry's own file":          {map[string]string{"registry.example": server}, "registry.example/a:b", auth},
		"the registry itself":              {map[string]string{"_default": server}, reg.Host() + "/a:b", auth},
		"credentials that name the server": {map[string]string{"_default": server}, "registry.example/a:b", &Auth{Username: user, Password: secret, ServerAddress: reg.URL}},
	} {
		if _, err := quick(t, certs(t, c.hosts)).Pull(context.Background(), c.ref, c.auth); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSkipVerify(t *testing.T) {
	reg := imagestest.NewTLSRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	s := quick(t, certs(t, map[string]string{
		"one.example": fmt.Sprintf("server = %q\nskip_verify = true\n", reg.URL),
		"two.example": fmt.Sprintf("server = %q\n[host.%q]\nskip_verify = true\n", "https://127.0.0.1:1", reg.URL),
		"bad.example": fmt.Sprintf("server = %q\n", reg.URL),
	}))
	mustPull(t, s, "one.example/a:b")
	mustPull(t, s, "two.example/a:b")
	if _, err := s.Pull(context.Background(), "bad.example/a:b", nil); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without: %v", err)
	}
}

// TestClientCertificates: in one file with its key, in two, and as Docker lays them out.
func TestClientCertificates(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	reg := imagestest.NewRegistryOn(t, func(s *httptest.Server) {
		pool := x509.NewCertPool()
		pool.AddCert(cert)
		s.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	})
	reg.Push("a", "b", smallImage("x"))
	caPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.Certificate().Raw})
	write := func(host, name string, data []byte) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, host), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, host, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for host, client := range map[string]string{"one.example": `"both.pem"`, "two.example": `[["cert.pem", "key.pem"]]`, "list.example": `["both.pem"]`, "none.example": `[]`} {
		write(host, "hosts.toml", []byte(fmt.Sprintf("server = %q\nca = \"ca.pem\"\nclient = %s\n", reg.URL, client)))
		write(host, "ca.pem", caPEM)
		write(host, "both.pem", append(slices.Clone(certPEM), keyPEM...))
		write(host, "cert.pem", certPEM)
		write(host, "key.pem", keyPEM)
	}
	docker := reg.Host()
	write(docker, "ca.crt", caPEM)
	write(docker, "client.cert", certPEM)
	write(docker, "client.key", keyPEM)
	s := quick(t, func(o *Options) { o.CertsD = dir })
	for _, host := range []string{"one.example", "two.example", "list.example", docker} {
		if _, err := s.Pull(context.Background(), host+"/a:b", nil); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
	if _, err := s.Pull(context.Background(), "none.example/a:b", nil); err == nil {
		t.Error("without a certificate: the pull succeeded")
	}
}

// TestDialTimeout: a mirror whose host is not there is given up after the time that is set.
func TestDialTimeout(t *testing.T) {
	// A listener whose queue is full answers no SYN.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	silent := fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	for full := false; !full; {
		c, err := net.DialTimeout("tcp", silent, 200*time.Millisecond)
		if full = err != nil; !full {
			defer c.Close() //nolint:revive // until the test ends
		}
	}
	upstream := imagestest.NewRegistry(t)
	upstream.Push("a", "b", smallImage("x"))
	s := quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.\"http://%s\"]\ndial_timeout = \"100ms\"\n", upstream.URL, silent)}))
	start := time.Now()
	mustPull(t, s, "registry.example/a:b")
	if took := time.Since(start); took < 100*time.Millisecond || took > 20*time.Second {
		t.Errorf("took %v: want the dial's 100 ms, not its usual 30 s", took)
	}
}

// TestIPv6Registries: addresses as names of registries, in references, directories and credentials.
func TestIPv6Registries(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6 here: %v", err)
	}
	reg := imagestest.NewRegistryOn(t, func(s *httptest.Server) {
		s.Listener.Close()
		s.Listener = l
	})
	reg.Push("team/a", "b", smallImage("x"))
	reg.RequireToken("", user, secret)
	auth := &Auth{Username: user, Password: secret}
	ref := reg.Host() + "/team/a:b"
	if !strings.HasPrefix(ref, "[::1]:") {
		t.Fatal(ref)
	}
	s := quick(t)
	img, err := s.Pull(context.Background(), ref, auth)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(img.RepoTags, []string{ref}) {
		t.Errorf("tags %v", img.RepoTags)
	}
	if got, err := s.Image(ref); err != nil || got.ID != img.ID {
		t.Errorf("by its name: %v, %v", got, err)
	}
	s = quick(t, certs(t, map[string]string{
		reg.Host():         fmt.Sprintf("server = %q\n[header]\nX-Api-Key = \"of-the-directory\"\n", reg.URL),
		"registry.example": fmt.Sprintf("server = %q\n", reg.URL),
	}))
	for _, name := range []string{reg.Host(), "registry.example"} {
		if _, err := s.Pull(context.Background(), name+"/team/a:b", auth); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !reg.Saw("of-the-directory") {
		t.Error("the directory of the address was not used")
	}
}

// TestProxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY. Go reads them once, so that the pulls are those of a process of its own.
func TestProxies(t *testing.T) {
	const child = "BERTH_TEST_PROXY_CERTS"
	if dir := os.Getenv(child); dir != "" {
		s := quick(t, func(o *Options) { o.CertsD = dir })
		mustPull(t, s, "plain.example/a:b")
		mustPull(t, s, "tls.example/a:b")
		if _, err := s.Pull(context.Background(), "direct.example/a:b", nil); err == nil || !strings.Contains(err.Error(), "lookup direct.invalid") {
			t.Errorf("without a proxy: %v, want the name not to be found", err)
		}
		return
	}
	plain, overTLS := imagestest.NewRegistry(t), imagestest.NewTLSRegistry(t)
	plain.Push("a", "b", smallImage("1"))
	overTLS.Push("a", "b", smallImage("2"))
	var mu sync.Mutex
	seen := map[string]bool{}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.Method+" "+r.Host] = true
		mu.Unlock()
		if r.Method == http.MethodConnect {
			tunnel(t, w, overTLS.Host())
			return
		}
		out := r.Clone(r.Context())
		out.RequestURI, out.URL.Host = "", plain.Host()
		resp, err := http.DefaultTransport.RoundTrip(out)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
		_, _ = io.Copy(w, resp.Body)
	}))
	defer proxy.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: overTLS.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	o := &Options{}
	certs(t, map[string]string{
		"plain.example": "server = \"http://plain.example\"\n",
		// example.com is what the certificate is for.
		"tls.example":    fmt.Sprintf("server = \"https://example.com\"\nca = %q\n", ca),
		"direct.example": "server = \"http://direct.invalid\"\n",
	})(o)
	cmd := exec.Command(os.Args[0], "-test.run=^TestProxies$", "-test.v")
	cmd.Env = append(os.Environ(), child+"="+o.CertsD, "HTTP_PROXY="+proxy.URL, "HTTPS_PROXY="+proxy.URL, "NO_PROXY=.invalid")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, want := range []string{"HEAD plain.example", "GET plain.example", "CONNECT example.com:443"} {
		if !seen[want] {
			t.Errorf("the proxy did not see %q, but %v", want, seen)
		}
	}
	if len(seen) != 3 {
		t.Errorf("the proxy saw %v", seen)
	}
}

// tunnel connects a client with an address.
func tunnel(t *testing.T, w http.ResponseWriter, to string) {
	up, err := net.Dial("tcp", to)
	if err != nil {
		t.Error(err)
		return
	}
	defer up.Close()
	w.WriteHeader(http.StatusOK)
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(up, buf)
		up.Close()
	})
	_, _ = io.Copy(conn, up)
	conn.Close()
	wg.Wait()
}

// A registry that is named as its own mirror was left out as such, and then there was nobody to ask: what it had done wrong
// was told as "not found".
func TestLastHostIsNeverLeftOut(t *testing.T) {
	for _, c := range []struct{ hosts, fail, left []string }{
		{[]string{"a", "b"}, []string{"a"}, []string{"b"}},
		{[]string{"a", "b"}, []string{"a", "b"}, []string{"b"}},
		{[]string{"a", "b", "c"}, []string{"b", "c"}, []string{"a", "c"}},
		{[]string{"a"}, []string{"a"}, []string{"a"}},
		{[]string{"a", "a"}, []string{"a"}, []string{"a", "a"}},
		{[]string{"b", "a", "a"}, []string{"a", "b"}, []string{"a", "a"}},
	} {
		src := &source{out: map[string]bool{}}
		for _, h := range c.hosts {
			src.hosts = append(src.hosts, docker.RegistryHost{Host: h})
		}
		for range 2 {
			src.leaveOut(c.fail...)
		}
		var left []string
		for _, h := range src.hosts {
			if !src.out[h.Host] {
				left = append(left, h.Host)
			}
		}
		if !slices.Equal(left, c.left) {
			t.Errorf("of %v, which fail %v, are left %v, not %v", c.hosts, c.fail, left, c.left)
		}
	}
}
