package cgroups

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-run/berth/cgroups/oom"
)

// fixture writes files as the kernel shows them.
func fixture(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// oneDir puts all controllers of v1 into one directory of fixtures; an empty one stands for controllers that are not mounted.
func oneDir(dir string) func(string) string { return func(string) string { return dir } }

func TestStatsOfV2(t *testing.T) {
	limited := map[string]string{
		"cpu.stat":       "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\nnr_periods 0\n",
		"cpu.pressure":   "some avg10=1.50 avg60=0.25 avg300=0.01 total=2000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
		"memory.current": "10485760\n",
		"memory.stat": "anon 4194304\nfile 6291456\nkernel 0\nfile_mapped 11\nfile_dirty 12\nfile_writeback 13\ninactive_anon 1\n" +
			"inactive_file 2097152\nactive_file 9\npgfault 321\npgmajfault 7\npgscan 14\npgsteal 15\nworkingset_refault_anon 16\nworkingset_refault_file 17\n",
		"memory.max":          "20971520\n",
		"memory.swap.current": "4096\n",
		"memory.swap.max":     "8192\n",
		"memory.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=3\nfull avg10=0.00 avg60=0.00 avg300=99.99 total=4\n",
		"memory.events":       "low 0\nhigh 0\nmax 4\noom 2\noom_kill 3\noom_group_kill 1\n",
		"io.pressure":         "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
		"pids.current":        "5\n",
	}
	wantLimited := Stats{
		CPU:  CPUStats{1234567000, &Pressure{Some: Stall{TotalNanos: 2000000, Avg10: 1.5, Avg60: 0.25, Avg300: 0.01}}},
		Pids: PidsStats{5}, OOMKills: 3,
		IO: IOStats{&Pressure{Some: Stall{TotalNanos: 5000}}},
		Memory: MemoryStats{
			Usage: 10485760, WorkingSet: 8388608, RSS: 4194304, Cache: 6291456, MappedFile: 11, ActiveFile: 9, InactiveFile: 2097152,
			Dirty: 12, Writeback: 13, PageFaults: 321, MajorPageFaults: 7, Limit: 20971520,
			Available: 12582912, SwapUsage: 4096, SwapLimit: 8192, SwapAvailable: 4096,
			Reclaim:  ReclaimStats{Scanned: 14, Stolen: 15, RefaultAnon: 16, RefaultedFile: 17},
			Pressure: &Pressure{Some: Stall{TotalNanos: 3000}, Full: Stall{TotalNanos: 4000, Avg300: 99.99}},
		},
	}
	for name, tc := range map[string]struct {
		files map[string]string
		want  Stats
	}{
		"limited": {limited, wantLimited},
		"unlimited, no swap": {map[string]string{"cpu.stat": "usage_usec 1\n", "memory.current": "5\n", "memory.stat": "inactive_file 9\n", "memory.max": "max\n"}, Stats{
			CPU: CPUStats{UsageNanos: 1000}, Memory: MemoryStats{Usage: 5, InactiveFile: 9, Limit: Unlimited},
		}},
		"over the limit": {map[string]string{"cpu.stat": "", "memory.current": "30\n", "memory.stat": "anon 30\n", "memory.max": "20\n", "memory.swap.current": "1\n", "memory.swap.max": "max\n"}, Stats{
			Memory: MemoryStats{Usage: 30, WorkingSet: 30, RSS: 30, Limit: 20, SwapUsage: 1, SwapLimit: Unlimited},
		}},
		"cpu alone": {map[string]string{"cpu.stat": "usage_usec 1\n"}, Stats{CPU: CPUStats{UsageNanos: 1000}}},
		"pressure of a later kernel": {
			map[string]string{"cpu.stat": "", "cpu.pressure": "most avg10=x\nsome avg10=0.00 avg900=1.00 total=1\n"},
			Stats{CPU: CPUStats{Pressure: &Pressure{Some: Stall{TotalNanos: 1000}}}},
		},
	} {
		r := reader{buf: make([]byte, 0, 16)} // grows
		var s Stats
		r.v2(fixture(t, tc.files), &s)
		if age := time.Since(s.Time); age < 0 || age > time.Minute {
			t.Errorf("%s: time %v", name, s.Time)
		}
		s.Time = time.Time{}
		s.Memory.derive()
		if r.err != nil || !reflect.DeepEqual(s, tc.want) {
			t.Errorf("%s: %+v, %v\nwant %+v", name, s, r.err, tc.want)
		}
	}
}

func TestStatsOfV1(t *testing.T) {
	limited := map[string]string{
		"cpuacct.usage":         "1234\n",
		"memory.usage_in_bytes": "10485760\n",
		"memory.stat": "cache 1\nrss 2\ninactive_file 3\nhierarchical_memory_limit 1\ntotal_cache 10\ntotal_rss 4194304\ntotal_mapped_file 11\ntotal_dirty 12\n" +
			"total_writeback 13\ntotal_inactive_file 2097152\ntotal_active_file 9\ntotal_pgfault 321\ntotal_pgmajfault 7\ntotal_swap 4096\n",
		"memory.limit_in_bytes":       "20971520\n",
		"memory.memsw.limit_in_bytes": "20979712\n",
		"memory.oom_control":          "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
		"pids.current":                "5\n",
	}
	unlimited := map[string]string{
		"cpuacct.usage": "1234\n", "memory.usage_in_bytes": "5\n", "memory.stat": "total_inactive_file 9\n", "memory.limit_in_bytes": "9223372036854771712\n",
		"memory.memsw.limit_in_bytes": "9223372036854771712\n", "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n",
	}
	for name, tc := range map[string]struct {
		files map[string]string
		want  Stats
	}{
		"limited": {limited, Stats{CPU: CPUStats{UsageNanos: 1234}, Pids: PidsStats{5}, OOMKills: 3, Memory: MemoryStats{
			Usage: 10485760, WorkingSet: 8388608, RSS: 4194304, Cache: 10, MappedFile: 11, ActiveFile: 9, InactiveFile: 2097152,
			Dirty: 12, Writeback: 13, PageFaults: 321, MajorPageFaults: 7, Limit: 20971520,
			Available: 12582912, SwapUsage: 4096, SwapLimit: 8192, SwapAvailable: 4096,
		}}},
		"unlimited": {unlimited, Stats{CPU: CPUStats{UsageNanos: 1234}, Memory: MemoryStats{Usage: 5, InactiveFile: 9, Limit: Unlimited, SwapLimit: Unlimited}}},
	} {
		r := reader{buf: make([]byte, 0, 16)}
		var s Stats
		r.v1(oneDir(fixture(t, tc.files)), &s)
		s.Time = time.Time{}
		s.Memory.derive()
		if r.err != nil || !reflect.DeepEqual(s, tc.want) {
			t.Errorf("%s: %+v, %v\nwant %+v", name, s, r.err, tc.want)
		}
	}
	// Controllers that are not mounted.
	r := reader{buf: make([]byte, 0, 16)}
	var d Details
	r.v1(oneDir(""), &d.Stats)
	r.detailsV1(oneDir(""), &d)
	if r.err != nil || d.CPU.UsageNanos != 0 || d.Memory.Usage != 0 || d.Devices != nil {
		t.Errorf("%+v, %v", d, r.err)
	}
}

func TestStatsThatAreNoNumbers(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"number":   {"memory.current": "many\n"},
		"keyed":    {"cpu.stat": "usage_usec x\n"},
		"range":    {"memory.current": "99999999999999999999\n"},
		"average":  {"cpu.pressure": "some avg10=much\n"},
		"pressure": {"io.pressure": "some total=18446744073709551615\n"},
	} {
		r := reader{buf: make([]byte, 0, 16)}
		r.v2(fixture(t, files), &Stats{})
		if r.err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	r := reader{buf: make([]byte, 0, 16)}
	r.v2(t.TempDir()+"/gone", &Stats{})
	if !gone(r.err) {
		t.Errorf("%v", r.err)
	}
}

func TestReadStats(t *testing.T) {
	p := newPath(t)
	if _, err := ReadStats(p); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("no cgroup: %v", err)
	}
	if err := CreateSandbox(p); err != nil {
		t.Fatal(err)
	}
	s, err := ReadStats(p)
	if err != nil || s.Memory.Limit != Unlimited || s.Memory.Available != 0 || s.Pids.Current != 0 {
		t.Errorf("empty: %+v, %v", s, err)
	}
	if err := Update(p, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(256 * mib)), Swap: ptr(int64(256 * mib))}}); err != nil {
		t.Fatal(err)
	}
	ready := t.TempDir() + "/ready"
	start(t, p, `x=$(head -c 33554432 /dev/zero | tr '\0' x); echo > `+ready+`; sleep 60 & wait`)
	waitFor(t, func() bool { return fileExists(ready) })
	waitFor(t, func() bool { pids, _ := Processes(p); return len(pids) == 2 })
	s, err = ReadStats(p)
	if err != nil {
		t.Fatal(err)
	}
	m := s.Memory
	if s.CPU.UsageNanos < 1e6 || s.CPU.UsageNanos > 300e9 {
		t.Errorf("CPU %d ns", s.CPU.UsageNanos)
	}
	if m.RSS < 32*mib || m.Usage < m.RSS || m.WorkingSet > m.Usage || m.WorkingSet < 32*mib || m.PageFaults < 100 {
		t.Errorf("memory %+v", m)
	}
	if m.Limit != 256*mib || m.Available != m.Limit-m.WorkingSet || m.SwapLimit != 0 {
		t.Errorf("memory %+v", m)
	}
	if s.Pids.Current != 2 {
		t.Errorf("%d tasks", s.Pids.Current)
	}
	if s.OOMKills != 0 {
		t.Errorf("%d OOM kills", s.OOMKills)
	}
}

func TestOOMKillsAreCounted(t *testing.T) {
	p := newCgroup(t)
	file(t, p, "memory", "memory.limit_in_bytes", "memory.max")
	if err := Update(p, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(15 * mib)), Swap: ptr(int64(15 * mib))}}); err != nil {
		t.Fatal(err)
	}
	dir, err := Dir(p, "memory")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := oom.Kills(dir); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	cmd := start(t, p, `x=$(head -c 100000000 /dev/zero | tr '\0' x)`) // a variable of the shell
	if err = <-cmd.end; err == nil || err.Error() != "signal: killed" {
		t.Fatalf("not killed: %v", err)
	}
	n, err := oom.Kills(dir)
	if n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	s, err := ReadStats(p)
	if err != nil || s.OOMKills != 1 {
		t.Errorf("%+v, %v", s, err)
	}
}

func FuzzKeyed(f *testing.F) {
	f.Add([]byte("anon 1\nfile 2\n"))
	f.Add([]byte("anon\n\n x 18446744073709551616"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(dir+"/x", data, 0o600); err != nil {
			t.Fatal(err)
		}
		r := reader{buf: make([]byte, 0, 16)}
		r.keyed(dir, "x", func(string, uint64) {})
		r.number(dir, "x")
	})
}
