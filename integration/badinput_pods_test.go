//go:build integration

package integration

import (
	"fmt"
	"math"
	"strings"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// badPods are requests of RunPodSandbox.
func badPods() []badRequest {
	const wrong = codes.InvalidArgument
	type pod = runtimeapi.PodSandboxConfig
	var list []badRequest
	add := func(name string, change func(*pod), says ...string) {
		list = append(list, badPod(name, wrong, change, says...))
	}
	for field, set := range map[string]func(*pod, string){
		"metadata.name":      func(p *pod, v string) { p.Metadata.Name = v },
		"metadata.namespace": func(p *pod, v string) { p.Metadata.Namespace = v },
		"metadata.uid":       func(p *pod, v string) { p.Metadata.Uid = v },
		"hostname":           func(p *pod, v string) { p.Hostname = v },
		"log_directory":      func(p *pod, v string) { p.LogDirectory = "/tmp/" + v },
		"linux.cgroup_parent": func(p *pod, v string) {
			p.Linux.CgroupParent = "/" + v
		},
		"dns_config.servers[0]":  func(p *pod, v string) { p.DnsConfig.Servers = []string{v} },
		"dns_config.searches[1]": func(p *pod, v string) { p.DnsConfig.Searches = []string{"a", v} },
		"dns_config.options[0]":  func(p *pod, v string) { p.DnsConfig.Options = []string{v} },
	} {
		for kind, value := range controls {
			add(field+" with "+kind, func(p *pod) { set(p, value) }, "config."+field)
		}
		add(field+" of 64 KiB", func(p *pod) { set(p, longText) }, "config."+field)
	}
	add("no name", func(p *pod) { p.Metadata.Name = "" }, "config.metadata.name")
	add("no metadata", func(p *pod) { p.Metadata = nil }, "config.metadata")
	add("hostname with a blank", func(p *pod) { p.Hostname = "a b" }, "config.hostname", `"a b"`)
	add("hostname with a slash", func(p *pod) { p.Hostname = "../../etc" }, "config.hostname", "../../etc")
	add("hostname of 65 bytes", func(p *pod) { p.Hostname = strings.Repeat("h", 65) }, "config.hostname", "64")
	add("log_directory relative", func(p *pod) { p.LogDirectory = "var/log" }, "config.log_directory", "var/log")
	add("log_directory goes up", func(p *pod) { p.LogDirectory = "/var/log/../../etc" }, "config.log_directory", "..")
	add("log_directory with a name of 256 bytes", func(p *pod) { p.LogDirectory = "/tmp/" + strings.Repeat("n", 256) }, "config.log_directory")
	add("cgroup_parent relative", func(p *pod) { p.Linux.CgroupParent = "berth/x" }, "config.linux.cgroup_parent", "berth/x")
	add("cgroup_parent goes up", func(p *pod) { p.Linux.CgroupParent = "/../../x" }, "config.linux.cgroup_parent", "..")
	add("dns server empty", func(p *pod) { p.DnsConfig.Servers = []string{""} }, "config.dns_config.servers[0]")
	add("dns search with a blank", func(p *pod) { p.DnsConfig.Searches = []string{"a nameserver"} }, "config.dns_config.searches[0]")
	add("dns option with a tab", func(p *pod) { p.DnsConfig.Options = []string{"ndots:5\tx"} }, "config.dns_config.options[0]")
	add("label without a key", func(p *pod) { p.Labels = map[string]string{"": "x"} }, "config.labels")
	add("labels of 1 MiB", func(p *pod) { p.Labels = map[string]string{"k": strings.Repeat("v", 1<<20)} }, "config.labels", `"k"`)
	add("annotation without a key", func(p *pod) { p.Annotations = map[string]string{"": "x"} }, "config.annotations")
	add("annotations of 2 MiB", func(p *pod) {
		p.Annotations = map[string]string{}
		for i := range 2048 {
			p.Annotations[fmt.Sprint("k", i)] = strings.Repeat("v", 1024)
		}
	}, "config.annotations")
	add("windows", func(p *pod) { p.Windows = &runtimeapi.WindowsPodSandboxConfig{} }, "config.windows")

	port := func(name string, change func(*runtimeapi.PortMapping), says ...string) {
		add("port "+name, func(p *pod) {
			m := &runtimeapi.PortMapping{ContainerPort: 80, HostPort: 8080}
			change(m)
			p.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 1, HostPort: 60001}, m}
		}, append(says, "config.port_mappings[1]")...)
	}
	port("of protocol 3", func(m *runtimeapi.PortMapping) { m.Protocol = 3 }, "protocol", "3")
	port("of protocol -1", func(m *runtimeapi.PortMapping) { m.Protocol = -1 }, "protocol", "-1")
	for _, v := range []int32{-1, 65536, math.MaxInt32, math.MinInt32} {
		port(fmt.Sprint("host ", v), func(m *runtimeapi.PortMapping) { m.HostPort = v }, "host_port", fmt.Sprint(v))
		port(fmt.Sprint("container ", v), func(m *runtimeapi.PortMapping) { m.ContainerPort = v }, "container_port", fmt.Sprint(v))
	}
	port("host without container", func(m *runtimeapi.PortMapping) { m.ContainerPort = 0 }, "container_port")
	port("twice", func(m *runtimeapi.PortMapping) { m.HostPort = 60001 }, "host_port", "60001", "twice")
	for _, ip := range []string{"localhost", "1.2.3", "1.2.3.4.5", "256.0.0.1", "::g", "10.0.0.1/8", " 10.0.0.1", "10.0.0.1\n", "-1"} {
		port(fmt.Sprintf("of address %q", ip), func(m *runtimeapi.PortMapping) { m.HostIp = ip }, "host_ip")
	}

	for _, key := range []string{
		"kernel.core_pattern", "kernel/core_pattern", "vm.overcommit_memory", "fs.file-max", "net", "", ".", "..", "net..ipv4", "net/../kernel/core_pattern",
		"net.//.kernel.core_pattern", "net.ipv4.ip_forward\n", "net.ipv4.ip_forward=1", "kernel.shmmax ", "kernel.hostname", "user.max_user_namespaces",
		"net." + strings.Repeat("x", 300), "net.ipv4.conf.\x00", "NET.ipv4.ip_forward",
	} {
		add(fmt.Sprintf("sysctl %.60q", key), func(p *pod) { p.Linux.Sysctls = map[string]string{key: "1"} }, "config.linux.sysctls")
	}
	for _, value := range []string{"1\nkernel.core_pattern=x", "1+kernel.core_pattern=x", "1\x00", "|/bin/x", "$(id)", strings.Repeat("1", 5000)} {
		add(fmt.Sprintf("sysctl value %.60q", value), func(p *pod) { p.Linux.Sysctls = map[string]string{"kernel.shmmax": value} }, "config.linux.sysctls[kernel.shmmax]")
	}
	add("sysctl given twice", func(p *pod) {
		p.Linux.Sysctls = map[string]string{"net.core.somaxconn": "1", "net/core/somaxconn": "2"}
	}, "config.linux.sysctls", "twice")
	add("sysctl of the host's network", func(p *pod) {
		p.Hostname, p.Linux.SecurityContext.NamespaceOptions.Network = "", runtimeapi.NamespaceMode_NODE
		p.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
	}, "config.linux.sysctls", "net.ipv4.ip_forward")
	add("sysctl of the host's IPC", func(p *pod) {
		p.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
		p.Linux.Sysctls = map[string]string{"fs.mqueue.msg_max": "1"}
	}, "config.linux.sysctls", "fs.mqueue.msg_max")

	type ns = runtimeapi.NamespaceOption
	mode := func(field string, v runtimeapi.NamespaceMode, set func(*ns, runtimeapi.NamespaceMode)) {
		add(fmt.Sprintf("namespace %s %d", field, v), func(p *pod) { set(p.Linux.SecurityContext.NamespaceOptions, v) },
			"config.linux.security_context.namespace_options."+field)
	}
	for _, v := range []runtimeapi.NamespaceMode{1, 3, 4, -1, 1000} {
		mode("network", v, func(o *ns, v runtimeapi.NamespaceMode) { o.Network = v })
		mode("ipc", v, func(o *ns, v runtimeapi.NamespaceMode) { o.Ipc = v })
		if v != runtimeapi.NamespaceMode_CONTAINER {
			mode("pid", v, func(o *ns, v runtimeapi.NamespaceMode) { o.Pid = v })
		}
	}
	mapping := func(host, container, length uint32) []*runtimeapi.IDMapping {
		return []*runtimeapi.IDMapping{{HostId: host, ContainerId: container, Length: length}}
	}
	good := mapping(100000, 0, 65536)
	for name, u := range map[string]*runtimeapi.UserNamespace{
		"CONTAINER":            {Mode: runtimeapi.NamespaceMode_CONTAINER, Uids: good, Gids: good},
		"TARGET":               {Mode: runtimeapi.NamespaceMode_TARGET, Uids: good, Gids: good},
		"POD without ids":      {Mode: runtimeapi.NamespaceMode_POD},
		"POD without groups":   {Mode: runtimeapi.NamespaceMode_POD, Uids: good},
		"two ranges":           {Mode: runtimeapi.NamespaceMode_POD, Uids: append(mapping(1, 1, 1), good...), Gids: good},
		"no root":              {Mode: runtimeapi.NamespaceMode_POD, Uids: mapping(100000, 1, 65536), Gids: good},
		"nothing mapped":       {Mode: runtimeapi.NamespaceMode_POD, Uids: mapping(100000, 0, 0), Gids: good},
		"beyond the last id":   {Mode: runtimeapi.NamespaceMode_POD, Uids: mapping(math.MaxUint32, 0, 65536), Gids: good},
		"NODE with a range":    {Mode: runtimeapi.NamespaceMode_NODE, Uids: good},
		"of mode number 1,000": {Mode: 1000},
	} {
		add("user namespace "+name, func(p *pod) { p.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u },
			"config.linux.security_context.namespace_options.userns_options")
	}

	type sc = runtimeapi.LinuxSandboxSecurityContext
	security := func(name string, change func(*sc), says ...string) {
		add(name, func(p *pod) { change(p.Linux.SecurityContext) }, says...)
	}
	for _, id := range []int64{-1, 1 << 31, 1 << 32, math.MaxInt64, math.MinInt64} {
		const at = "config.linux.security_context."
		security(fmt.Sprint("run_as_user ", id), func(s *sc) { s.RunAsUser = &runtimeapi.Int64Value{Value: id} }, at+"run_as_user", fmt.Sprint(id))
		security(fmt.Sprint("run_as_group ", id), func(s *sc) {
			s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{}, &runtimeapi.Int64Value{Value: id}
		}, at+"run_as_group", fmt.Sprint(id))
		security(fmt.Sprint("supplemental group ", id), func(s *sc) { s.SupplementalGroups = []int64{1, id} }, at+"supplemental_groups[1]", fmt.Sprint(id))
	}
	security("65,537 groups", func(s *sc) { s.SupplementalGroups = make([]int64, 65537) }, "supplemental_groups", "65537")
	security("groups policy 2", func(s *sc) { s.SupplementalGroupsPolicy = 2 }, "supplemental_groups_policy", "2")
	for field, set := range map[string]func(*sc, *runtimeapi.SecurityProfile){
		"seccomp":  func(s *sc, p *runtimeapi.SecurityProfile) { s.Seccomp = p },
		"apparmor": func(s *sc, p *runtimeapi.SecurityProfile) { s.Apparmor = p },
	} {
		for name, profile := range badProfiles {
			security(field+" "+name, func(s *sc) { set(s, profile) }, "config.linux.security_context."+field)
		}
	}
	security("old seccomp profile of no kind", func(s *sc) { s.Seccomp, s.SeccompProfilePath = nil, "whatever" }, "seccomp_profile_path", "whatever") //nolint:staticcheck // deprecated, not gone
	return list
}

// badProfiles are wrong for seccomp and AppArmor, pods and containers.
var badProfiles = map[string]*runtimeapi.SecurityProfile{
	"of type 3":             {ProfileType: 3},
	"of type -1":            {ProfileType: -1},
	"Localhost, nameless":   {ProfileType: runtimeapi.SecurityProfile_Localhost},
	"default with a name":   {LocalhostRef: "/x"},
	"none with a name":      {ProfileType: runtimeapi.SecurityProfile_Unconfined, LocalhostRef: "/x"},
	"with a line break":     {ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "/a\nb"},
	"with a NUL byte":       {ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "/a\x00b"},
	"with 64 KiB of a name": {ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "/" + longText},
}
