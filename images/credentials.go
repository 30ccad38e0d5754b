package images

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"github.com/containerd/errdefs"
)

// Auth is what the kubelet sends along with a pull.
type Auth struct {
	Username, Password string
	// Auth is base64 of username:password.
	Auth string
	// ServerAddress binds the rest to a registry. The kubelet leaves it empty: then it is bound to the image's.
	ServerAddress string
	// IdentityToken is traded for access tokens at the registry's token server.
	IdentityToken string
	// RegistryToken is sent as it is.
	RegistryToken string
}

// credentials are the parsed form. They are comparable, and tell pulls by different users apart.
type credentials struct {
	username, secret string
	bearer           string
	server           string // "" binds to the image's registry
}

func (c credentials) empty() bool { return c.secret == "" && c.bearer == "" }

// String keeps secrets out of logs and errors.
func (c credentials) String() string { return "REDACTED" }

// parse reads credentials as Docker's configuration files write them.
func (a *Auth) parse() (credentials, error) {
	if a == nil {
		return credentials{}, nil
	}
	c := credentials{server: a.ServerAddress}
	switch {
	case a.RegistryToken != "":
		c.bearer = a.RegistryToken
	case a.IdentityToken != "":
		c.secret = a.IdentityToken
	case a.Username != "" || a.Password != "":
		c.username, c.secret = a.Username, a.Password
	case a.Auth != "":
		raw, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return credentials{}, fmt.Errorf("registry credentials: auth is not base64: %w", errdefs.ErrInvalidArgument)
		}
		user, secret, ok := strings.Cut(string(raw), ":")
		if !ok {
			return credentials{}, fmt.Errorf("registry credentials: auth is not username:password in base64: %w", errdefs.ErrInvalidArgument)
		}
		c.username, c.secret = user, strings.TrimRight(secret, "\x00")
	}
	if c.empty() {
		return credentials{}, nil
	}
	return c, nil
}

// authorizer answers a registry's challenges. It decides who gets credentials and leaves the protocols to containerd,
// whose own authorizer sends a password to whatever realm a challenge names, also in the clear (CVE-2020-15157 and
// its kin).
type authorizer struct {
	host string // of the registry, as containerd knows it
	cred credentials
	// withheld says why cred has nothing, though there are credentials.
	withheld string
	realms   map[string]bool // host:port of token servers that may have the credentials
	plain    map[string]bool // host:port that is configured to be plain http
	client   *http.Client
	header   http.Header // of hosts.toml: perhaps a secret, too
	note     func(string)

	mu      sync.Mutex
	trusted docker.Authorizer // has the credentials
	foreign docker.Authorizer // has none
	use     docker.Authorizer // as the last challenge was judged
}

// Authorize implements docker.Authorizer.
func (a *authorizer) Authorize(ctx context.Context, req *http.Request) error {
	if req.URL.Host != a.host {
		return nil // a redirect: what it needs is in its URL
	}
	if a.cred.bearer != "" {
		req.Header.Set("Authorization", "Bearer "+a.cred.bearer)
		return nil
	}
	a.mu.Lock()
	use := a.use
	a.mu.Unlock()
	if use == nil {
		return nil
	}
	return use.Authorize(ctx, req)
}

// AddResponses implements docker.Authorizer: it takes the challenge of the last 401.
func (a *authorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	last := responses[len(responses)-1]
	if last.Request.URL.Host != a.host {
		return fmt.Errorf("%s, to which %s redirects, asks for credentials: %w", quote(last.Request.URL.Host), a.host, docker.ErrInvalidAuthorization)
	}
	if len(responses) >= 3 || a.cred.bearer != "" {
		return fmt.Errorf("%s does not accept the credentials: %w", a.host, docker.ErrInvalidAuthorization)
	}
	if a.withheld != "" {
		a.note(fmt.Sprintf("the credentials were not sent to %s: %s", a.host, a.withheld))
	}
	withCredentials := true
	for _, c := range auth.ParseAuthHeader(last.Header) {
		if c.Scheme != auth.BearerAuth {
			continue
		}
		realm, err := url.Parse(c.Parameters["realm"])
		if err != nil || realm.Scheme != "https" && realm.Scheme != "http" || realm.Host == "" || realm.User != nil {
			return fmt.Errorf("%s names the token server %s: %w", a.host, quote(c.Parameters["realm"]), docker.ErrInvalidAuthorization)
		}
		at := urlHost(realm)
		if realm.Scheme == "http" && last.TLS != nil && !a.plain[at] {
			return fmt.Errorf("%s is https, its token server %s is not: %w", a.host, quote(realm.Host), docker.ErrInvalidAuthorization)
		}
		if !a.realms[at] {
			withCredentials = false
			if !a.cred.empty() {
				a.note(fmt.Sprintf("the credentials were not sent to the token server %s, which is not on the registry's host %s; "+
					"if they are meant for it, list it in token_hosts of the registry's hosts.toml", quote(realm.Host), a.host))
			}
		}
		break
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.trusted == nil {
		a.foreign = docker.NewDockerAuthorizer(docker.WithAuthClient(a.client))
		a.trusted = docker.NewDockerAuthorizer(docker.WithAuthClient(a.client), docker.WithAuthHeader(a.header),
			docker.WithAuthCreds(func(host string) (string, string, error) {
				if host != a.host {
					return "", "", nil
				}
				return a.cred.username, a.cred.secret, nil
			}))
	}
	a.use = a.foreign
	if withCredentials {
		a.use = a.trusted
	}
	return a.use.AddResponses(ctx, responses)
}
