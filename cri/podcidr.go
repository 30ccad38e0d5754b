package cri

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/berth-run/berth/internal/file"
)

// maxCIDRFile bounds what is read back.
const maxCIDRFile = 4096

// podCIDRs is the address ranges of the node's pods. The kubelet tells them once, when they change, and not again when
// berth restarts: so they are kept in a file.
type podCIDRs struct {
	file string
	log  *slog.Logger

	mu      sync.Mutex
	current []netip.Prefix
}

// openPodCIDRs reads the file. What cannot be read is logged and forgotten: the kubelet's next change writes it anew.
func openPodCIDRs(file string, log *slog.Logger) *podCIDRs {
	p := &podCIDRs{file: file, log: log}
	if file == "" {
		return p
	}
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return p
	}
	var data []byte
	if err == nil && info.Size() > maxCIDRFile {
		err = fmt.Errorf("%d bytes are too many", info.Size())
	}
	if err == nil {
		data, err = os.ReadFile(file)
	}
	if err == nil {
		p.current, err = parseCIDRs(strings.TrimSpace(string(data)))
	}
	if err != nil {
		log.Warn("pod CIDRs cannot be read back", "file", file, "error", err)
	}
	return p
}

// get returns the ranges in the order in which the kubelet gave them.
func (p *podCIDRs) get() []netip.Prefix {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.current)
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
	if len(prefixes) == 0 || slices.Equal(prefixes, p.current) {
		return
	}
	p.log.Info("pod CIDRs handed over by the kubelet", "cidrs", joined)
	p.current = prefixes
	if p.file == "" {
		return
	}
	if err := file.Replace(p.file, []byte(joined+"\n")); err != nil {
		p.log.Warn("pod CIDRs cannot be kept over a restart", "file", p.file, "error", err)
	}
}

func parseCIDRs(joined string) ([]netip.Prefix, error) {
	if joined == "" {
		return nil, nil
	}
	var out []netip.Prefix
	for cidr := range strings.SplitSeq(joined, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(cidr))
		if err != nil {
			return nil, invalid("pod_cidr", cidr, "is no address range")
		}
		out = append(out, p)
	}
	return out, nil
}
