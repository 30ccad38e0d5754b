package explain

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// target is what is asked about: a Service, by its name and perhaps a port's, or an address, perhaps with a port.
type target struct {
	service types.NamespacedName
	// portName is a port's name, or its number.
	portName string
	addr     netip.Addr // invalid for node ports at any address, and for Services
	port     uint16     // 0 for all
	protocol model.Protocol
}

func (t *target) byName() bool { return t.service.Name != "" }

// readTarget reads NAMESPACE/SERVICE[:PORT], ADDRESS[:PORT] or :PORT, each with /PROTOCOL or without.
func readTarget(text string) (t target, err error) {
	rest := text
	if i := strings.LastIndexByte(rest, '/'); i >= 0 {
		for _, p := range []model.Protocol{model.TCP, model.UDP, model.SCTP} {
			if strings.EqualFold(rest[i+1:], p.String()) && (strings.Contains(rest[:i], "/") || strings.Contains(rest[:i], ":") || isAddr(rest[:i])) {
				t.protocol, rest = p, rest[:i]
				break
			}
		}
	}
	if namespace, name, ok := strings.Cut(rest, "/"); ok {
		name, t.portName, _ = strings.Cut(name, ":")
		t.service = types.NamespacedName{Namespace: namespace, Name: name}
		if namespace == "" || strings.ContainsAny(namespace, ".:") || name == "" || strings.ContainsAny(t.portName, "/:") {
			return t, fmt.Errorf("%q is neither NAMESPACE/SERVICE[:PORT] nor ADDRESS[:PORT], with /tcp, /udp or /sctp behind it or without", text)
		}
		return t, nil
	}
	if a, err := netip.ParseAddr(rest); err == nil {
		t.addr = a.Unmap().WithZone("")
		return t, nil
	}
	if port, ok := strings.CutPrefix(rest, ":"); ok {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return t, fmt.Errorf("%q: %q is no port from 1 to 65535", text, port)
		}
		t.port = uint16(n)
		return t, nil
	}
	at, err := netip.ParseAddrPort(rest)
	if err != nil || at.Port() == 0 {
		return t, fmt.Errorf("%q is neither ADDRESS:PORT ([ADDRESS]:PORT for IPv6), ADDRESS, :NODEPORT, nor NAMESPACE/SERVICE[:PORT], with /tcp, /udp or /sctp behind it or without", text)
	}
	t.addr, t.port = at.Addr().Unmap().WithZone(""), at.Port()
	return t, nil
}

func isAddr(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}
