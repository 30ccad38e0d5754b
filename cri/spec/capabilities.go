package spec

import (
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// defaultCapabilities are those of a container that asks for nothing, the set that Docker and containerd give.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// allCapabilities are those of Linux 5.9 and later, by number.
var allCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

const everyCapability = "CAP_ALL"

// capability brings a name into the kernel's form: the CRI's has no prefix and any case.
func capability(name string) string {
	name = strings.ToUpper(name)
	if !strings.HasPrefix(name, "CAP_") {
		name = "CAP_" + name
	}
	return name
}

func validateCapabilities(c *cri.Capability) error {
	for _, list := range []struct {
		field string
		names []string
		all   bool
	}{
		{"add_capabilities", c.GetAddCapabilities(), true},
		{"drop_capabilities", c.GetDropCapabilities(), true},
		{"add_ambient_capabilities", c.GetAddAmbientCapabilities(), false},
	} {
		for i, name := range list.names {
			if full := capability(name); !slices.Contains(allCapabilities, full) && (!list.all || full != everyCapability) {
				return invalid(index(securityContext+".capabilities."+list.field, i), name, "is not a capability")
			}
		}
	}
	return nil
}

// capabilities decides what a container may do: the default, then "add ALL", "drop ALL", single additions, single drops.
//
// The inheritable set is empty (CVE-2022-24769, CVE-2022-29162: with it, a program with inheritable file capabilities
// regains what its user had lost), save for ambient capabilities that were asked for: the kernel keeps ambient a subset
// of inheritable.
func capabilities(sc *cri.LinuxContainerSecurityContext, h Host) (*specs.LinuxCapabilities, error) {
	held := h.Capabilities
	if held == nil {
		held = allCapabilities
	}
	has := func(c string) bool { return slices.Contains(held, c) }
	set := map[string]bool{}
	for _, c := range defaultCapabilities {
		set[c] = has(c)
	}
	request := sc.GetCapabilities()
	var ambient []string
	if sc.GetPrivileged() {
		for _, c := range held {
			set[c] = true
		}
	} else {
		if containsCapability(request.GetAddCapabilities(), everyCapability) {
			for _, c := range held {
				set[c] = true
			}
		}
		if containsCapability(request.GetDropCapabilities(), everyCapability) {
			clear(set)
		}
		for _, list := range []struct {
			field   string
			names   []string
			ambient bool
		}{
			{"add_capabilities", request.GetAddCapabilities(), false},
			{"add_ambient_capabilities", request.GetAddAmbientCapabilities(), true},
		} {
			for i, name := range list.names {
				c := capability(name)
				if c == everyCapability {
					continue
				}
				if !has(c) {
					return nil, unmet(index(securityContext+".capabilities."+list.field, i), name,
						"is a capability that berth does not have on this host and cannot give")
				}
				set[c] = true
				if list.ambient {
					ambient = append(ambient, c)
				}
			}
		}
		for _, name := range request.GetDropCapabilities() {
			delete(set, capability(name))
		}
	}
	// By number, not by chance: the specification of the same request is always the same.
	pick := func(ok func(string) bool) []string {
		list := []string{}
		for _, c := range allCapabilities {
			if ok(c) {
				list = append(list, c)
			}
		}
		return list
	}
	all := func(c string) bool { return set[c] }
	raised := func(c string) bool { return set[c] && slices.Contains(ambient, c) }
	return &specs.LinuxCapabilities{
		Bounding: pick(all), Effective: pick(all), Permitted: pick(all), Inheritable: pick(raised), Ambient: pick(raised),
	}, nil
}

func containsCapability(names []string, want string) bool {
	return slices.ContainsFunc(names, func(name string) bool { return capability(name) == want })
}
