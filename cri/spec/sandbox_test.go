package spec

import (
	"maps"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pod is a plain sandbox with a change.
func pod(change func(*cri.PodSandboxConfig)) *cri.PodSandboxConfig {
	cfg := request(nil).Sandbox
	change(cfg)
	return cfg
}

func TestSandboxSysctls(t *testing.T) {
	node := func(network, ipc bool) *cri.LinuxSandboxSecurityContext {
		ns := &cri.NamespaceOption{}
		if network {
			ns.Network = cri.NamespaceMode_NODE
		}
		if ipc {
			ns.Ipc = cri.NamespaceMode_NODE
		}
		return &cri.LinuxSandboxSecurityContext{NamespaceOptions: ns}
	}
	defaults := map[string]string{unprivilegedPorts: "0", pingGroups: "0 2147483647"}
	for _, c := range []struct {
		name         string
		given        map[string]string
		network, ipc bool
		want         map[string]string // over the defaults; nil: refused
		word         string
	}{
		{"defaults", nil, false, false, map[string]string{}, ""},
		{"none on the host's network", nil, true, true, map[string]string{unprivilegedPorts: "-", pingGroups: "-"}, ""},
		{"the pod's own", map[string]string{unprivilegedPorts: "1024"}, false, false, map[string]string{unprivilegedPorts: "1024"}, ""},
		{"with slashes", map[string]string{"net/ipv4/ping_group_range": "1 0"}, false, false, map[string]string{pingGroups: "1 0"}, ""},
		{"critest", map[string]string{"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100"}, false, false, map[string]string{"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100"}, ""},
		{"interface with a dot", map[string]string{"net/ipv4/conf/eno2.100/rp_filter": "1"}, false, false, map[string]string{"net.ipv4.conf.eno2/100.rp_filter": "1"}, ""},
		{"same, dotted", map[string]string{"net.ipv4.conf.eno2/100.rp_filter": "1"}, false, false, map[string]string{"net.ipv4.conf.eno2/100.rp_filter": "1"}, ""},
		{"lists and words", map[string]string{"kernel.sem": "250\t32000 32 128", "net.ipv4.tcp_congestion_control": "bbr", "net.ipv4.ip_local_reserved_ports": "8080,30000-32767", "net.ipv6.conf.all.stable_secret": "2001:db8::1"}, false, false, map[string]string{"kernel.sem": "250\t32000 32 128", "net.ipv4.tcp_congestion_control": "bbr", "net.ipv4.ip_local_reserved_ports": "8080,30000-32767", "net.ipv6.conf.all.stable_secret": "2001:db8::1"}, ""},
		{"IPC with the host's network", map[string]string{"kernel.shmmax": "1"}, true, false, map[string]string{unprivilegedPorts: "-", pingGroups: "-", "kernel.shmmax": "1"}, ""},
		{"twice", map[string]string{"net.core.somaxconn": "1", "net/core/somaxconn": "2"}, false, false, nil, "twice"},
		{"not namespaced", map[string]string{"kernel.core_pattern": "x"}, false, false, nil, "kernel.core_pattern"},
		{"not namespaced, slashes", map[string]string{"kernel/core_pattern": "x"}, false, false, nil, "kernel/core_pattern"},
		{"vm", map[string]string{"vm.overcommit_memory": "1"}, false, false, nil, "vm.overcommit_memory"},
		{"nearly", map[string]string{"kernel.shmmaxx": "1"}, false, false, nil, "kernel.shmmaxx"},
		{"nearly net", map[string]string{"network.x": "1"}, false, false, nil, "network.x"},
		{"user", map[string]string{"user.max_user_namespaces": "1"}, false, false, nil, "user.max"},
		{"hostname", map[string]string{"kernel.hostname": "x"}, false, false, nil, "kernel.hostname"},
		{"upwards", map[string]string{"net/../kernel/core_pattern": "x"}, false, false, nil, "not the name"},
		{"upwards by slashes", map[string]string{"net.//.kernel.core_pattern": "x"}, false, false, nil, "not the name"},
		{"empty part", map[string]string{"net..core": "x"}, false, false, nil, "not the name"},
		{"nothing", map[string]string{"": "x"}, false, false, nil, "not the name"},
		{"one part", map[string]string{"net": "x"}, false, false, nil, "not the name"},
		{"blank in the name", map[string]string{"net.core.a b": "x"}, false, false, nil, "not the name"},
		{"control character in the name", map[string]string{"net.core.a\n": "x"}, false, false, nil, "not the name"},
		{"equals in the name", map[string]string{"net.core.a=1+kernel.x": "x"}, false, false, nil, "not the name"},
		{"very long name", map[string]string{"net." + strings.Repeat("a", 300): "x"}, false, false, nil, "not the name"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := pod(func(p *cri.PodSandboxConfig) {
				p.Linux.Sysctls, p.Linux.SecurityContext = c.given, node(c.network, c.ipc)
			})
			before := maps.Clone(c.given)
			got, err := SandboxSysctls(cfg)
			if c.want == nil {
				refused(t, err, errdefs.ErrInvalidArgument, "config.linux.sysctls", c.word)
				refused(t, ValidateSandbox(cfg), errdefs.ErrInvalidArgument, "config.linux.sysctls", c.word)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := maps.Clone(defaults)
			for k, v := range c.want {
				if want[k] = v; v == "-" {
					delete(want, k)
				}
			}
			if !maps.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
			if !maps.Equal(cfg.Linux.Sysctls, before) {
				t.Error("the request was changed")
			}
		})
	}
}

func TestCVE_2022_0811_SysctlSmugglesAnother(t *testing.T) {
	for _, v := range []string{"1+kernel.core_pattern=x", "1\nkernel.core_pattern=x", "1\x00", "1=2", "|/bin/sh", "a;b", "1\r", "é", strings.Repeat("1", 5000)} {
		for _, key := range []string{"kernel.shmmax", "net.core.somaxconn", "fs/mqueue/msg_max"} {
			cfg := pod(func(p *cri.PodSandboxConfig) { p.Linux.Sysctls = map[string]string{key: v} })
			refused(t, ValidateSandbox(cfg), errdefs.ErrInvalidArgument, "config.linux.sysctls["+key+"]")
		}
	}
}

func TestCVE_2022_0532_SysctlsOfTheHost(t *testing.T) {
	for _, c := range []struct {
		key string
		ns  *cri.NamespaceOption
	}{
		{"net.ipv4.ip_forward", &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}},
		{"net/ipv4/ip_forward", &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}},
		{"kernel.shmmax", &cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE}},
		{"fs.mqueue.msg_max", &cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE}},
	} {
		cfg := pod(func(p *cri.PodSandboxConfig) {
			p.Linux.Sysctls, p.Linux.SecurityContext.NamespaceOptions = map[string]string{c.key: "1"}, c.ns
		})
		refused(t, ValidateSandbox(cfg), errdefs.ErrInvalidArgument, "config.linux.sysctls", c.key)
	}
	// The specification of a container has none, whatever the pod has: they were set when its namespaces were made.
	s := mustContainer(t, func(in *Input) { in.Sandbox.Linux.Sysctls = map[string]string{"kernel.shmmax": "1"} }).Spec
	if len(s.Linux.Sysctl) > 0 {
		t.Errorf("sysctls %v", s.Linux.Sysctl)
	}
}

func TestResolvConf(t *testing.T) {
	host := []byte("nameserver 192.0.2.1\n")
	for _, c := range []struct {
		name string
		dns  *cri.DNSConfig
		want string
	}{
		{"nil is the node's", nil, string(host)},
		{"empty is empty", &cri.DNSConfig{}, ""},
		{
			"all", &cri.DNSConfig{Servers: []string{"10.96.0.10", "fd00::a"}, Searches: []string{"a.svc", "svc"}, Options: []string{"ndots:5", "edns0"}},
			"search a.svc svc\nnameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5 edns0\n",
		},
		{"servers alone", &cri.DNSConfig{Servers: []string{"10.0.0.1"}}, "nameserver 10.0.0.1\n"},
	} {
		got := ResolvConf(c.dns, host)
		if string(got) != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		if len(got) > 0 {
			got[0] = 'X'
		}
	}
	if host[0] == 'X' {
		t.Error("the node's file is shared")
	}
}

func TestHostname(t *testing.T) {
	if got := Hostname(&cri.PodSandboxConfig{Hostname: "web"}, testHost(2)); got != "web" {
		t.Errorf("got %q", got)
	}
	if got := Hostname(&cri.PodSandboxConfig{}, testHost(2)); got != "node-1" {
		t.Errorf("got %q", got)
	}
}

func TestSandboxRefused(t *testing.T) {
	for _, c := range []struct {
		word   string
		change func(*cri.PodSandboxConfig)
	}{
		{"config.metadata.name: is empty", func(p *cri.PodSandboxConfig) { p.Metadata = nil }},
		{"config.metadata.name: is empty", func(p *cri.PodSandboxConfig) { p.Metadata.Name = "" }},
		{"config.metadata.name", func(p *cri.PodSandboxConfig) { p.Metadata.Name = "a\nb" }},
		{"config.metadata.namespace", func(p *cri.PodSandboxConfig) { p.Metadata.Namespace = "a\x00" }},
		{"config.metadata.uid", func(p *cri.PodSandboxConfig) { p.Metadata.Uid = "a\x1b" }},
		{"config.metadata.name", func(p *cri.PodSandboxConfig) { p.Metadata.Name = strings.Repeat("a", 1025) }},
		{"config.metadata.namespace", func(p *cri.PodSandboxConfig) { p.Metadata.Namespace = strings.Repeat("a", 1025) }},
		{"config.metadata.uid", func(p *cri.PodSandboxConfig) { p.Metadata.Uid = strings.Repeat("a", 1025) }},
		{"config.log_directory", func(p *cri.PodSandboxConfig) { p.LogDirectory = "logs" }},
		{"config.log_directory", func(p *cri.PodSandboxConfig) { p.LogDirectory = "/var/log/../../etc" }},
		{"config.log_directory", func(p *cri.PodSandboxConfig) { p.LogDirectory = "/var/log\n" }},
		{"config.log_directory", func(p *cri.PodSandboxConfig) { p.LogDirectory = "/var/" + strings.Repeat("n", 256) }},
		{"config.log_directory", func(p *cri.PodSandboxConfig) { p.LogDirectory = strings.Repeat("/var", 1024) }},
		{"config.linux.cgroup_parent", func(p *cri.PodSandboxConfig) { p.Linux.CgroupParent = "kubepods" }},
		{"config.linux.cgroup_parent", func(p *cri.PodSandboxConfig) { p.Linux.CgroupParent = "/a/../../b" }},
		{"config.linux.cgroup_parent", func(p *cri.PodSandboxConfig) { p.Linux.CgroupParent = "/a\n" }},
		{"config.port_mappings[0].host_port: 65536", func(p *cri.PodSandboxConfig) {
			p.PortMappings = []*cri.PortMapping{{ContainerPort: 1, HostPort: 65536}}
		}},
		{"config.port_mappings[0].host_port: -1", func(p *cri.PodSandboxConfig) { p.PortMappings = []*cri.PortMapping{{ContainerPort: 1, HostPort: -1}} }},
		{"config.port_mappings[0].container_port: 0", func(p *cri.PodSandboxConfig) { p.PortMappings = []*cri.PortMapping{{HostPort: 80}} }},
		{"config.port_mappings[0].container_port: -1", func(p *cri.PodSandboxConfig) { p.PortMappings = []*cri.PortMapping{{ContainerPort: -1}} }},
		{"config.port_mappings[1].protocol: 3", func(p *cri.PodSandboxConfig) { p.PortMappings = []*cri.PortMapping{{ContainerPort: 1}, {Protocol: 3}} }},
		{"config.port_mappings[0].host_ip", func(p *cri.PodSandboxConfig) {
			p.PortMappings = []*cri.PortMapping{{ContainerPort: 1, HostIp: "127.0.0.1; x"}}
		}},
		{"config.linux.security_context.run_as_group.value", func(p *cri.PodSandboxConfig) { p.Linux.SecurityContext.RunAsGroup = id(-5) }},
		{"config.linux.security_context.supplemental_groups[0]", func(p *cri.PodSandboxConfig) { p.Linux.SecurityContext.SupplementalGroups = []int64{1 << 31} }},
		{"config.linux.security_context.supplemental_groups_policy: 5", func(p *cri.PodSandboxConfig) { p.Linux.SecurityContext.SupplementalGroupsPolicy = 5 }},
		{"config.linux.security_context.seccomp.profile_type: 4", func(p *cri.PodSandboxConfig) { p.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: 4} }},
		{"config.linux.security_context.apparmor.localhost_ref", func(p *cri.PodSandboxConfig) { p.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: 2} }},
		{"config.linux.security_context.namespace_options.network: CONTAINER", func(p *cri.PodSandboxConfig) {
			p.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Network: cri.NamespaceMode_CONTAINER}
		}},
	} {
		refused(t, ValidateSandbox(pod(c.change)), errdefs.ErrInvalidArgument, c.word)
	}
	refused(t, ValidateSandbox(nil), errdefs.ErrInvalidArgument, "config.metadata.name")
	for name, change := range map[string]func(*cri.PodSandboxConfig){
		"without linux":    func(p *cri.PodSandboxConfig) { p.Linux = nil },
		"without security": func(p *cri.PodSandboxConfig) { p.Linux.SecurityContext = nil },
		"no logs":          func(p *cri.PodSandboxConfig) { p.LogDirectory = "" },
		"no host port":     func(p *cri.PodSandboxConfig) { p.PortMappings = []*cri.PortMapping{{ContainerPort: 80}} },
		"host ip": func(p *cri.PodSandboxConfig) {
			p.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 80, HostIp: "::1"}}
		},
		"dots in names": func(p *cri.PodSandboxConfig) { p.LogDirectory = "/var/log/a..b" },
	} {
		if err := ValidateSandbox(pod(change)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCVE_2026_15809_ControlCharactersInHostnameAndDNS(t *testing.T) {
	for word, change := range map[string]func(*cri.PodSandboxConfig, string){
		"config.hostname":               func(p *cri.PodSandboxConfig, s string) { p.Hostname = s },
		"config.dns_config.servers[0]":  func(p *cri.PodSandboxConfig, s string) { p.DnsConfig = &cri.DNSConfig{Servers: []string{s}} },
		"config.dns_config.searches[1]": func(p *cri.PodSandboxConfig, s string) { p.DnsConfig = &cri.DNSConfig{Searches: []string{"a", s}} },
		"config.dns_config.options[0]":  func(p *cri.PodSandboxConfig, s string) { p.DnsConfig = &cri.DNSConfig{Options: []string{s}} },
	} {
		for _, s := range []string{"a\nnameserver 6.6.6.6", "a\rb", "a\x00", "a b", "a\tb"} {
			refused(t, ValidateSandbox(pod(func(p *cri.PodSandboxConfig) { change(p, s) })), errdefs.ErrInvalidArgument, word)
		}
		if err := ValidateSandbox(pod(func(p *cri.PodSandboxConfig) { change(p, `a\nb`) })); err != nil {
			t.Errorf("a backslash and an n are no newline: %v", err)
		}
	}
	refused(t, ValidateSandbox(pod(func(p *cri.PodSandboxConfig) { p.Hostname = strings.Repeat("a", 65) })), errdefs.ErrInvalidArgument, "64 bytes")
	refused(t, ValidateSandbox(pod(func(p *cri.PodSandboxConfig) { p.Hostname = "a/b" })), errdefs.ErrInvalidArgument, "config.hostname")
	refused(t, ValidateSandbox(pod(func(p *cri.PodSandboxConfig) { p.DnsConfig = &cri.DNSConfig{Servers: []string{""}} })), errdefs.ErrInvalidArgument, "servers[0]")
}

func TestContainerRefused(t *testing.T) {
	for _, c := range []struct {
		word   string
		change func(*cri.ContainerConfig)
	}{
		{"config.metadata.name: is empty", func(c *cri.ContainerConfig) { c.Metadata = nil }},
		{"config.metadata.name", func(c *cri.ContainerConfig) { c.Metadata.Name = "a\n" }},
		{"config.metadata.name", func(c *cri.ContainerConfig) { c.Metadata.Name = strings.Repeat("a", 1025) }},
		{"config.image.image: is empty", func(c *cri.ContainerConfig) { c.Image = nil }},
		{"config.image.image", func(c *cri.ContainerConfig) { c.Image.Image = "a\n" }},
		{"config.log_path", func(c *cri.ContainerConfig) { c.LogPath = "../x" }},
		{"config.log_path", func(c *cri.ContainerConfig) { c.LogPath = "a/../../x" }},
		{"config.log_path", func(c *cri.ContainerConfig) { c.LogPath = "/etc/passwd" }},
		{"config.log_path", func(c *cri.ContainerConfig) { c.LogPath = "a\nb" }},
		{"config.log_path", func(c *cri.ContainerConfig) { c.LogPath = strings.Repeat("n", 256) }},
		{"config.log_path", func(c *cri.ContainerConfig) { c.LogPath = strings.Repeat("n/", 2045) }}, // with the directory
		{"config.image.image", func(c *cri.ContainerConfig) { c.Image.Image = strings.Repeat("a", 1025) }},
		{"config.devices[0].container_path", func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{ContainerPath: "/", HostPath: "/dev/null", Permissions: "r"}}
		}},
		{"config.devices[0].host_path", func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{ContainerPath: "/dev/x", HostPath: "/dev/..", Permissions: "r"}}
		}},
		{"config.stop_signal: 99", func(c *cri.ContainerConfig) { c.StopSignal = 99 }},
	} {
		refuse(t, func(in *Input) { c.change(in.Container) }, c.word)
	}
	refused(t, ValidateContainer(nil, nil), errdefs.ErrInvalidArgument, "config.metadata.name")
	minimal := &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: "a"}, Image: &cri.ImageSpec{Image: "b"}}
	if err := ValidateContainer(&cri.PodSandboxConfig{}, minimal); err != nil {
		t.Errorf("nothing but a name and an image: %v", err)
	}
}

func TestStopSignal(t *testing.T) {
	for _, c := range []struct {
		request cri.Signal
		image   string
		number  syscall.Signal
		name    string
	}{
		{0, "", 15, "SIGTERM"},
		{0, "SIGQUIT", 3, "SIGQUIT"},
		{0, "quit", 3, "SIGQUIT"},
		{0, "9", 9, "SIGKILL"},
		{0, "37", 37, "SIGRTMIN+3"},
		{0, "RTMIN+3", 37, "SIGRTMIN+3"},
		{0, "SIGRTMIN", 34, "SIGRTMIN"},
		{0, "SIGRTMAX-1", 63, "SIGRTMAX-1"},
		{0, "SIGRTMAX", 64, "SIGRTMAX"},
		{0, "SIGPOLL", 29, "SIGIO"},
		{0, "SIGRTMIN+30", 64, "SIGRTMAX"},
		{cri.Signal_SIGNAL_SIGHUP, "SIGQUIT", 1, "SIGHUP"},
		{cri.Signal_SIGNAL_SIGRTMINPLUS15, "", 49, "SIGRTMIN+15"},
		{cri.Signal_SIGNAL_SIGRTMAXMINUS14, "", 50, "SIGRTMAX-14"},
		{cri.Signal_SIGNAL_SIGCLD, "", 17, "SIGCHLD"},
		{cri.Signal_SIGNAL_SIGIOT, "nonsense", 6, "SIGABRT"},
	} {
		number, name, err := StopSignal(&cri.ContainerConfig{StopSignal: c.request}, c.image)
		if err != nil || number != c.number || name != c.name {
			t.Errorf("%v, %q: %d %s %v, want %d %s", c.request, c.image, number, name, err, c.number, c.name)
		}
	}
	for value, name := range cri.Signal_name {
		number, _, err := StopSignal(&cri.ContainerConfig{StopSignal: cri.Signal(value)}, "")
		if err != nil || number < 1 || number > 64 {
			t.Errorf("%s: %d, %v", name, number, err)
		}
	}
	for _, s := range []string{"SIG", "SIGFOO", "0", "65", "-1", "RTMIN-1", "RTMAX+1", "RTMIN+31", "RTMIN+", "SIGTERM\n", "SIGRTMAX-31", "RTMIN+99999999999"} {
		refuse(t, func(in *Input) { in.Image.StopSignal = s }, "image stop signal")
	}
	out := mustContainer(t, func(in *Input) { in.Image.StopSignal = "SIGUSR1" })
	if out.StopSignal != syscall.SIGUSR1 || out.StopSignalName != "SIGUSR1" {
		t.Errorf("%d %s", out.StopSignal, out.StopSignalName)
	}
}

func TestErrorsAreShortAndShowNoControlCharacters(t *testing.T) {
	err := ValidateSandbox(pod(func(p *cri.PodSandboxConfig) { p.Hostname = "\n" + strings.Repeat("x", 10_000) }))
	if controls(err.Error()) || len(err.Error()) > 300 {
		t.Errorf("%q", err)
	}
	err = ValidateSandbox(pod(func(p *cri.PodSandboxConfig) {
		p.Linux.Sysctls = map[string]string{"net.x\n" + strings.Repeat("x", 10_000): "1"}
	}))
	if controls(err.Error()) || len(err.Error()) > 300 {
		t.Errorf("%q", err)
	}
}
