package nri

import (
	"slices"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

// everything is an adjustment of each kind that needs nothing of the machine.
func everything(t testing.TB) *api.ContainerAdjustment {
	t.Helper()
	oom := 500
	a := &api.ContainerAdjustment{}
	a.AddAnnotation("made.by", "plugin")
	a.RemoveAnnotation("old")
	a.AddEnv("ADDED", "1")
	a.AddEnv("CHANGED", "after")
	a.RemoveEnv("REMOVED")
	a.SetArgs([]string{"echo", "hello"})
	a.AddMount(&api.Mount{Destination: "/added", Source: t.TempDir(), Type: "bind", Options: []string{"rbind", "ro"}})
	a.RemoveMount("/gone")
	a.AddHooks(&api.Hooks{Prestart: []*api.Hook{{Path: "/bin/true", Args: []string{"true"}}}})
	a.AddRlimit("RLIMIT_NOFILE", 2048, 1024)
	a.AddDevice(&api.LinuxDevice{Path: "/dev/added", Type: "c", Major: 1, Minor: 3})
	a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "cgroup"})
	a.SetLinuxMemoryLimit(64 << 20)
	a.SetLinuxMemoryReservation(32 << 20)
	a.SetLinuxCPUShares(512)
	a.SetLinuxCPUQuota(50000)
	a.SetLinuxCPUPeriod(100000)
	a.SetLinuxCPUSetCPUs("0")
	a.SetLinuxPidLimits(100)
	a.AddLinuxUnified("memory.high", "max")
	a.SetLinuxOomScoreAdj(&oom)
	a.SetLinuxCgroupsPath("/elsewhere/" + testID)
	a.SetLinuxIOPriority(&api.LinuxIOPriority{Class: api.IOPrioClass_IOPRIO_CLASS_BE, Priority: 7})
	a.SetLinuxSeccompPolicy(&api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []*api.LinuxSyscall{
		{Names: []string{"mkdir"}, Action: "SCMP_ACT_ERRNO", Args: []*api.LinuxSeccompArg{{Op: "SCMP_CMP_EQ"}}},
	}})
	a.Linux.Rdt = &api.LinuxRdt{} // as the library has it
	a.SetLinuxScheduler(&api.LinuxScheduler{Policy: api.LinuxSchedulerPolicy_SCHED_BATCH, Nice: 5})
	return a
}

func before() *specs.Spec {
	return &specs.Spec{
		Annotations: map[string]string{"old": "1"},
		Process: &specs.Process{
			Args: []string{"sh"}, Env: []string{"CHANGED=before", "REMOVED=1", "KEPT=1"},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1, Soft: 1}},
		},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/gone", Type: "tmpfs"}},
		Linux:  &specs.Linux{CgroupsPath: "/pods/" + testID, Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}}},
	}
}

func TestAdjustmentsAreMade(t *testing.T) {
	s := before()
	if err := adjust(s, everything(t), nil, true); err != nil {
		t.Fatal(err)
	}
	env := slices.Sorted(slices.Values(s.Process.Env))
	for what, ok := range map[string]bool{
		"annotations": s.Annotations["made.by"] == "plugin" && len(s.Annotations) == 1,
		"env":         slices.Equal(env, []string{"ADDED=1", "CHANGED=after", "KEPT=1"}),
		"args":        slices.Equal(s.Process.Args, []string{"echo", "hello"}),
		"mounts":      len(s.Mounts) == 2 && s.Mounts[0].Destination == "/added" && s.Mounts[1].Destination == "/proc",
		"hooks":       s.Hooks != nil && len(s.Hooks.Prestart) == 1 && *s.Hooks.Prestart[0].Timeout == 10 && len(s.Hooks.Prestart[0].Env) == 1, //nolint:staticcheck // NRI has it
		"rlimits":     slices.Equal(s.Process.Rlimits, []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 2048, Soft: 1024}}),
		"device":      len(s.Linux.Devices) == 1 && s.Linux.Devices[0].Path == "/dev/added",
		"rule": len(s.Linux.Resources.Devices) == 1 && s.Linux.Resources.Devices[0].Allow &&
			s.Linux.Resources.Devices[0].Access == "rw",
		"namespaces":  len(s.Linux.Namespaces) == 2,
		"memory":      *s.Linux.Resources.Memory.Limit == 64<<20 && *s.Linux.Resources.Memory.Reservation == 32<<20,
		"cpu":         *s.Linux.Resources.CPU.Shares == 512 && *s.Linux.Resources.CPU.Quota == 50000 && *s.Linux.Resources.CPU.Period == 100000 && s.Linux.Resources.CPU.Cpus == "0",
		"pids":        *s.Linux.Resources.Pids.Limit == 100,
		"unified":     s.Linux.Resources.Unified["memory.high"] == "max",
		"oom":         *s.Process.OOMScoreAdj == 500,
		"cgroup":      s.Linux.CgroupsPath == "/elsewhere/"+testID,
		"io priority": s.Process.IOPriority != nil && s.Process.IOPriority.Priority == 7,
		"seccomp":     s.Linux.Seccomp != nil && s.Linux.Seccomp.Syscalls[0].Names[0] == "mkdir",
		"scheduler":   s.Process.Scheduler != nil && s.Process.Scheduler.Nice == 5,
	} {
		if !ok {
			t.Errorf("%s: %+v\n%+v", what, s, s.Linux)
		}
	}
}

func TestNoAdjustmentChangesNothing(t *testing.T) {
	for _, a := range []*api.ContainerAdjustment{nil, {}, {Linux: &api.LinuxContainerAdjustment{Resources: &api.LinuxResources{Memory: &api.LinuxMemory{}, Cpu: &api.LinuxCPU{}}}}} {
		s := before()
		if err := adjust(s, a, nil, true); err != nil {
			t.Fatal(err)
		}
		if s.Hooks != nil || s.Linux.Resources != nil && (s.Linux.Resources.CPU != nil || s.Linux.Resources.Memory != nil) || len(s.Process.Env) != 3 || len(s.Mounts) != 2 {
			t.Errorf("%v: %+v", a, s)
		}
	}
}

// Whatever a plugin sends is refused or made, and never the daemon's end.
func FuzzAdjust(f *testing.F) {
	data, err := proto.Marshal(everything(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var a api.ContainerAdjustment
		if proto.Unmarshal(data, &a) != nil {
			return
		}
		if check(testID, &a, nil) != nil {
			return
		}
		s := before()
		if err := adjust(s, &a, nil, true); err != nil {
			return
		}
		if s.Process == nil || s.Linux == nil || s.Linux.Resources == nil && a.GetLinux().GetResources() != nil {
			t.Errorf("parts are gone: %+v", s)
		}
		for i, m := range s.Mounts {
			if m.Destination == "" || m.Destination[0] != '/' {
				t.Errorf("mount %d at %q", i, m.Destination)
			}
		}
	})
}
