package cgroups

import (
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestDetailsOfV2(t *testing.T) {
	for name, tc := range map[string]struct {
		files map[string]string
		want  Details
	}{
		"limited": {map[string]string{
			"cpu.stat":      "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_periods 5\nnr_throttled 4\nthrottled_usec 3\nnr_bursts 2\nburst_usec 1\n",
			"cpu.weight":    "100\n",
			"cpu.max":       "20000 100000\n",
			"memory.stat":   "kernel 77\n",
			"memory.peak":   "99\n",
			"memory.events": "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\n",
			"memory.min":    "4096\n", "memory.swap.max": "8192\n",
			"io.stat":  "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n253:16 rbytes=7 wbytes=0 rios=1 wios=0 dbytes=0 dios=0 cost.usage=8\n9:1 \n",
			"pids.max": "100\n",
		}, Details{
			Stats:      Stats{CPU: CPUStats{UsageNanos: 30000}, OOMKills: 5, Memory: MemoryStats{SwapLimit: 8192, SwapAvailable: 8192}},
			CPUTime:    CPUTime{10000, 20000},
			Throttling: Throttling{Periods: 5, ThrottledPeriods: 4, ThrottledNanos: 3000, Bursts: 2, BurstNanos: 1000},
			MaxMemory:  99, MemoryHits: MemoryHits{High: 2, Max: 3}, KernelUsed: 77,
			Devices: []DeviceIO{
				{Major: 8, ReadBytes: 1, WriteBytes: 2, Reads: 3, Writes: 4, DiscardBytes: 5, Discards: 6},
				{Major: 253, Minor: 16, ReadBytes: 7, Reads: 1},
				{Major: 9, Minor: 1},
			},
			Limits: Limits{CPUShares: 2597, PeriodMicros: 100000, QuotaMicros: 20000, MemoryReservation: 4096, SwapWithMemory: 8192, Pids: 100},
		}},
		"without limits": {
			map[string]string{"cpu.max": "max 100000\n", "cpu.weight": "1\n", "pids.max": "max\n", "memory.max": "max\n", "memory.swap.max": "max\n"},
			Details{
				Stats:  Stats{Memory: MemoryStats{Limit: Unlimited, SwapLimit: Unlimited}},
				Limits: Limits{CPUShares: 2, PeriodMicros: 100000, SwapWithMemory: Unlimited},
			},
		},
	} {
		r := newReader()
		var d Details
		dir := fixture(t, tc.files)
		r.v2(dir, &d.Stats)
		r.detailsV2(dir, &d)
		d.Memory.derive()
		d.Time = time.Time{}
		if r.err != nil || !reflect.DeepEqual(d, tc.want) {
			t.Errorf("%s: %+v, %v\nwant %+v", name, d, r.err, tc.want)
		}
	}
}

func TestDetailsOfV1(t *testing.T) {
	limited := map[string]string{
		"cpuacct.usage": "30\n", "cpuacct.usage_user": "10\n", "cpuacct.usage_sys": "20\n",
		"cpu.stat":   "nr_periods 5\nnr_throttled 4\nthrottled_time 3\nnr_bursts 2\nburst_time 1\n",
		"cpu.shares": "1024\n", "cpu.cfs_period_us": "100000\n", "cpu.cfs_quota_us": "20000\n",
		"memory.max_usage_in_bytes": "99\n", "memory.failcnt": "3\n", "memory.kmem.usage_in_bytes": "77\n",
		"memory.soft_limit_in_bytes": "9223372036854771712\n", "memory.memsw.limit_in_bytes": "8192\n", "pids.max": "100\n",
		"blkio.throttle.io_service_bytes_recursive": "8:0 Read 1\n8:0 Write 2\n8:0 Sync 3\n8:0 Async 0\n8:0 Discard 4\n8:0 Total 7\nTotal 7\n",
		"blkio.throttle.io_serviced_recursive":      "8:0 Read 5\n8:0 Write 6\n8:0 Discard 7\nTotal 18\n",
	}
	want := Details{
		Stats:      Stats{CPU: CPUStats{UsageNanos: 30}, Memory: MemoryStats{SwapLimit: 8192, SwapAvailable: 8192}},
		CPUTime:    CPUTime{10, 20},
		Throttling: Throttling{Periods: 5, ThrottledPeriods: 4, ThrottledNanos: 3, Bursts: 2, BurstNanos: 1},
		MaxMemory:  99, MemoryHits: MemoryHits{Max: 3}, KernelUsed: 77,
		Devices: []DeviceIO{{Major: 8, ReadBytes: 1, WriteBytes: 2, SyncBytes: 3, DiscardBytes: 4, Reads: 5, Writes: 6, Discards: 7}},
		Limits:  Limits{CPUShares: 1024, PeriodMicros: 100000, QuotaMicros: 20000, MemoryReservation: Unlimited, SwapWithMemory: 8192, Pids: 100},
	}
	r := newReader()
	var d Details
	dirs := func(controller string) string {
		if controller == "hugetlb" { // its sizes are those of this machine
			return ""
		}
		return fixture(t, limited)
	}
	r.v1(dirs, &d.Stats)
	r.detailsV1(dirs, &d)
	d.Memory.derive()
	d.Time = time.Time{}
	if r.err != nil || !reflect.DeepEqual(d, want) {
		t.Errorf("%+v, %v\nwant %+v", d, r.err, want)
	}

	// BFQ's own counters are better where it counts, and no quota is -1.
	r = newReader()
	d = Details{}
	r.detailsV1(oneDir(fixture(t, map[string]string{
		"blkio.bfq.io_service_bytes_recursive":      "8:0 Read 10\nTotal 10\n",
		"blkio.throttle.io_service_bytes_recursive": "8:0 Read 1\nTotal 1\n",
		"cpu.cfs_quota_us":                          "-1\n",
	})), &d)
	if r.err != nil || len(d.Devices) != 1 || d.Devices[0].ReadBytes != 10 || d.Limits.QuotaMicros != 0 {
		t.Errorf("%+v, %v", d, r.err)
	}
}

func TestReadDetails(t *testing.T) {
	p := newCgroup(t)
	limits := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Quota: ptr(int64(20000)), Period: ptr(uint64(100000))},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 * mib)), Swap: ptr(int64(64 * mib))},
	}
	if err := Update(p, limits); err != nil {
		t.Fatal(err)
	}
	ready := t.TempDir() + "/ready"
	start(t, p, `i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo > `+ready+`; sleep 60 & wait`)
	waitFor(t, func() bool { return fileExists(ready) })
	d, err := ReadDetails(p)
	if err != nil {
		t.Fatal(err)
	}
	if d.CPUTime.UserNanos == 0 || d.CPUTime.UserNanos > 2*d.CPU.UsageNanos || d.Throttling.Periods == 0 {
		t.Errorf("CPU %+v of %d ns, %+v", d.CPUTime, d.CPU.UsageNanos, d.Throttling)
	}
	if d.Limits.QuotaMicros != 20000 || d.Limits.PeriodMicros != 100000 || d.Memory.Limit != 64*mib {
		t.Errorf("limits %+v, memory %d", d.Limits, d.Memory.Limit)
	}
	if d.MaxMemory != 0 && d.MaxMemory < d.Memory.RSS {
		t.Errorf("at most %d bytes, of which %d are in use", d.MaxMemory, d.Memory.RSS)
	}
}

func FuzzDevices(f *testing.F) {
	f.Add([]byte("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n"))
	f.Add([]byte("8:0 Read 1\nTotal 1\n"))
	f.Add([]byte("4294967296:0 rbytes=1\n:\n8: \n8:0 rbytes=-1"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, file := range []string{"io.stat", "blkio.throttle.io_service_bytes_recursive"} {
			if err := os.WriteFile(dir+"/"+file, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for _, devices := range [][]DeviceIO{newReader().devicesV2(dir), newReader().devicesV1(dir)} {
			seen := map[[2]uint32]bool{}
			for _, d := range devices {
				if seen[[2]uint32{d.Major, d.Minor}] {
					t.Errorf("%d:%d twice", d.Major, d.Minor)
				}
				seen[[2]uint32{d.Major, d.Minor}] = true
			}
			if len(devices) > strings.Count(string(data), "\n")+1 {
				t.Errorf("%d devices of %q", len(devices), data)
			}
		}
	})
}

func FuzzPressure(f *testing.F) {
	f.Add([]byte("some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 total=2\n"))
	f.Add([]byte("some total=18446744073709551615\nfull total=18446744073709551"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(dir+"/cpu.pressure", data, 0o600); err != nil {
			t.Fatal(err)
		}
		r := newReader()
		if p := r.pressure(dir, "cpu.pressure"); p != nil && r.err == nil && p.Some.TotalNanos%1000 != 0 {
			t.Errorf("%d ns are no microseconds", p.Some.TotalNanos)
		}
	})
}

// BenchmarkReadStats is what a container costs each time when the kubelet lists.
func BenchmarkReadStats(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: makes cgroups")
	}
	p := Path(testParent + "/bench")
	if err := CreateSandbox(p); err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := Remove(p); err != nil {
			b.Error(err)
		}
	}()
	for b.Loop() {
		if _, err := ReadStats(p); err != nil {
			b.Fatal(err)
		}
	}
}

func TestTasksOfACgroup(t *testing.T) {
	p := newPath(t)
	if n, err := CountProcesses(p); n != 0 || err != nil {
		t.Errorf("no cgroup: %d, %v", n, err)
	}
	if err := CreateSandbox(p); err != nil {
		t.Fatal(err)
	}
	ready := t.TempDir() + "/ready"
	start(t, p, `exec 7< /dev/null; sleep 60 & echo > `+ready+`; wait`)
	waitFor(t, func() bool { n, _ := CountProcesses(p); return n == 2 && fileExists(ready) })
	tasks, err := ReadTasks(p)
	// The shell and its child have standard streams and the file each.
	if err != nil || tasks.Processes != 2 || tasks.FileDescriptors < 8 || tasks.Sockets > tasks.FileDescriptors {
		t.Errorf("%+v, %v", tasks, err)
	}
}
