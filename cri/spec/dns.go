package spec

import (
	"bytes"
	"strings"
	"unicode"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxHostname is __NEW_UTS_LEN of Linux.
const maxHostname = 64

// Hostname is the pod's: its UTS name, HOSTNAME of its containers and the line of its /etc/hostname. A pod that brings
// none (as one in the node's network does) has the node's. Container specifications leave the field empty: the name is
// set once in the pod's UTS namespace, and a container that starts later must not undo what the pod did with it.
func Hostname(cfg *cri.PodSandboxConfig, h Host) string {
	if name := cfg.GetHostname(); name != "" {
		return name
	}
	return h.Hostname
}

func validateHostname(at, name string) error {
	if len(name) > maxHostname {
		return invalid(at, name, "is longer than %d bytes", maxHostname)
	}
	if strings.ContainsFunc(name, blank) || strings.Contains(name, "/") {
		return invalid(at, name, "contains a blank, a control character or a slash")
	}
	return nil
}

// blank says whether r would end a word of a file that is read by words.
func blank(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) }

func validateDNS(at string, dns *cri.DNSConfig) error {
	for _, list := range []struct {
		field   string
		entries []string
	}{
		{".servers", dns.GetServers()}, {".searches", dns.GetSearches()}, {".options", dns.GetOptions()},
	} {
		for i, e := range list.entries {
			if len(e) > maxWord {
				return invalid(index(at+list.field, i), e, "is longer than %d bytes", maxWord)
			}
			if e == "" || strings.ContainsFunc(e, blank) {
				return invalid(index(at+list.field, i), e, "is empty or contains a blank or a control character")
			}
		}
	}
	return nil
}

// ResolvConf renders the pod's /etc/resolv.conf. Without a DNS configuration it is the node's; with an empty one (policy
// None) it is empty.
func ResolvConf(dns *cri.DNSConfig, host []byte) []byte {
	if dns == nil {
		return bytes.Clone(host)
	}
	var b bytes.Buffer
	if list := dns.GetSearches(); len(list) > 0 {
		b.WriteString("search " + strings.Join(list, " ") + "\n")
	}
	for _, s := range dns.GetServers() {
		b.WriteString("nameserver " + s + "\n")
	}
	if list := dns.GetOptions(); len(list) > 0 {
		b.WriteString("options " + strings.Join(list, " ") + "\n")
	}
	return b.Bytes()
}
