//go:build integration

package integration

import (
	"fmt"
	"math"
	"strings"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// badSecurity are requests of CreateContainer that are wrong in what confines the container: security context, resources.
func badSecurity() []badRequest {
	type sc = runtimeapi.LinuxContainerSecurityContext
	const at = "config.linux.security_context."
	var list []badRequest
	add := func(name string, code codes.Code, change func(*sc), says ...string) {
		list = append(list, badContainer(name, code, func(c *containerConfig) { change(c.Linux.SecurityContext) }, says...))
	}
	const wrong = codes.InvalidArgument
	add("privileged in a pod that is not", wrong, func(s *sc) { s.Privileged = true }, at+"privileged")
	for _, id := range []int64{-1, 1 << 31, 1 << 32, math.MaxInt64, math.MinInt64} {
		add(fmt.Sprint("run_as_user ", id), wrong, func(s *sc) { s.RunAsUser = &runtimeapi.Int64Value{Value: id} }, at+"run_as_user", fmt.Sprint(id))
		add(fmt.Sprint("run_as_group ", id), wrong, func(s *sc) {
			s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{}, &runtimeapi.Int64Value{Value: id}
		}, at+"run_as_group", fmt.Sprint(id))
		add(fmt.Sprint("supplemental group ", id), wrong, func(s *sc) { s.SupplementalGroups = []int64{id} }, at+"supplemental_groups[0]", fmt.Sprint(id))
	}
	add("group without a user", wrong, func(s *sc) { s.RunAsGroup = &runtimeapi.Int64Value{Value: 1} }, at+"run_as_group")
	add("user twice", wrong, func(s *sc) { s.RunAsUser, s.RunAsUsername = &runtimeapi.Int64Value{Value: 1}, "root" }, at+"run_as_username")
	for _, name := range []string{"nobody-here", "root:0", "4294967296", "-1", "a\nb", "a\x00b", " ", "root\n"} {
		add(fmt.Sprintf("run_as_username %q", name), wrong, func(s *sc) { s.RunAsUsername = name }, at+"run_as_username")
	}
	add("65,537 groups", wrong, func(s *sc) { s.SupplementalGroups = make([]int64, 65537) }, at+"supplemental_groups")
	add("groups policy 2", wrong, func(s *sc) { s.SupplementalGroupsPolicy = 2 }, at+"supplemental_groups_policy")
	for field, set := range map[string]func(*runtimeapi.Capability, []string){
		"add_capabilities":         func(c *runtimeapi.Capability, v []string) { c.AddCapabilities = v },
		"drop_capabilities":        func(c *runtimeapi.Capability, v []string) { c.DropCapabilities = v },
		"add_ambient_capabilities": func(c *runtimeapi.Capability, v []string) { c.AddAmbientCapabilities = v },
	} {
		for _, name := range []string{"", "NO_SUCH", "CAP_CAP_CHOWN", "CHOWN ", "CHOWN,KILL", "41", "CHOWN\x00", longText} {
			add(fmt.Sprintf("%s %.20q", field, name), wrong, func(s *sc) {
				s.Capabilities = &runtimeapi.Capability{}
				set(s.Capabilities, []string{"CHOWN", name})
			}, at+"capabilities."+field+"[1]")
		}
	}
	add("ambient ALL", wrong, func(s *sc) {
		s.Capabilities = &runtimeapi.Capability{AddAmbientCapabilities: []string{"ALL"}}
	}, at+"capabilities.add_ambient_capabilities[0]", "ALL")
	for field, set := range map[string]func(*sc, *runtimeapi.SecurityProfile){
		"seccomp":  func(s *sc, p *runtimeapi.SecurityProfile) { s.Seccomp = p },
		"apparmor": func(s *sc, p *runtimeapi.SecurityProfile) { s.Apparmor = p },
	} {
		for name, profile := range badProfiles {
			add(field+" "+name, wrong, func(s *sc) { set(s, profile) }, at+field)
		}
	}
	local := func(path string) func(*sc) {
		return func(s *sc) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: path}
		}
	}
	add("seccomp of a relative path", wrong, local("profile.json"), at+"seccomp.localhost_ref", "profile.json")
	add("seccomp of a path that goes up", wrong, local("/var/lib/../../etc/passwd"), at+"seccomp.localhost_ref")
	add("seccomp of a missing file", wrong, local("/no/such.json"), "seccomp", "/no/such.json")
	add("seccomp of a directory", wrong, local("/tmp"), "seccomp")
	add("seccomp of an endless device", wrong, local("/dev/zero"), "seccomp")
	add("seccomp of an empty device", wrong, local("/dev/null"), at+"seccomp.localhost_ref", "/dev/null")
	add("seccomp of no profile", wrong, local("/etc/passwd"), at+"seccomp.localhost_ref", "/etc/passwd")
	for _, old := range []string{"whatever", "localhost/", "localhost/relative", "localhost/../../etc/passwd"} {
		add(fmt.Sprintf("old seccomp %q", old), wrong, func(s *sc) { s.Seccomp, s.SeccompProfilePath = nil, old }, at+"seccomp_profile_path") //nolint:staticcheck // deprecated, not gone
	}
	for _, old := range []string{"whatever", "localhost/"} {
		add(fmt.Sprintf("old AppArmor %q", old), wrong, func(s *sc) { s.ApparmorProfile = old }, at+"apparmor_profile") //nolint:staticcheck // deprecated, not gone
	}
	for field, set := range map[string]func(*sc, []string){
		"masked_paths":   func(s *sc, v []string) { s.MaskedPaths = v },
		"readonly_paths": func(s *sc, v []string) { s.ReadonlyPaths = v },
	} {
		for _, p := range []string{"", "proc/kcore", "../x", "/a\x00b", "/a\nb", "/" + longText} {
			add(fmt.Sprintf("%s %.20q", field, p), wrong, func(s *sc) { set(s, []string{"/x", p}) }, at+field+"[1]")
		}
		add("5,000 "+field, wrong, func(s *sc) { set(s, make([]string, 5000)) }, at+field, "5000")
	}
	type ns = runtimeapi.NamespaceOption
	for name, o := range map[string]*ns{
		"network NODE":      {Network: runtimeapi.NamespaceMode_NODE},
		"network CONTAINER": {Network: runtimeapi.NamespaceMode_CONTAINER},
		"network 9":         {Network: 9},
		"ipc NODE":          {Ipc: runtimeapi.NamespaceMode_NODE},
		"ipc TARGET":        {Ipc: runtimeapi.NamespaceMode_TARGET},
		"pid NODE":          {Pid: runtimeapi.NamespaceMode_NODE},
		"pid 9":             {Pid: 9},
		"target_id":         {Pid: runtimeapi.NamespaceMode_TARGET},
	} {
		field, _, _ := strings.Cut(name, " ")
		add("namespace "+name, wrong, func(s *sc) { s.NamespaceOptions = o }, at+"namespace_options."+field)
	}
	target := func(id string) func(*sc) {
		return func(s *sc) {
			s.NamespaceOptions = &ns{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: id}
		}
	}
	add("target with a line break", wrong, target("a\nb"), at+"namespace_options.target_id")
	add("target that is not there", codes.NotFound, target(strings.Repeat("0", 64)), at+"namespace_options.target_id")
	list = append(list, badStoppedTarget())

	type res = runtimeapi.LinuxContainerResources
	for name, r := range map[string]*res{
		"cpu_shares 1":                  {CpuShares: 1},
		"cpu_shares -1":                 {CpuShares: -1},
		"cpu_shares 262145":             {CpuShares: 262145},
		"cpu_quota 999":                 {CpuQuota: 999},
		"cpu_quota -2":                  {CpuQuota: -2},
		"cpu_quota 9223372036854775807": {CpuQuota: math.MaxInt64},
		"cpu_period 999":                {CpuPeriod: 999},
		"cpu_period 1000001":            {CpuPeriod: 1_000_001},
		"cpu_period -1":                 {CpuPeriod: -1},
		"memory_limit_in_bytes -2":      {MemoryLimitInBytes: -2},
		"memory_swap_limit_in_bytes -2": {MemorySwapLimitInBytes: -2},
		"memory_swap_limit_in_bytes 1":  {MemorySwapLimitInBytes: 1, MemoryLimitInBytes: 1 << 30},
		"oom_score_adj -1001":           {OomScoreAdj: -1001},
		"oom_score_adj 1001":            {OomScoreAdj: 1001},
		"cpuset_cpus a":                 {CpusetCpus: "a"},
		"cpuset_cpus 3-1":               {CpusetCpus: "3-1"},
		"cpuset_cpus 0,":                {CpusetCpus: "0,"},
		"cpuset_mems 0\\n1":             {CpusetMems: "0\n1"},
		"hugepage_limits 3":             {HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "3"}}},
		"unified cgroup.procs":          {Unified: map[string]string{"cgroup.procs": "1"}},
		"unified ../memory.max":         {Unified: map[string]string{"../memory.max": "1"}},
		"unified memory.max/../../x":    {Unified: map[string]string{"memory.max/../../x": "1"}},
	} {
		field, value, _ := strings.Cut(name, " ")
		if field == "hugepage_limits" {
			value = "page_size"
		}
		list = append(list, badContainer("resources: "+name, wrong, func(c *containerConfig) { c.Linux.Resources = r },
			"config.linux.resources."+field, value))
	}
	return list
}
