package nri

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// generator changes a specification as the library asks (generate.UnderlyingGenerator). The module that the library was
// written against, runtime-tools, had its last release in 2019.
type generator struct{ s *specs.Spec }

// newGenerator makes the parts that are pointers, so that nothing below has to ask for them. prune takes away those that
// stayed empty.
func newGenerator(s *specs.Spec) generator {
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	if s.Linux.Resources.CPU == nil {
		s.Linux.Resources.CPU = &specs.LinuxCPU{}
	}
	if s.Linux.Resources.Memory == nil {
		s.Linux.Resources.Memory = &specs.LinuxMemory{}
	}
	if s.Hooks == nil {
		s.Hooks = &specs.Hooks{}
	}
	return generator{s}
}

func (g generator) prune() {
	r := g.s.Linux.Resources
	if *r.CPU == (specs.LinuxCPU{}) {
		r.CPU = nil
	}
	if *r.Memory == (specs.LinuxMemory{}) {
		r.Memory = nil
	}
	if h := g.s.Hooks; len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer)+len(h.StartContainer)+len(h.Poststart)+len(h.Poststop) == 0 { //nolint:staticcheck // plugins may ask for Prestart
		g.s.Hooks = nil
	}
}

func (g generator) Spec() *specs.Spec { return g.s }

func (g generator) AddAnnotation(key, value string) { set(&g.s.Annotations, key, value) }

func (g generator) RemoveAnnotation(key string) { delete(g.s.Annotations, key) }

func (g generator) AddProcessEnv(name, value string) {
	kv := name + "=" + value
	if i := slices.IndexFunc(g.s.Process.Env, func(e string) bool { return strings.HasPrefix(e, name+"=") }); i >= 0 {
		g.s.Process.Env[i] = kv
		return
	}
	g.s.Process.Env = append(g.s.Process.Env, kv)
}

func (g generator) ClearProcessEnv() { g.s.Process.Env = nil }

func (g generator) SetProcessArgs(args []string) { g.s.Process.Args = args }

func (g generator) SetProcessOOMScoreAdj(adj int) { g.s.Process.OOMScoreAdj = &adj }

func (g generator) AddPreStartHook(h specs.Hook) {
	g.s.Hooks.Prestart = append(g.s.Hooks.Prestart, h) //nolint:staticcheck // deprecated, but NRI has it
}

func (g generator) AddPostStartHook(h specs.Hook) {
	g.s.Hooks.Poststart = append(g.s.Hooks.Poststart, h)
}

func (g generator) AddPostStopHook(h specs.Hook) { g.s.Hooks.Poststop = append(g.s.Hooks.Poststop, h) }

func (g generator) Mounts() []specs.Mount { return g.s.Mounts }

func (g generator) ClearMounts() { g.s.Mounts = nil }

func (g generator) AddMount(m specs.Mount) { g.s.Mounts = append(g.s.Mounts, m) }

func (g generator) RemoveMount(dest string) {
	g.s.Mounts = slices.DeleteFunc(g.s.Mounts, func(m specs.Mount) bool { return m.Destination == dest })
}

func (g generator) SetLinuxRootPropagation(p string) error {
	g.s.Linux.RootfsPropagation = p
	return nil
}

func (g generator) AddDevice(d specs.LinuxDevice) {
	g.RemoveDevice(d.Path)
	g.s.Linux.Devices = append(g.s.Linux.Devices, d)
}

func (g generator) RemoveDevice(path string) {
	g.s.Linux.Devices = slices.DeleteFunc(g.s.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == path })
}

func (g generator) AddLinuxResourcesDevice(allow bool, kind string, major, minor *int64, access string) {
	g.s.Linux.Resources.Devices = append(g.s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{
		Allow: allow, Type: kind, Major: major, Minor: minor, Access: access,
	})
}

// namespaceTypes are the names of NRI, which are those of the specification.
var namespaceTypes = []specs.LinuxNamespaceType{
	specs.NetworkNamespace, specs.PIDNamespace, specs.MountNamespace, specs.IPCNamespace, specs.UTSNamespace,
	specs.UserNamespace, specs.CgroupNamespace, specs.TimeNamespace,
}

func (g generator) AddOrReplaceLinuxNamespace(kind, path string) error {
	if err := g.RemoveLinuxNamespace(kind); err != nil {
		return err
	}
	g.s.Linux.Namespaces = append(g.s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(kind), Path: path})
	return nil
}

func (g generator) RemoveLinuxNamespace(kind string) error {
	if !slices.Contains(namespaceTypes, specs.LinuxNamespaceType(kind)) {
		return fmt.Errorf("namespace %q is none of %v", kind, namespaceTypes)
	}
	g.s.Linux.Namespaces = slices.DeleteFunc(g.s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return string(n.Type) == kind })
	return nil
}

func (g generator) AddLinuxSysctl(key, value string) { set(&g.s.Linux.Sysctl, key, value) }

func (g generator) RemoveLinuxSysctl(key string) { delete(g.s.Linux.Sysctl, key) }

func (g generator) SetLinuxCgroupsPath(path string) { g.s.Linux.CgroupsPath = path }

func (g generator) AddLinuxResourcesUnified(key, value string) {
	set(&g.s.Linux.Resources.Unified, key, value)
}

func (g generator) AddLinuxResourcesHugepageLimit(size string, limit uint64) {
	r := g.s.Linux.Resources
	if i := slices.IndexFunc(r.HugepageLimits, func(l specs.LinuxHugepageLimit) bool { return l.Pagesize == size }); i >= 0 {
		r.HugepageLimits[i].Limit = limit
		return
	}
	r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: limit})
}

func (g generator) SetLinuxResourcesCPUCpus(cpus string) { g.s.Linux.Resources.CPU.Cpus = cpus }

func (g generator) SetLinuxResourcesCPUMems(mems string) { g.s.Linux.Resources.CPU.Mems = mems }

func (g generator) SetLinuxResourcesCPUPeriod(v uint64) { g.s.Linux.Resources.CPU.Period = &v }

func (g generator) SetLinuxResourcesCPUQuota(v int64) { g.s.Linux.Resources.CPU.Quota = &v }

func (g generator) SetLinuxResourcesCPUShares(v uint64) { g.s.Linux.Resources.CPU.Shares = &v }

func (g generator) SetLinuxResourcesCPURealtimePeriod(v uint64) {
	g.s.Linux.Resources.CPU.RealtimePeriod = &v
}

func (g generator) SetLinuxResourcesCPURealtimeRuntime(v int64) {
	g.s.Linux.Resources.CPU.RealtimeRuntime = &v
}

func (g generator) SetLinuxResourcesMemoryLimit(v int64) { g.s.Linux.Resources.Memory.Limit = &v }

func (g generator) SetLinuxResourcesMemorySwap(v int64) { g.s.Linux.Resources.Memory.Swap = &v }

func set(m *map[string]string, key, value string) {
	if *m == nil {
		*m = map[string]string{}
	}
	(*m)[key] = value
}
