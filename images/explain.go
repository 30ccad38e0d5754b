package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Explanation says where a pull of an image asks, why there, and what is answered there now. It holds no secret.
type Explanation struct {
	// Reference is the image's name, normalised.
	Reference string `json:"reference"`
	// Searched is the directory of registry configuration, or several, separated by colons; "" for none.
	Searched string `json:"searched,omitempty"`
	// Hosts are asked in this order.
	Hosts []HostExplanation `json:"hosts"`
	// Notes are what else a failed pull would say.
	Notes []string `json:"notes,omitempty"`
}

// HostExplanation is one host of an [Explanation].
type HostExplanation struct {
	URL string `json:"url"`
	// File and Line are where it is configured; File is "" and Line 0 for what is not.
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
	// Why says in words why it is asked.
	Why string `json:"why"`
	// Capabilities are what it is asked for: pull, resolve.
	Capabilities []string `json:"capabilities"`
	// Settings are the names of what else its configuration sets, such as ca, or header Authorization.
	Settings []string `json:"settings,omitempty"`
	// Proxy is what stands between, by the daemon's environment; "" for none.
	Proxy string `json:"proxy,omitempty"`
	// Credentials says whether the credentials of the request go there, and why not.
	Credentials string `json:"credentials"`
	// TokenServers are the hosts whose token servers get them, too.
	TokenServers []string `json:"tokenServers,omitempty"`
	// Requests are what was asked, and what came back, in order.
	Requests []string `json:"requests,omitempty"`
	// Answer is the outcome: the digest, or what went wrong.
	Answer string `json:"answer"`
	// OK: it has the image.
	OK bool `json:"ok"`
}

// explainPace has nobody wait long for an explanation.
var explainPace = pace{Window: 15 * time.Second, Floor: 1, BackOff: 200 * time.Millisecond}

const explainTimeout = 20 * time.Second

// Explain asks each host, that a pull of ref with these credentials would ask, for the manifest, side by side, and fetches
// nothing. What is wrong with a host is in its answer; the error is about the reference, the credentials or the
// configuration.
func (s *Store) Explain(ctx context.Context, ref string, auth *Auth) (*Explanation, error) {
	named, err := parseReference(ref)
	if err != nil {
		return nil, err
	}
	cred, err := auth.parse()
	if err != nil {
		return nil, err
	}
	first, err := s.source(named, cred)
	if err != nil {
		return nil, err
	}
	first.close()
	origin, err := s.origin(reference.Domain(named))
	if err != nil {
		return nil, err
	}
	e := &Explanation{Reference: named.String(), Searched: s.certsD, Hosts: make([]HostExplanation, len(first.hosts))}
	found, notes := make([]digest.Digest, len(first.hosts)), make([][]string, len(first.hosts))
	ask := func(i int, named reference.Named) error {
		src, err := s.source(named, cred) // one each: a host that fails is left out of its own only
		if err != nil || i >= len(src.hosts) {
			return errors.Join(err, fmt.Errorf("the registry configuration of %s is being changed", reference.Domain(named)))
		}
		defer src.close()
		src.pace, src.hosts = explainPace, src.hosts[i:i+1]
		found[i] = e.Hosts[i].ask(ctx, src, named)
		notes[i] = src.allNotes()
		return nil
	}
	askAll := func(named reference.Named, of func(i int) bool) error {
		errs := make([]error, len(e.Hosts))
		var wg sync.WaitGroup
		for i := range e.Hosts {
			if of(i) {
				wg.Go(func() { errs[i] = ask(i, named) })
			}
		}
		wg.Wait()
		return errors.Join(append(errs, ctx.Err())...)
	}
	for i, h := range first.hosts {
		e.Hosts[i] = describeHost(h, origin.at(i), cred)
	}
	_, byDigest := named.(reference.Digested)
	resolves := func(i int) bool { return byDigest || first.hosts[i].Capabilities.Has(docker.HostCapabilityResolve) }
	if err := askAll(named, resolves); err != nil {
		return nil, err
	}
	// A mirror that resolves no tag is asked for the digest that another gave.
	if i := slices.IndexFunc(found, func(d digest.Digest) bool { return d != "" }); i >= 0 {
		pinned, err := reference.WithDigest(reference.TrimNamed(named), found[i])
		if err != nil {
			return nil, err
		}
		if err := askAll(pinned, func(i int) bool { return !resolves(i) }); err != nil {
			return nil, err
		}
	}
	for i := range e.Hosts {
		if e.Hosts[i].Answer == "" {
			e.Hosts[i].Answer = "not asked: it resolves no tags, and no other host told the digest"
		}
	}
	for _, note := range slices.Concat(notes...) {
		if !slices.Contains(e.Notes, note) { // what is wrong with the file is noted for each of its hosts
			e.Notes = append(e.Notes, note)
		}
	}
	return e, nil
}

// describeHost says what is known of a host before it is asked.
func describeHost(h docker.RegistryHost, from hostOrigin, cred credentials) HostExplanation {
	x := HostExplanation{
		URL:  (&url.URL{Scheme: h.Scheme, Host: h.Host, Path: h.Path}).String(),
		File: from.file, Line: from.line, Why: from.why, Settings: from.settings,
	}
	for _, c := range []struct {
		name string
		cap  docker.HostCapabilities
	}{{"pull", docker.HostCapabilityPull}, {"resolve", docker.HostCapabilityResolve}} {
		if h.Capabilities.Has(c.cap) {
			x.Capabilities = append(x.Capabilities, c.name)
		}
	}
	if req, err := http.NewRequest(http.MethodHead, x.URL, nil); err == nil {
		if proxy, err := http.ProxyFromEnvironment(req); err == nil && proxy != nil {
			x.Proxy = proxy.Redacted()
		}
	}
	a, ok := h.Authorizer.(*authorizer)
	switch {
	case cred.empty() || !ok:
		x.Credentials = "none are given"
	case a.withheld != "":
		x.Credentials = "not sent: " + a.withheld
	default:
		x.Credentials = "sent where it asks for them"
		for realm := range maps.Keys(a.realms) {
			x.TokenServers = append(x.TokenServers, realm)
		}
		slices.Sort(x.TokenServers)
	}
	return x
}

// ask asks the only host of src.
func (x *HostExplanation) ask(ctx context.Context, src *source, named reference.Named) digest.Digest {
	ctx, cancel := context.WithTimeout(ctx, explainTimeout)
	defer cancel()
	var seen requestLog
	seen.follow(&src.hosts[0])
	desc, err := src.resolve(ctx)
	for _, line := range seen.lines() {
		x.Requests = append(x.Requests, src.redact(line))
	}
	if err != nil {
		text := (&pull{named: named, src: src}).explain(context.WithoutCancel(ctx), err).Error()
		text = strings.TrimPrefix(text, ErrRegistryUnavailable.Error()+": ")
		x.Answer = strings.TrimPrefix(text, fmt.Sprintf("pull %s: ", named))
		return ""
	}
	x.Answer, x.OK = fmt.Sprintf("has it: %s, %s", desc.Digest, desc.MediaType), true
	return desc.Digest
}

// requestLog notes the requests to a host and to its token servers.
type requestLog struct {
	mu   sync.Mutex
	text []string
}

func (l *requestLog) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.text)
}

// follow has the requests of a host noted from now on.
func (l *requestLog) follow(h *docker.RegistryHost) {
	clients := []*http.Client{h.Client}
	if a, ok := h.Authorizer.(*authorizer); ok {
		clients = append(clients, a.client)
	}
	for _, c := range clients {
		c.Transport = &notedTransport{next: c.Transport, log: l}
	}
}

type notedTransport struct {
	next http.RoundTripper
	log  *requestLog
}

// RoundTrip implements http.RoundTripper.
func (t *notedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	start := time.Now()
	resp, err := t.next.RoundTrip(req)
	at := url.URL{Scheme: req.URL.Scheme, Host: req.URL.Host, Path: req.URL.Path} // without the query: it may be a signature
	if resp != nil && resp.TLS == nil {
		at.Scheme = "http" // what a loopback registry was asked by in the end
	}
	with := ""
	if scheme, _, ok := strings.Cut(req.Header.Get("Authorization"), " "); ok {
		with = " with " + quote(scheme)
	}
	line := fmt.Sprintf("%s %s%s: ", req.Method, at.String(), with)
	if err != nil {
		line += "no answer"
	} else {
		line += resp.Status
		for _, c := range auth.ParseAuthHeader(resp.Header) {
			line += fmt.Sprintf(", wants %s", challenge(c))
		}
		if to := resp.Header.Get("Location"); to != "" && resp.StatusCode/100 == 3 {
			line += ", sends on to " + quote(queries.ReplaceAllString(to, "$1?…"))
		}
	}
	t.log.mu.Lock()
	t.log.text = append(t.log.text, line+fmt.Sprintf(" (%d ms)", time.Since(start).Milliseconds()))
	t.log.mu.Unlock()
	return resp, err
}

func challenge(c auth.Challenge) string {
	switch c.Scheme {
	case auth.BasicAuth:
		return "a password"
	case auth.BearerAuth:
		return "a token of " + quote(queries.ReplaceAllString(c.Parameters["realm"], "$1?…"))
	default:
		return "digest authentication, which is not supported"
	}
}

// origins are where the hosts of a registry are configured.
type origins struct {
	mirrors []hostOrigin // in the order of the file
	server  hostOrigin
}

type hostOrigin struct {
	file     string
	line     int
	why      string
	settings []string
}

// at is the origin of the i-th host: the mirrors in the order of the file, and then the registry itself, unless fallback is
// false.
func (o *origins) at(i int) hostOrigin {
	if i < len(o.mirrors) {
		return o.mirrors[i]
	}
	return o.server
}

// origin finds the configuration of a registry, as source does.
func (s *Store) origin(domain string) (*origins, error) {
	o := &origins{server: hostOrigin{why: "the registry of the image's name; nothing is configured for it"}}
	if s.certsD == "" {
		return o, nil
	}
	dir, err := hostDir(s.certsD, domain)
	if err != nil || dir == "" {
		return o, err
	}
	file := filepath.Join(dir, "hosts.toml")
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		o.server = hostOrigin{file: dir, why: "the registry of the image's name, with the certificates of this directory"}
		return o, nil
	}
	if err != nil {
		return nil, fmt.Errorf("registry configuration: %w", err)
	}
	return readOrigins(file, data)
}

// readOrigins finds the lines of hosts.toml that name hosts, in the way in which containerd's library orders them.
func readOrigins(file string, data []byte) (*origins, error) {
	var parsed hostsFile
	if err := toml.Unmarshal(data, &parsed); err != nil {
		return nil, fmt.Errorf("registry configuration %s: %w", file, err)
	}
	o := &origins{server: hostOrigin{
		file: file, why: "the registry of the image's name; the file has no server", settings: settings(parsed.hostEntry()),
	}}
	p := unstable.Parser{}
	p.Reset(data)
	top, last := true, ""
	for p.NextExpression() {
		e := p.Expression()
		var parts []string
		line := 0
		for it := e.Key(); it.Next(); {
			parts = append(parts, string(it.Node().Data))
			if line == 0 {
				line = p.Shape(it.Node().Raw).Start.Line
			}
		}
		switch {
		case e.Kind == unstable.KeyValue && top && len(parts) == 1 && parts[0] == "server":
			o.server.line, o.server.why = line, "server of the file: the registry itself"
		case e.Kind == unstable.Table || e.Kind == unstable.ArrayTable:
			top = false
			if e.Kind != unstable.Table || len(parts) < 2 || parts[0] != "host" || parts[1] == last {
				continue
			}
			last = parts[1]
			o.mirrors = append(o.mirrors, hostOrigin{file: file, line: line, why: "a mirror", settings: settings(parsed.Host[last])})
		}
	}
	return o, p.Error()
}

// hostEntry is what the file sets for the registry itself.
func (f hostsFile) hostEntry() hostEntry {
	return hostEntry{
		Capabilities: f.Capabilities, CA: f.CA, Client: f.Client, SkipVerify: f.SkipVerify, Header: f.Header,
		OverridePath: f.OverridePath, DialTimeout: f.DialTimeout,
	}
}

// settings names what is set, with values that are no secrets.
func settings(e hostEntry) []string {
	var out []string
	for _, f := range []struct {
		name  string
		value any
	}{{"ca", e.CA}, {"client", e.Client}, {"skip_verify", e.SkipVerify}, {"override_path", e.OverridePath}, {"dial_timeout", e.DialTimeout}} {
		if f.value != nil {
			out = append(out, fmt.Sprintf("%s = %v", f.name, f.value))
		}
	}
	if headers, ok := e.Header.(map[string]any); ok {
		for _, name := range slices.Sorted(maps.Keys(headers)) {
			out = append(out, "header "+name) // its value may be a secret
		}
	}
	return out
}
