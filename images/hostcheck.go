package images

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// check refuses what containerd's library cannot read: it then takes the whole file for absent, and an image comes from
// somewhere else than the file's author meant.
func (f hostsFile) check() error {
	var errs []error
	if f.Server != "" {
		errs = append(errs, checkHostURL("server", f.Server))
	}
	errs = append(errs, f.hostEntry().check(""))
	for name, h := range f.Host {
		at := fmt.Sprintf("host.%q", name)
		errs = append(errs, checkHostURL(at, name), h.check(at+"."))
	}
	return errors.Join(errs...)
}

func (h hostEntry) check(at string) error {
	bad := func(key, want string, value any) error {
		return fmt.Errorf("%s%s is %s, got %s", at, key, want, quote(fmt.Sprint(value)))
	}
	var errs []error
	if h.Capabilities != nil {
		caps, ok := stringList(h.Capabilities)
		for _, c := range caps {
			ok = ok && slices.Contains([]string{"pull", "resolve", "push", "referrers"}, strings.ToLower(c))
		}
		if !ok {
			errs = append(errs, bad("capabilities", "a list of pull, resolve, push and referrers", h.Capabilities))
		}
	}
	if _, one := h.CA.(string); h.CA != nil && !one {
		if _, many := stringList(h.CA); !many {
			errs = append(errs, bad("ca", "a file, or a list of files", h.CA))
		}
	}
	if h.Client != nil && !isClient(h.Client) {
		errs = append(errs, bad("client", "a file, a list of files, or a list of pairs of files", h.Client))
	}
	for _, flag := range []struct {
		key   string
		value any
	}{{"skip_verify", h.SkipVerify}, {"override_path", h.OverridePath}} {
		if _, ok := flag.value.(bool); flag.value != nil && !ok {
			errs = append(errs, bad(flag.key, "true or false", flag.value))
		}
	}
	if h.DialTimeout != nil {
		text, ok := h.DialTimeout.(string)
		d, err := time.ParseDuration(text)
		if text != "" && err != nil || !ok || d < 0 {
			errs = append(errs, bad("dial_timeout", `a duration such as "5s"`, h.DialTimeout))
		}
	}
	if h.Header != nil {
		headers, ok := h.Header.(map[string]any)
		for _, v := range headers {
			_, one := v.(string)
			_, many := stringList(v)
			ok = ok && (one || many)
		}
		if !ok {
			errs = append(errs, fmt.Errorf("%sheader has values that are neither text nor lists of it", at)) // they may be secrets
		}
	}
	return errors.Join(errs...)
}

// checkHostURL reads a host as containerd does: https where there is no scheme.
func checkHostURL(key, host string) error {
	full := host
	if !strings.Contains(host, "://") {
		full = "https://" + host
	}
	u, err := url.Parse(full)
	if err != nil {
		return fmt.Errorf("%s: %s is no URL: %w", key, quote(host), err)
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return fmt.Errorf("%s: %s is not https://HOST[:PORT][/PATH], nor http://", key, quote(host))
	}
	return nil
}

func stringList(v any) ([]string, bool) {
	list, ok := v.([]any)
	var out []string
	for _, e := range list {
		s, isText := e.(string)
		ok = ok && isText
		out = append(out, s)
	}
	return out, ok
}

func isClient(v any) bool {
	if _, ok := v.(string); ok {
		return true
	}
	list, ok := v.([]any)
	for _, e := range list {
		_, one := e.(string)
		pair, two := stringList(e)
		ok = ok && (one || two && len(pair) == 2)
	}
	return ok
}
