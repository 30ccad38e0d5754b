package nri

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
)

const testID = "c0ffee0000000000000000000000000000000000000000000000000000000000"

// Each mistake is refused by a text that names the plugin, the field and what is wrong.
func TestMistakesNamePluginFieldAndValue(t *testing.T) {
	dir := t.TempDir()
	notProgram := filepath.Join(dir, "data")
	if err := os.WriteFile(notProgram, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	linux := func(f func(*api.LinuxContainerAdjustment)) *api.ContainerAdjustment {
		l := &api.LinuxContainerAdjustment{}
		f(l)
		return &api.ContainerAdjustment{Linux: l}
	}
	resources := func(r *api.LinuxResources) *api.ContainerAdjustment {
		return linux(func(l *api.LinuxContainerAdjustment) { l.Resources = r })
	}
	mount := func(m *api.Mount) *api.ContainerAdjustment { return &api.ContainerAdjustment{Mounts: []*api.Mount{m}} }
	hook := func(h *api.Hook) *api.ContainerAdjustment {
		return &api.ContainerAdjustment{Hooks: &api.Hooks{CreateRuntime: []*api.Hook{h}}}
	}
	for name, tc := range map[string]struct {
		adjust *api.ContainerAdjustment
		want   string
	}{
		"args":            {&api.ContainerAdjustment{Args: []string{"sh", "\x00"}}, `Args: an argument contains a NUL byte`},
		"no program":      {&api.ContainerAdjustment{Args: []string{"", "x"}}, `Args: the program is empty`},
		"env name":        {&api.ContainerAdjustment{Env: []*api.KeyValue{{Key: "A=B"}}}, `Env["A=B"]: is not the name of a variable`},
		"env value":       {&api.ContainerAdjustment{Env: []*api.KeyValue{{Key: "A", Value: "\x00"}}}, `Env["A"]: the value contains a NUL byte`},
		"annotation":      {&api.ContainerAdjustment{Annotations: map[string]string{"-": ""}}, `Annotations["-"]`},
		"rlimit":          {&api.ContainerAdjustment{Rlimits: []*api.POSIXRlimit{{Type: "nofile"}}}, `Rlimits["nofile"]: is not a limit`},
		"soft above hard": {&api.ContainerAdjustment{Rlimits: []*api.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1, Soft: 2}}}, `Rlimits["RLIMIT_NOFILE"]: the soft limit 2 is above the hard one 1`},
		"relative mount":  {mount(&api.Mount{Destination: "data", Source: dir, Type: "bind"}), `Mounts["data"]: the destination is not`},
		"root mount":      {mount(&api.Mount{Destination: "/x/..", Source: dir, Type: "bind"}), `Mounts["/x/.."]`},
		"missing source":  {mount(&api.Mount{Destination: "/x", Source: dir + "/none", Type: "bind"}), `Mounts["/x"]: the source cannot be bound`},
		"relative source": {mount(&api.Mount{Destination: "/x", Source: "none", Options: []string{"rbind"}}), `Mounts["/x"]: the source "none" is not an absolute path`},
		"typeless mount":  {mount(&api.Mount{Destination: "/x"}), `Mounts["/x"]: there is neither a type`},
		"relative hook":   {hook(&api.Hook{Path: "true"}), `OciHooks: the path "true" is not absolute`},
		"missing hook":    {hook(&api.Hook{Path: dir + "/none"}), `OciHooks: stat ` + dir},
		"hook no program": {hook(&api.Hook{Path: notProgram}), `OciHooks: ` + notProgram + ` is not a program`},
		"hook timeout":    {hook(&api.Hook{Path: "/bin/true", Timeout: api.Int(-1)}), `OciHooks: the timeout -1`},
		"device path":     {linux(func(l *api.LinuxContainerAdjustment) { l.Devices = []*api.LinuxDevice{{Path: "null", Type: "c"}} }), `Devices["null"]: is not an absolute path`},
		"device type":     {linux(func(l *api.LinuxContainerAdjustment) { l.Devices = []*api.LinuxDevice{{Path: "/dev/x", Type: "z"}} }), `Devices["/dev/x"]: the type "z"`},
		"device number": {linux(func(l *api.LinuxContainerAdjustment) {
			l.Devices = []*api.LinuxDevice{{Path: "/dev/x", Type: "c", Major: -1}}
		}), `Devices["/dev/x"]: -1:0`},
		"oom score":        {linux(func(l *api.LinuxContainerAdjustment) { l.OomScoreAdj = api.Int(1001) }), `OomScoreAdj: 1001 is outside`},
		"cgroup of others": {linux(func(l *api.LinuxContainerAdjustment) { l.CgroupsPath = "/kubepods" }), `CgroupsPath: "/kubepods" does not end in the id`},
		"cgroup escapes":   {linux(func(l *api.LinuxContainerAdjustment) { l.CgroupsPath = "/../" + testID }), `CgroupsPath: `},
		"io priority":      {linux(func(l *api.LinuxContainerAdjustment) { l.IoPriority = &api.LinuxIOPriority{Class: 1, Priority: 8} }), `IoPriority: class IOPRIO_CLASS_RT and priority 8`},
		"namespace":        {linux(func(l *api.LinuxContainerAdjustment) { l.Namespaces = []*api.LinuxNamespace{{Type: "net"}} }), `Namespace["net"]: is none of`},
		"namespace path": {linux(func(l *api.LinuxContainerAdjustment) {
			l.Namespaces = []*api.LinuxNamespace{{Type: "network", Path: dir + "/none"}}
		}), `Namespace["network"]: stat`},
		"sysctl": {linux(func(l *api.LinuxContainerAdjustment) { l.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"} }), `Sysctl["net.ipv4.ip_forward"]: cannot be set`},
		"network device": {linux(func(l *api.LinuxContainerAdjustment) {
			l.NetDevices = map[string]*api.LinuxNetDevice{"eth9": {Name: strings.Repeat("e", 16)}}
		}), `LinuxNetDevices["eth9"]`},
		"scheduler":      {linux(func(l *api.LinuxContainerAdjustment) { l.Scheduler = &api.LinuxScheduler{Policy: 1, Nice: 20} }), `LinuxSched: policy SCHED_OTHER, nice 20`},
		"memory policy":  {linux(func(l *api.LinuxContainerAdjustment) { l.MemoryPolicy = &api.LinuxMemoryPolicy{Mode: 99} }), `MemoryPolicy: mode 99`},
		"seccomp action": {linux(func(l *api.LinuxContainerAdjustment) { l.SeccompPolicy = &api.LinuxSeccomp{DefaultAction: "allow"} }), `SeccompPolicy: the default action "allow"`},
		"seccomp rule": {linux(func(l *api.LinuxContainerAdjustment) {
			l.SeccompPolicy = &api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []*api.LinuxSyscall{{Action: "SCMP_ACT_ERRNO"}}}
		}), `SeccompPolicy: a rule is for no system call`},
		"cpu shares":        {resources(&api.LinuxResources{Cpu: &api.LinuxCPU{Shares: api.UInt64(1)}}), `CPUShares: linux.resources.cpu_shares`},
		"cpu shares wrap":   {resources(&api.LinuxResources{Cpu: &api.LinuxCPU{Shares: api.UInt64(uint64(1 << 63))}}), `CPUShares: 9223372036854775808 is too much`},
		"cpu quota":         {resources(&api.LinuxResources{Cpu: &api.LinuxCPU{Quota: api.Int64(-2)}}), `CPUQuota`},
		"cpu period":        {resources(&api.LinuxResources{Cpu: &api.LinuxCPU{Period: api.UInt64(5)}}), `CPUPeriod`},
		"cpuset":            {resources(&api.LinuxResources{Cpu: &api.LinuxCPU{Cpus: "3-1"}}), `CPUSetCPUs`},
		"mems":              {resources(&api.LinuxResources{Cpu: &api.LinuxCPU{Mems: "x"}}), `CPUSetMems`},
		"memory":            {resources(&api.LinuxResources{Memory: &api.LinuxMemory{Limit: api.Int64(-5)}}), `MemLimit`},
		"swap below memory": {resources(&api.LinuxResources{Memory: &api.LinuxMemory{Limit: api.Int64(5 << 20), Swap: api.Int64(4 << 20)}}), `MemSwapLimit: 4194304 is less`},
		"huge pages":        {resources(&api.LinuxResources{HugepageLimits: []*api.HugepageLimit{{PageSize: "2 MB"}}}), `HugepageLimits["2 MB"]`},
		"unified":           {resources(&api.LinuxResources{Unified: map[string]string{"../cgroup.procs": "1"}}), `CgroupsUnified["../cgroup.procs"]`},
		"pids":              {resources(&api.LinuxResources{Pids: &api.LinuxPids{Limit: -2}}), `PidsLimit: -2`},
		"block i/o class":   {resources(&api.LinuxResources{BlockioClass: api.String("fast")}), `BlockioClass: "fast"`},
		"CDI":               {&api.ContainerAdjustment{CDIDevices: []*api.CDIDevice{{Name: "v.com/c=1"}}}, `CdiDevices["v.com/c=1"]: this runtime has no CDI`},
	} {
		t.Run(name, func(t *testing.T) {
			owners := api.NewOwningPlugins()
			err := check(testID, tc.adjust, nil)
			p, ok := err.(*problem)
			if !ok {
				t.Fatalf("no problem is found: %v", err)
			}
			// As the library does it for what it has merged.
			fields := api.NewFieldOwners()
			if p.key == "" {
				fields.Simple[p.field.Key()] = "10-clumsy"
			} else {
				fields.Compound[p.field.Key()] = &api.CompoundFieldOwners{Owners: map[string]string{p.key: "10-clumsy"}}
			}
			owners.Owners[testID] = fields
			r := &Runtime{}
			err = r.validate(context.Background(), &api.ValidateContainerAdjustmentRequest{
				Container: &api.Container{Id: testID}, Adjust: tc.adjust, Owners: owners,
			})
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), `plugin "10-clumsy"`) {
				t.Errorf("%v\nwant %s", err, tc.want)
			}
		})
	}
}

// What can be made is not refused.
func TestWhatCanBeMadeIsLeftAlone(t *testing.T) {
	a := everything(t)
	if err := check(testID, a, nil); err != nil {
		t.Error(err)
	}
	if err := check(testID, nil, nil); err != nil {
		t.Error(err)
	}
}
