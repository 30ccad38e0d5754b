package network

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/berth-run/berth/internal/file"
)

// maxCIDRs bounds the text of address ranges.
const maxCIDRs = 4096

// podCIDRs is the address ranges of the node's pods. The kubelet tells them once, when they change, and not again when
// berth restarts: so they are kept in a file.
type podCIDRs struct {
	file       string
	configured []netip.Prefix // wins
	log        *slog.Logger

	mu   sync.Mutex
	told []netip.Prefix
}

// openPodCIDRs reads the file. What cannot be read is logged and forgotten: the kubelet's next change writes it anew.
func openPodCIDRs(file string, configured []netip.Prefix, log *slog.Logger) *podCIDRs {
	p := &podCIDRs{file: file, configured: configured, log: log}
	if file == "" {
		return p
	}
	data, err := readBounded(file)
	if errors.Is(err, fs.ErrNotExist) {
		return p
	}
	if err == nil {
		p.told, err = parseCIDRs(strings.TrimSpace(string(data)))
	}
	if err != nil {
		log.Warn("pod CIDRs cannot be read back", "file", file, "error", err)
	}
	return p
}

// get returns the ranges in force, in the order in which they were given.
func (p *podCIDRs) get() []netip.Prefix {
	if len(p.configured) > 0 {
		return slices.Clone(p.configured)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.told)
}

// set keeps what the kubelet hands over: CIDRs joined by commas, or nothing.
func (p *podCIDRs) set(joined string) {
	prefixes, err := parseCIDRs(joined)
	if err != nil {
		p.log.Warn("the pod CIDR handed over by the kubelet is not one and is ignored", "error", err)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(prefixes) == 0 || slices.Equal(prefixes, p.told) {
		return
	}
	p.log.Info("pod CIDRs handed over by the kubelet", "cidrs", joined)
	if len(p.configured) > 0 && !slices.Equal(prefixes, p.configured) {
		p.log.Warn("other pod CIDRs are configured, and win over the kubelet's", "configured", p.configured, "kubelet", prefixes)
	}
	p.told = prefixes
	if p.file == "" {
		return
	}
	if err := file.Replace(p.file, []byte(joined+"\n")); err != nil {
		p.log.Warn("pod CIDRs cannot be kept over a restart", "file", p.file, "error", err)
	}
}

// ParsePodCIDRs reads address ranges for pods, joined by commas: one of IPv4, one of IPv6, or both.
func ParsePodCIDRs(joined string) ([]netip.Prefix, error) {
	cidrs, err := parseCIDRs(joined)
	if err == nil && len(cidrs) == 0 {
		err = errors.New("no address range")
	}
	if err == nil {
		err = checkPodCIDRs(cidrs)
	}
	return cidrs, err
}

func parseCIDRs(joined string) ([]netip.Prefix, error) {
	switch {
	case joined == "":
		return nil, nil
	case len(joined) > maxCIDRs:
		return nil, fmt.Errorf("pod CIDR of %d bytes: %w", len(joined), errdefs.ErrInvalidArgument)
	}
	var out []netip.Prefix
	for cidr := range strings.SplitSeq(joined, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(cidr))
		if err != nil {
			return nil, fmt.Errorf("pod CIDR %q is no address range: %w", cidr, errdefs.ErrInvalidArgument)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

func joinCIDRs(cidrs []netip.Prefix) string {
	var all []string
	for _, p := range cidrs {
		all = append(all, p.String())
	}
	return strings.Join(all, ",")
}

// minHostBits leave addresses for the network itself, the bridge, one pod and, in IPv4, broadcasts.
const minHostBits = 2

// checkPodCIDRs says why no network can be made of these ranges.
func checkPodCIDRs(cidrs []netip.Prefix) error {
	for i, p := range cidrs {
		a := p.Addr()
		switch {
		case a.BitLen()-p.Bits() < minHostBits:
			return fmt.Errorf("pod CIDR %s is too small: %w", p, errdefs.ErrInvalidArgument)
		case a.Is4In6(), a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast():
			return fmt.Errorf("pod CIDR %s has no addresses for pods: %w", p, errdefs.ErrInvalidArgument)
		}
		for _, other := range cidrs[:i] {
			if other.Addr().Is4() == a.Is4() {
				return fmt.Errorf("pod CIDRs %s and %s are of the same family: %w", other, p, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}
