package nri

import (
	"context"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/spec"
)

// problem is why an adjustment cannot be made: the field, by the name that plugin authors know, and what is wrong with it.
type problem struct {
	field api.Field
	key   string // of the entry, where the field is a list or a map
	what  string
}

func (p *problem) Error() string { return p.name() + ": " + p.what }

func (p *problem) name() string {
	if p.key == "" {
		return p.field.String()
	}
	return fmt.Sprintf("%s[%.128q]", p.field, p.key)
}

func wrong(f api.Field, key, format string, args ...any) error {
	return &problem{f, key, fmt.Sprintf(format, args...)}
}

// validate is the plugin of our own that the library asks last: it alone is told who has set what.
func (r *Runtime) validate(_ context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	return r.guard("validate", func() error {
		err := check(req.GetContainer().GetId(), req.GetAdjust(), r.o.InjectCDI)
		p, ok := err.(*problem) //nolint:errorlint // it is never wrapped
		if !ok {
			return err
		}
		return fmt.Errorf("plugin %q: %w", owner(req.GetOwners().GetOwners()[req.GetContainer().GetId()], p), p)
	})
}

// owner is the plugin, or the plugins, that a field comes from.
func owner(o *api.FieldOwners, p *problem) string {
	name := o.GetSimple()[p.field.Key()]
	if name == "" {
		name = o.GetCompound()[p.field.Key()].GetOwners()[p.key]
	}
	if name == "" {
		return "unknown"
	}
	return name
}

// check finds what of an adjustment cannot be made. It is for mistakes: what it lets pass is not harmless.
func check(id string, a *api.ContainerAdjustment, cdi CDIInjector) error {
	for _, err := range []error{
		checkProcess(a), checkMounts(a.GetMounts()), checkHooks(a.GetHooks()), checkLinux(id, a.GetLinux()),
		checkResources(a.GetLinux().GetResources()),
	} {
		if err != nil {
			return err
		}
	}
	for _, d := range a.GetCDIDevices() {
		if cdi == nil {
			return wrong(api.Field_CdiDevices, d.GetName(), "this runtime has no CDI")
		}
		nothing := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Resources: &specs.LinuxResources{}}}
		if err := cdi(nothing, []string{d.GetName()}); err != nil {
			return wrong(api.Field_CdiDevices, d.GetName(), "%v", err)
		}
	}
	return nil
}

func hasNUL(s string) bool { return strings.IndexByte(s, 0) >= 0 }

func checkProcess(a *api.ContainerAdjustment) error {
	if args := a.GetArgs(); len(args) > 0 && args[0] == "" {
		return wrong(api.Field_Args, "", "the program is empty")
	}
	if slices.ContainsFunc(a.GetArgs(), hasNUL) {
		return wrong(api.Field_Args, "", "an argument contains a NUL byte")
	}
	for _, e := range a.GetEnv() {
		name, _ := e.IsMarkedForRemoval()
		switch {
		case name == "" || strings.ContainsAny(name, "=\x00"):
			return wrong(api.Field_Env, e.GetKey(), "is not the name of a variable")
		case hasNUL(e.GetValue()):
			return wrong(api.Field_Env, e.GetKey(), "the value contains a NUL byte")
		}
	}
	for _, key := range slices.Sorted(maps.Keys(a.GetAnnotations())) {
		if name, _ := api.IsMarkedForRemoval(key); name == "" {
			return wrong(api.Field_Annotations, key, "is not the name of an annotation")
		}
	}
	for _, l := range a.GetRlimits() {
		switch {
		case !spec.KnownRlimit(l.GetType()):
			return wrong(api.Field_Rlimits, l.GetType(), "is not a limit, such as RLIMIT_NOFILE")
		case l.GetSoft() > l.GetHard():
			return wrong(api.Field_Rlimits, l.GetType(), "the soft limit %d is above the hard one %d", l.GetSoft(), l.GetHard())
		}
	}
	return nil
}

func checkMounts(mounts []*api.Mount) error {
	for _, m := range mounts {
		dest, removal := m.IsMarkedForRemoval()
		switch {
		case removal:
		case !filepath.IsAbs(dest) || filepath.Clean(dest) == "/" || hasNUL(dest):
			return wrong(api.Field_Mounts, dest, "the destination is not an absolute path below the root")
		case slices.ContainsFunc(m.GetOptions(), hasNUL):
			return wrong(api.Field_Mounts, dest, "an option contains a NUL byte")
		case isBind(m):
			if !filepath.IsAbs(m.GetSource()) {
				return wrong(api.Field_Mounts, dest, "the source %.128q is not an absolute path", m.GetSource())
			}
			if _, err := os.Stat(m.GetSource()); err != nil {
				return wrong(api.Field_Mounts, dest, "the source cannot be bound: %v", err)
			}
		case m.GetType() == "":
			return wrong(api.Field_Mounts, dest, "there is neither a type nor the option bind")
		}
	}
	return nil
}

func isBind(m *api.Mount) bool {
	return m.GetType() == "bind" || slices.Contains(m.GetOptions(), "bind") || slices.Contains(m.GetOptions(), "rbind")
}

func checkHooks(h *api.Hooks) error {
	for _, list := range [][]*api.Hook{
		h.GetPrestart(), h.GetCreateRuntime(), h.GetCreateContainer(), h.GetStartContainer(), h.GetPoststart(), h.GetPoststop(),
	} {
		for _, hook := range list {
			switch {
			case !filepath.IsAbs(hook.GetPath()) || hasNUL(hook.GetPath()):
				return wrong(api.Field_OciHooks, "", "the path %.128q is not absolute", hook.GetPath())
			case hook.GetTimeout() != nil && hook.GetTimeout().GetValue() <= 0:
				return wrong(api.Field_OciHooks, "", "the timeout %d of %.128s is not positive", hook.GetTimeout().GetValue(), hook.GetPath())
			case slices.ContainsFunc(hook.GetArgs(), hasNUL), slices.ContainsFunc(hook.GetEnv(), hasNUL):
				return wrong(api.Field_OciHooks, "", "%.128s has an argument or a variable with a NUL byte", hook.GetPath())
			}
		}
	}
	// Those that run in the container are found there. The others are the host's.
	for _, hook := range slices.Concat(h.GetPrestart(), h.GetCreateRuntime(), h.GetPoststart(), h.GetPoststop()) {
		if info, err := os.Stat(hook.GetPath()); err != nil {
			return wrong(api.Field_OciHooks, "", "%v", err)
		} else if !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
			return wrong(api.Field_OciHooks, "", "%s is not a program", hook.GetPath())
		}
	}
	return nil
}

func checkLinux(id string, l *api.LinuxContainerAdjustment) error {
	for _, d := range l.GetDevices() {
		path, removal := d.IsMarkedForRemoval()
		switch {
		case removal:
		case !filepath.IsAbs(path) || hasNUL(path):
			return wrong(api.Field_Devices, path, "is not an absolute path")
		case !slices.Contains([]string{"b", "c", "u", "p"}, d.GetType()):
			return wrong(api.Field_Devices, path, "the type %.16q is none of b, c, u, p", d.GetType())
		case d.GetMajor() < 0 || d.GetMajor() > math.MaxUint32, d.GetMinor() < 0 || d.GetMinor() > math.MaxUint32:
			return wrong(api.Field_Devices, path, "%d:%d is not the number of a device", d.GetMajor(), d.GetMinor())
		}
	}
	if v := l.GetOomScoreAdj(); v != nil && (v.GetValue() < -1000 || v.GetValue() > 1000) {
		return wrong(api.Field_OomScoreAdj, "", "%d is outside -1000..1000", v.GetValue())
	}
	if path := l.GetCgroupsPath(); path != "" {
		if _, err := cgroups.ParsePath(path); err != nil {
			return wrong(api.Field_CgroupsPath, "", "%v", err)
		}
		// Whatever is in a container's cgroup ends with it.
		if filepath.Base(path) != id {
			return wrong(api.Field_CgroupsPath, "", "%.256q does not end in the id of the container, so that it may hold others", path)
		}
	}
	if p := l.GetIoPriority(); p != nil {
		if _, ok := api.IOPrioClass_name[int32(p.GetClass())]; !ok || p.GetPriority() < 0 || p.GetPriority() > 7 {
			return wrong(api.Field_IoPriority, "", "class %v and priority %d are not of the kernel", p.GetClass(), p.GetPriority())
		}
	}
	for _, n := range l.GetNamespaces() {
		kind, removal := n.IsMarkedForRemoval()
		switch {
		case !slices.Contains(namespaceTypes, specs.LinuxNamespaceType(kind)):
			return wrong(api.Field_Namespace, kind, "is none of %v", namespaceTypes)
		case !removal && n.GetPath() != "" && !filepath.IsAbs(n.GetPath()):
			return wrong(api.Field_Namespace, kind, "the path %.128q is not absolute", n.GetPath())
		case !removal && n.GetPath() != "":
			if _, err := os.Stat(n.GetPath()); err != nil {
				return wrong(api.Field_Namespace, kind, "%v", err)
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(l.GetSysctl())) {
		if name, removal := api.IsMarkedForRemoval(key); !removal {
			// libcontainer sees the pod's namespaces as those of its host, and sets nothing in them.
			return wrong(api.Field_Sysctl, name, "cannot be set for a container: its namespaces are the pod's, which sets its own when it is made")
		}
	}
	for _, key := range slices.Sorted(maps.Keys(l.GetNetDevices())) {
		if name, removal := api.IsMarkedForRemoval(key); !removal && (!ifname(name) || l.NetDevices[key].GetName() != "" && !ifname(l.NetDevices[key].GetName())) {
			return wrong(api.Field_LinuxNetDevices, name, "is not renamed to %.64q: these are not two names of interfaces", l.NetDevices[key].GetName())
		}
	}
	if s := l.GetScheduler(); s != nil {
		if _, ok := api.LinuxSchedulerPolicy_name[int32(s.GetPolicy())]; !ok || s.GetNice() < -20 || s.GetNice() > 19 || s.GetPriority() < 0 || s.GetPriority() > 99 {
			return wrong(api.Field_LinuxSched, "", "policy %v, nice %d and priority %d are not of the kernel", s.GetPolicy(), s.GetNice(), s.GetPriority())
		}
	}
	if p := l.GetMemoryPolicy(); p != nil {
		if _, ok := api.MpolMode_name[int32(p.GetMode())]; !ok {
			return wrong(api.Field_MemoryPolicy, "", "mode %d is not of the kernel", p.GetMode())
		}
	}
	if r := l.GetRdt(); !hasRDT() { // the library sends one in any case
		const why = "this host has no resctrl file system mounted"
		switch {
		case r.GetClosId() != nil:
			return wrong(api.Field_RdtClosID, "", why)
		case r.GetSchemata() != nil:
			return wrong(api.Field_RdtSchemata, "", why)
		case r.GetEnableMonitoring() != nil:
			return wrong(api.Field_RdtEnableMonitoring, "", why)
		}
	}
	return checkSeccomp(l.GetSeccompPolicy())
}

// ifname says whether a name is one that the kernel takes (dev_valid_name in net/core/dev.c).
func ifname(s string) bool {
	return s != "" && len(s) < 16 && s != "." && s != ".." && !strings.ContainsAny(s, "/: \t\n\x00")
}

func hasRDT() bool {
	_, err := os.Stat("/sys/fs/resctrl/schemata")
	return err == nil
}

var (
	seccompActions = []specs.LinuxSeccompAction{
		specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActErrno, specs.ActTrace, specs.ActAllow,
		specs.ActLog, specs.ActNotify,
	}
	seccompOperators = []specs.LinuxSeccompOperator{
		specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual,
	}
)

func checkSeccomp(s *api.LinuxSeccomp) error {
	if s == nil {
		return nil
	}
	if !slices.Contains(seccompActions, specs.LinuxSeccompAction(s.GetDefaultAction())) {
		return wrong(api.Field_SeccompPolicy, "", "the default action %.64q is none of %v", s.GetDefaultAction(), seccompActions)
	}
	for _, rule := range s.GetSyscalls() {
		switch {
		case !slices.Contains(seccompActions, specs.LinuxSeccompAction(rule.GetAction())):
			return wrong(api.Field_SeccompPolicy, "", "the action %.64q is none of %v", rule.GetAction(), seccompActions)
		case len(rule.GetNames()) == 0 || slices.Contains(rule.GetNames(), ""):
			return wrong(api.Field_SeccompPolicy, "", "a rule is for no system call")
		}
		for _, arg := range rule.GetArgs() {
			if arg.GetIndex() > 5 || !slices.Contains(seccompOperators, specs.LinuxSeccompOperator(arg.GetOp())) {
				return wrong(api.Field_SeccompPolicy, "", "%.64s: argument %d with operator %.64q cannot be compared", rule.Names[0], arg.GetIndex(), arg.GetOp())
			}
		}
	}
	return nil
}

// checkResources asks cri/spec about each field alone, so that the error is of one.
func checkResources(r *api.LinuxResources) error {
	if r == nil {
		return nil
	}
	c, m := r.GetCpu(), r.GetMemory()
	for _, f := range []struct {
		field api.Field
		value uint64
	}{
		{api.Field_CPUShares, c.GetShares().GetValue()},
		{api.Field_CPUPeriod, c.GetPeriod().GetValue()},
		{api.Field_CPURealtimePeriod, c.GetRealtimePeriod().GetValue()},
	} {
		if f.value > math.MaxInt64 {
			return wrong(f.field, "", "%d is too much", f.value)
		}
	}
	all := CRIResources(r)
	for _, f := range []struct {
		field api.Field
		only  *cri.LinuxContainerResources
	}{
		{api.Field_CPUShares, &cri.LinuxContainerResources{CpuShares: all.CpuShares}},
		{api.Field_CPUQuota, &cri.LinuxContainerResources{CpuQuota: all.CpuQuota}},
		{api.Field_CPUPeriod, &cri.LinuxContainerResources{CpuPeriod: all.CpuPeriod}},
		{api.Field_CPUSetCPUs, &cri.LinuxContainerResources{CpusetCpus: all.CpusetCpus}},
		{api.Field_CPUSetMems, &cri.LinuxContainerResources{CpusetMems: all.CpusetMems}},
		{api.Field_MemLimit, &cri.LinuxContainerResources{MemoryLimitInBytes: all.MemoryLimitInBytes}},
	} {
		if err := spec.ValidateResources("linux.resources", f.only); err != nil {
			return wrong(f.field, "", "%v", err)
		}
	}
	for _, h := range all.HugepageLimits {
		if err := spec.ValidateResources("linux.resources", &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{h}}); err != nil {
			return wrong(api.Field_HugepageLimits, h.PageSize, "%v", err)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(all.Unified)) {
		if err := spec.ValidateResources("linux.resources", &cri.LinuxContainerResources{Unified: map[string]string{key: all.Unified[key]}}); err != nil {
			return wrong(api.Field_CgroupsUnified, key, "%v", err)
		}
	}
	switch {
	case m.GetSwap() != nil && m.GetSwap().GetValue() < -1:
		return wrong(api.Field_MemSwapLimit, "", "%d is negative", m.GetSwap().GetValue())
	case m.GetSwap().GetValue() > 0 && m.GetLimit().GetValue() > m.GetSwap().GetValue():
		return wrong(api.Field_MemSwapLimit, "", "%d is less than the limit of memory %d, which it includes", m.GetSwap().GetValue(), m.GetLimit().GetValue())
	case m.GetReservation().GetValue() < -1:
		return wrong(api.Field_MemReservation, "", "%d is negative", m.GetReservation().GetValue())
	case m.GetSwappiness().GetValue() > 200:
		return wrong(api.Field_MemSwappiness, "", "%d is outside 0..200", m.GetSwappiness().GetValue())
	case r.GetPids().GetLimit() < -1:
		return wrong(api.Field_PidsLimit, "", "%d is negative", r.GetPids().GetLimit())
	case r.GetBlockioClass().GetValue() != "":
		return wrong(api.Field_BlockioClass, "", "%.64q: this runtime has no classes of block I/O", r.GetBlockioClass().GetValue())
	case r.GetRdtClass().GetValue() != "" && !hasRDT():
		return wrong(api.Field_RdtClass, "", "%.64q: this host has no resctrl file system mounted", r.GetRdtClass().GetValue())
	}
	return nil
}
