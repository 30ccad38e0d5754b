package cri

import (
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/network"
)

// measured is what metrics are about: a pod's cgroup, a sandbox or a container. What it has not is zero.
type measured struct {
	container, id, image, name, namespace, pod string

	created, started time.Time
	pid              int
	usage            *cgroups.Details
	tasks            cgroups.Tasks
	openFiles        unix.Rlimit
	network          []network.Counters
	disk             *disk
	diskUsed         uint64
}

// metric is one name of /metrics/cadvisor.
type metric struct {
	name, help string
	kind       cri.MetricType
	labels     []string // beside the base ones
	values     func(*measured) []value
}

type value struct {
	value  uint64
	labels []string
}

// baseLabels are those that the kubelet gives to every series of cAdvisor's.
var baseLabels = []string{"container", "id", "image", "name", "namespace", "pod"}

func (m *metric) labelKeys() []string {
	return append(baseLabels[:len(baseLabels):len(baseLabels)], m.labels...)
}

func counter(name, help string, of func(*measured) uint64) metric {
	return metric{name: name, help: help, kind: cri.MetricType_COUNTER, values: one(of)}
}

func gauge(name, help string, of func(*measured) uint64) metric {
	return metric{name: name, help: help, kind: cri.MetricType_GAUGE, values: one(of)}
}

// underQuota is a counter that is there only where CPU time is limited.
func underQuota(name, help string, of func(cgroups.Throttling) uint64) metric {
	return metric{name: name, help: help, kind: cri.MetricType_COUNTER, values: func(s *measured) []value {
		if s.usage.Limits.QuotaMicros == 0 {
			return nil
		}
		return []value{{value: of(s.usage.Throttling)}}
	}}
}

func one(of func(*measured) uint64) func(*measured) []value {
	return func(s *measured) []value { return []value{{value: of(s)}} }
}

// pressure is a counter that is there only where the kernel counts.
func pressure(name, help string, of func(*cgroups.Details) *cgroups.Pressure, line func(*cgroups.Pressure) cgroups.Stall) metric {
	return metric{name: name, help: help, kind: cri.MetricType_COUNTER, values: func(s *measured) []value {
		p := of(s.usage)
		if p == nil {
			return nil
		}
		return []value{{value: seconds64(line(p).TotalNanos)}}
	}}
}

func some(p *cgroups.Pressure) cgroups.Stall { return p.Some }
func full(p *cgroups.Pressure) cgroups.Stall { return p.Full }

func cpuPressure(d *cgroups.Details) *cgroups.Pressure    { return d.CPU.Pressure }
func memoryPressure(d *cgroups.Details) *cgroups.Pressure { return d.Memory.Pressure }
func ioPressure(d *cgroups.Details) *cgroups.Pressure     { return d.IO.Pressure }

// onInterface is a counter of each interface of a pod.
func onInterface(name, help string, of func(network.Counters) uint64) metric {
	return metric{name: name, help: help, kind: cri.MetricType_COUNTER, labels: []string{"interface"}, values: func(s *measured) []value {
		var list []value
		for _, c := range s.network {
			list = append(list, value{of(c), []string{c.Name}})
		}
		return list
	}}
}

// onDevice is a counter of each device that a cgroup has used.
func onDevice(name, help string, of func(cgroups.DeviceIO) uint64) metric {
	return metric{name: name, help: help, kind: cri.MetricType_COUNTER, labels: []string{"device"}, values: func(s *measured) []value {
		var list []value
		for _, d := range s.usage.Devices {
			list = append(list, value{of(d), []string{cgroups.DeviceName(d.Major, d.Minor)}})
		}
		return list
	}}
}

// onDisk is a gauge of the file system with a container's writable layer.
func onDisk(name, help string, of func(*measured) uint64) metric {
	return metric{name: name, help: help, kind: cri.MetricType_GAUGE, labels: []string{"device"}, values: func(s *measured) []value {
		if s.disk == nil {
			return nil
		}
		return []value{{of(s), []string{s.disk.device}}}
	}}
}

// onHugePages is a gauge of each size of huge pages.
func onHugePages(name, help string, of func(cgroups.HugePageStats) uint64) metric {
	return metric{name: name, help: help, kind: cri.MetricType_GAUGE, labels: []string{"pagesize"}, values: func(s *measured) []value {
		var list []value
		for _, p := range s.usage.HugePages {
			list = append(list, value{of(p), []string{p.Size}})
		}
		return list
	}}
}

func faults(s *measured) []value {
	m := s.usage.Memory
	return []value{
		{m.PageFaults, []string{"pgfault", "container"}},
		{m.MajorPageFaults, []string{"pgmajfault", "container"}},
		{m.PageFaults, []string{"pgfault", "hierarchy"}},
		{m.MajorPageFaults, []string{"pgmajfault", "hierarchy"}},
	}
}

// deviceUsage names operations as the kernel's v1 interface does, on v2, too.
func deviceUsage(s *measured) []value {
	var list []value
	for _, d := range s.usage.Devices {
		for _, op := range []struct {
			name  string
			bytes uint64
		}{{"Read", d.ReadBytes}, {"Write", d.WriteBytes}, {"Sync", d.SyncBytes}, {"Async", d.AsyncBytes}, {"Discard", d.DiscardBytes}} {
			if cgroups.Version() == 2 && op.name != "Read" && op.name != "Write" {
				continue
			}
			list = append(list, value{op.bytes, []string{
				cgroups.DeviceName(d.Major, d.Minor), strconv.Itoa(int(d.Major)), strconv.Itoa(int(d.Minor)), op.name,
			}})
		}
	}
	return list
}

// openFilesLimit is left out where there is none: the kubelet's -1 for that is no number of the CRI's.
func openFilesLimit(s *measured) []value {
	if s.openFiles.Cur == 0 || s.openFiles.Cur == unix.RLIM_INFINITY {
		return nil
	}
	return []value{{s.openFiles.Cur, []string{"max_open_files"}}}
}

// seconds64 loses what is less than a second: a value of the CRI's is a whole number.
func seconds64(nanos uint64) uint64 { return nanos / uint64(time.Second) }

// limit is 0 where there is none.
func limit(v uint64) uint64 {
	if v == cgroups.Unlimited {
		return 0
	}
	return v
}
