package spec

import (
	"maps"
	"slices"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ipcSysctls live in the IPC namespace; fs.mqueue.* does too.
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
	"kernel.shm_rmid_forced",
}

const (
	unprivilegedPorts = "net.ipv4.ip_unprivileged_port_start"
	pingGroups        = "net.ipv4.ping_group_range"
	sysctlField       = "config.linux.sysctls"
)

// SandboxSysctls returns what to set in the pod's namespaces: names in dotted form, where "/" within a name stands for a
// dot of an interface's name (net.ipv4.conf.eth0/100.forwarding), as in sysctl(8). Only what belongs to a namespace that
// the pod has for itself is allowed, and only values that cannot be read as a second setting (CVE-2022-0811,
// CVE-2022-0532). Unless the pod says otherwise its own network lets every user bind low ports and, without a user
// namespace of its own, send pings, as containerd's does. berth sets them once, for the pod: container specifications have none.
func SandboxSysctls(cfg *cri.PodSandboxConfig) (map[string]string, error) {
	return sandboxSysctls(sysctlField, cfg)
}

func sandboxSysctls(at string, cfg *cri.PodSandboxConfig) (map[string]string, error) {
	given := cfg.GetLinux().GetSysctls()
	out := make(map[string]string, len(given)+2)
	for _, name := range slices.Sorted(maps.Keys(given)) { // sorted: the same request gives the same error
		dotted, ok := sysctlName(name)
		if !ok {
			return nil, invalid(at, name, "is not the name of a sysctl")
		}
		if _, twice := out[dotted]; twice {
			return nil, invalid(at, name, "is given twice, as %q with dots", dotted)
		}
		switch {
		case strings.HasPrefix(dotted, "net."):
			if HostNetwork(cfg) {
				return nil, invalid(at, name, "would change the node's network, which this pod uses")
			}
		case slices.Contains(ipcSysctls, dotted) || strings.HasPrefix(dotted, "fs.mqueue."):
			if HostIPC(cfg) {
				return nil, invalid(at, name, "would change the node's IPC namespace, which this pod uses")
			}
		default:
			return nil, invalid(at, name, "does not belong to a namespace of the pod")
		}
		if !sysctlValue(given[name]) {
			return nil, invalid(at+"["+name+"]", given[name], "is not a value: letters, digits, blanks and .,:_- only")
		}
		out[dotted] = given[name]
	}
	if !HostNetwork(cfg) {
		setDefault(out, unprivilegedPorts, "0")
		// All groups of a user namespace are not known to be mapped, and a range that is not is refused by the kernel.
		if _, own := Userns(cfg); !own {
			setDefault(out, pingGroups, "0 2147483647")
		}
	}
	return out, nil
}

func setDefault(m map[string]string, key, value string) {
	if _, ok := m[key]; !ok {
		m[key] = value
	}
}

// sysctlName brings a name into dotted form. The first separator decides which one separates, as for sysctl(8).
func sysctlName(name string) (string, bool) {
	if len(name) > 255 {
		return "", false
	}
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '/' {
		name = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	parts := strings.Split(name, ".")
	if len(parts) < 2 {
		return "", false
	}
	for _, part := range parts {
		// A part is one file name below /proc/sys: "//" there would be "..".
		if file := strings.ReplaceAll(part, "/", "."); file == "" || file == "." || file == ".." {
			return "", false
		}
		if strings.ContainsFunc(part, func(r rune) bool { return !word(r) && !strings.ContainsRune("-/@:+", r) }) {
			return "", false
		}
	}
	return name, true
}

// sysctlValue accepts numbers, lists, ranges, addresses and words such as those of congestion controls.
func sysctlValue(v string) bool {
	return len(v) <= 4096 && !strings.ContainsFunc(v, func(r rune) bool { return !word(r) && !strings.ContainsRune(" \t.,:-", r) })
}

func word(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_'
}
