package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	clog "github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
)

// hostsFile is what berth itself reads of a registry's hosts.toml; the rest is containerd's to read.
type hostsFile struct {
	Server string `toml:"server"`
	// TokenHosts are further hosts whose token servers get this registry's credentials. containerd does not know it
	// and sends them to any.
	TokenHosts []string `toml:"token_hosts"`
	// Fallback false has only the mirrors asked, never the registry itself (containerd#7043). containerd does not know it
	// and asks.
	Fallback *bool `toml:"fallback"`
	// The others are only named, so that a misspelt key is noticed.
	Capabilities any                  `toml:"capabilities"`
	CA           any                  `toml:"ca"`
	Client       any                  `toml:"client"`
	SkipVerify   any                  `toml:"skip_verify"`
	Header       any                  `toml:"header"`
	OverridePath any                  `toml:"override_path"`
	DialTimeout  any                  `toml:"dial_timeout"`
	Host         map[string]hostEntry `toml:"host"`
	// unknown are its keys that nobody reads, each with file and line.
	unknown []string
}

type hostEntry struct {
	Capabilities any `toml:"capabilities"`
	CA           any `toml:"ca"`
	Client       any `toml:"client"`
	SkipVerify   any `toml:"skip_verify"`
	Header       any `toml:"header"`
	OverridePath any `toml:"override_path"`
	DialTimeout  any `toml:"dial_timeout"`
}

// knownTokenHosts are public registries whose token server is on another host of the same owner.
var knownTokenHosts = map[string][]string{
	"registry-1.docker.io": {"auth.docker.io"},
	"registry.gitlab.com":  {"gitlab.com"},
}

// source is where one pull gets an image from: the registry and its mirrors, in order, with its credentials.
type source struct {
	named    reference.Named
	resolver remotes.Resolver
	blobs    remotes.Resolver
	pace     pace
	track    *tracker
	log      *slog.Logger
	// connections of the whole node
	connections slots
	// transports are those of the hosts.
	transports []*http.Transport
	secrets    secrets
	// fallen back to the configuration of registries that have none of their own.
	fallen bool

	mu    sync.Mutex
	hosts []docker.RegistryHost
	out   map[string]bool // mirrors that failed: left out for the rest of the pull
	notes []string
	// faults are what hosts did wrong, the first of each.
	faults map[string]string
}

// quiet keeps containerd's libraries from logging: they know the secrets of headers, and berth says what matters itself.
var quiet = func() *clog.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.PanicLevel)
	return logrus.NewEntry(l)
}()

// source reads the configuration of the registry that an image is from.
func (s *Store) source(named reference.Named, cred credentials) (*source, error) {
	domain := reference.Domain(named)
	src := &source{named: named, out: map[string]bool{}, faults: map[string]string{}, pace: s.pace, track: &s.track, log: s.log, connections: s.connections}
	opts := config.HostOptions{UpdateClient: func(c *http.Client) error {
		// Kept, since what containerd wraps around it cannot pass CloseIdleConnections on.
		if t, ok := c.Transport.(*http.Transport); ok {
			t.MaxIdleConnsPerHost = layersOfPull
			t.ResponseHeaderTimeout = s.pace.Window
			src.transports = append(src.transports, t)
		}
		return nil
	}}
	var file hostsFile
	if s.certsD != "" {
		dir, err := hostDir(s.certsD, domain)
		if err != nil {
			return nil, err
		}
		if dir != "" {
			opts.HostDir = func(string) (string, error) { return dir, nil }
			if file, err = s.readHostsFile(dir); err != nil {
				return nil, err
			}
			for _, key := range file.unknown {
				src.note(key)
			}
			src.fallen = filepath.Base(dir) == defaultHosts
		}
	}
	hosts, err := config.ConfigureHosts(clog.WithLogger(s.ctx, quiet), opts)(domain)
	if err != nil {
		return nil, fmt.Errorf("registry configuration of %s: %w: %w", domain, err, errdefs.ErrFailedPrecondition)
	}
	if len(hosts) == 0 {
		return nil, fmt.Errorf("registry configuration of %s names no host: %w", domain, errdefs.ErrFailedPrecondition)
	}
	if file.Fallback != nil && !*file.Fallback {
		if hosts = hosts[:len(hosts)-1]; len(hosts) == 0 {
			return nil, fmt.Errorf("registry configuration of %s has fallback = false and no mirror: %w", domain, errdefs.ErrFailedPrecondition)
		}
	}
	src.secrets.addCredentials(cred)
	server := file.Server
	if src.fallen {
		server = "" // of no registry in particular
	}
	bound := boundHosts(domain, server, cred.server)
	for i := range hosts {
		src.guard(&hosts[i], hosts, file, bound, cred)
	}
	src.hosts = hosts
	src.resolver = src.newResolver(0)                      // which heeds capabilities itself, but
	src.blobs = src.newResolver(docker.HostCapabilityPull) // not for blobs
	return src, nil
}

func (src *source) newResolver(can docker.HostCapabilities) remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{
		Hosts:   func(string) ([]docker.RegistryHost, error) { return src.usable(can), nil },
		Headers: http.Header{"User-Agent": {"berth"}},
	})
}

// readHostsFile reads hosts.toml strictly where containerd silently ignores the whole file, or a key of it, and pulls
// from somewhere else than its author meant (containerd#12636).
func (s *Store) readHostsFile(dir string) (file hostsFile, err error) {
	path := filepath.Join(dir, "hosts.toml")
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return file, fmt.Errorf("registry configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return file, fmt.Errorf("registry configuration: %w", err)
	}
	dec := toml.NewDecoder(strings.NewReader(string(data))).DisallowUnknownFields()
	err = dec.Decode(&file)
	if unknown, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		for _, e := range unknown.Errors {
			row, _ := e.Position()
			file.unknown = append(file.unknown, fmt.Sprintf("%s:%d: unknown key %s", path, row, strings.Join(e.Key(), ".")))
			s.log.Warn("unknown key in registry configuration", "file", path, "line", row, "key", strings.Join(e.Key(), "."))
		}
		err = nil
	}
	if bad, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, column := bad.Position()
		return file, fmt.Errorf("registry configuration %s: line %d, column %d: %w: %w", path, row, column, err, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		err = file.check()
	}
	if err != nil {
		return file, fmt.Errorf("registry configuration %s: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	return file, nil
}

// boundHosts returns the hosts that credentials are for: the one they name, or the registry of the image, by the name
// of the reference, of Docker Hub's service, or of the server that its own hosts.toml says is the registry. A mirror is
// none, nor is the server of the configuration for all that have none: it would get the credentials of every registry.
func boundHosts(domain, server, named string) map[string]bool {
	if named != "" {
		return map[string]bool{canonicalHost(named): true}
	}
	bound := map[string]bool{canonicalHost(domain): true}
	if server != "" {
		bound[canonicalHost(server)] = true
	}
	return bound
}

// canonicalHost makes host:port of a URL or host, with Docker Hub's many names as one. Without a scheme it is https's.
func canonicalHost(s string) string {
	scheme := "https"
	if before, after, ok := strings.Cut(s, "://"); ok {
		scheme, s = strings.ToLower(before), after
	}
	host, _, _ := strings.Cut(s, "/")
	host = strings.ToLower(host)
	switch host {
	case "docker.io", "index.docker.io", "registry-1.docker.io":
		host = "registry-1.docker.io"
	}
	return withPort(host, scheme)
}

func withPort(host, scheme string) string {
	if _, _, err := net.SplitHostPort(host); err == nil {
		return host
	}
	port := "443"
	if scheme == "http" {
		port = "80"
	}
	return net.JoinHostPort(strings.Trim(host, "[]"), port)
}

// urlHost returns host:port of a URL.
func urlHost(u *url.URL) string { return withPort(strings.ToLower(u.Host), strings.ToLower(u.Scheme)) }

// usable returns the hosts that did not fail in this pull and are good for something.
func (src *source) usable(can docker.HostCapabilities) []docker.RegistryHost {
	src.mu.Lock()
	defer src.mu.Unlock()
	var hosts []docker.RegistryHost
	for _, h := range src.hosts {
		if !src.out[h.Host] && h.Capabilities.Has(can) {
			hosts = append(hosts, h)
		}
	}
	return hosts
}

// leaveOut leaves hosts out for the rest of the pull, as far as there is another one after them to ask instead: a registry
// may be named as its own mirror. It returns whether it left out any.
func (src *source) leaveOut(hosts ...string) bool {
	src.mu.Lock()
	defer src.mu.Unlock()
	last := len(src.hosts) - 1
	for last > 0 && src.out[src.hosts[last].Host] {
		last--
	}
	left := false
	for _, h := range src.hosts[:last] {
		if slices.Contains(hosts, h.Host) && !src.out[h.Host] && h.Host != src.hosts[last].Host {
			src.out[h.Host] = true
			left = true
		}
	}
	return left
}

// note keeps something that the error of the pull, if there is one, should say.
func (src *source) note(text string) {
	src.mu.Lock()
	defer src.mu.Unlock()
	for _, n := range src.notes {
		if n == text {
			return
		}
	}
	src.notes = append(src.notes, text)
}

// fault keeps what a host did wrong. Its asking for a token is no fault, unless it goes on with that.
func (src *source) fault(host, what string) {
	src.mu.Lock()
	defer src.mu.Unlock()
	if src.faults[host] == "" || src.faults[host] == unauthorized {
		src.faults[host] = what
	}
}

// answered takes back that a host asked for a token: it has got one.
func (src *source) answered(host string) {
	src.mu.Lock()
	defer src.mu.Unlock()
	if src.faults[host] == unauthorized {
		delete(src.faults, host)
	}
}

const unauthorized = "401 Unauthorized"

// allNotes are the notes, and the faults of hosts by their order. Of a single host the error itself tells.
func (src *source) allNotes() []string {
	src.mu.Lock()
	defer src.mu.Unlock()
	notes := slices.Clone(src.notes)
	if len(src.hosts) > 1 {
		told := map[string]bool{} // a registry may be named as its own mirror
		for _, h := range src.hosts {
			if what := src.faults[h.Host]; what != "" && !told[h.Host] {
				told[h.Host] = true
				notes = append(notes, h.Host+": "+what)
			}
		}
	}
	for i, n := range notes {
		notes[i] = src.redact(n)
	}
	return notes
}

// close drops the connections that are kept for a next request.
func (src *source) close() {
	for _, t := range src.transports {
		t.CloseIdleConnections()
	}
}

// quietly gives the libraries a logger that says nothing.
func quietly(ctx context.Context) context.Context { return clog.WithLogger(ctx, quiet) }

// defaultHosts is the directory of the configuration of registries that have none of their own.
const defaultHosts = "_default"

// hostDir is the directory of a registry's configuration, "" where there is none: of several directories the first that
// has one counts.
func hostDir(certsD, domain string) (string, error) {
	for _, root := range filepath.SplitList(certsD) {
		dir, err := config.HostDirFromRoot(root)(domain)
		if err == nil {
			return dir, nil
		}
		if !errdefs.IsNotFound(err) {
			return "", fmt.Errorf("registry configuration of %s: %w", domain, err)
		}
	}
	return "", nil
}
