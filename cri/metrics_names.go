package cri

import (
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/network"
)

// metrics are the names that the kubelet serves at /metrics/cadvisor for pods and containers by cAdvisor, in its order. Two
// are not here: container_health_state, which is -1 for every container of Kubernetes', and container_scrape_error, which is
// about cAdvisor itself.
var metrics = []metric{
	gauge("container_last_seen", "Unix time at which the container was measured.", func(*measured) uint64 { return uint64(time.Now().Unix()) }),
	gauge("container_creation_time_seconds", "Unix time at which the container was created.", func(s *measured) uint64 { return uint64(s.created.Unix()) }),
	gauge("container_start_time_seconds", "Unix time at which the container was started.", func(s *measured) uint64 { return uint64(s.started.Unix()) }),

	counter("container_cpu_user_seconds_total", "CPU time spent in user mode, in seconds.", func(s *measured) uint64 { return seconds64(s.usage.CPUTime.UserNanos) }),
	counter("container_cpu_system_seconds_total", "CPU time spent in the kernel, in seconds.", func(s *measured) uint64 { return seconds64(s.usage.CPUTime.SystemNanos) }),
	{
		name: "container_cpu_usage_seconds_total", help: "CPU time spent, in seconds.", kind: cri.MetricType_COUNTER, labels: []string{"cpu"},
		values: func(s *measured) []value { return []value{{seconds64(s.usage.CPU.UsageNanos), []string{"total"}}} },
	},
	underQuota("container_cpu_cfs_periods_total", "Periods of the CPU quota in which the container ran.", func(t cgroups.Throttling) uint64 { return t.Periods }),
	underQuota("container_cpu_cfs_throttled_periods_total", "Periods in which the quota was used up.", func(t cgroups.Throttling) uint64 { return t.ThrottledPeriods }),
	underQuota("container_cpu_cfs_throttled_seconds_total", "Time for which the quota held the container up, in seconds.", func(t cgroups.Throttling) uint64 { return seconds64(t.ThrottledNanos) }),
	underQuota("container_cpu_cfs_burst_periods_total", "Periods in which more than the quota was used.", func(t cgroups.Throttling) uint64 { return t.Bursts }),
	underQuota("container_cpu_cfs_burst_seconds_total", "CPU time used above the quota, in seconds.", func(t cgroups.Throttling) uint64 { return seconds64(t.BurstNanos) }),

	onHugePages("container_hugetlb_usage_bytes", "Huge pages in use, in bytes.", func(p cgroups.HugePageStats) uint64 { return p.Usage }),
	onHugePages("container_hugetlb_max_usage_bytes", "The most huge pages that were in use, in bytes.", func(p cgroups.HugePageStats) uint64 { return p.MaxUsage }),

	gauge("container_memory_cache", "Page cache, in bytes.", func(s *measured) uint64 { return s.usage.Memory.Cache }),
	gauge("container_memory_rss", "Anonymous memory, in bytes.", func(s *measured) uint64 { return s.usage.Memory.RSS }),
	gauge("container_memory_kernel_usage", "Kernel memory, in bytes.", func(s *measured) uint64 { return s.usage.KernelUsed }),
	gauge("container_memory_mapped_file", "Mapped files, in bytes.", func(s *measured) uint64 { return s.usage.Memory.MappedFile }),
	gauge("container_memory_swap", "Swap in use, in bytes.", func(s *measured) uint64 { return s.usage.Memory.SwapUsage }),
	counter("container_memory_failcnt", "Times that memory usage met its limit.", func(s *measured) uint64 { return s.usage.MemoryHits.Max }),
	gauge("container_memory_usage_bytes", "All memory in use, the page cache included, in bytes.", func(s *measured) uint64 { return s.usage.Memory.Usage }),
	gauge("container_memory_max_usage_bytes", "The most memory that was in use, in bytes.", func(s *measured) uint64 { return s.usage.MaxMemory }),
	gauge("container_memory_working_set_bytes", "Memory in use that cannot be reclaimed easily, in bytes.", func(s *measured) uint64 { return s.usage.Memory.WorkingSet }),
	gauge("container_memory_total_active_file_bytes", "Page cache on the active list, in bytes.", func(s *measured) uint64 { return s.usage.Memory.ActiveFile }),
	gauge("container_memory_total_inactive_file_bytes", "Page cache on the inactive list, in bytes.", func(s *measured) uint64 { return s.usage.Memory.InactiveFile }),
	{
		name: "container_memory_failures_total", help: "Page faults.", kind: cri.MetricType_COUNTER, labels: []string{"failure_type", "scope"},
		values: faults,
	},
	counter("container_memory_events_high_total", "Times that memory.high held the container up.", func(s *measured) uint64 { return s.usage.MemoryHits.High }),
	counter("container_memory_events_max_total", "Times that memory usage was about to exceed memory.max.", onV2(func(s *measured) uint64 { return s.usage.MemoryHits.Max })),
	gauge("container_memory_file_dirty_bytes", "Page cache that waits to be written, in bytes.", func(s *measured) uint64 { return s.usage.Memory.Dirty }),
	gauge("container_memory_file_writeback_bytes", "Page cache that is being written, in bytes.", func(s *measured) uint64 { return s.usage.Memory.Writeback }),
	counter("container_memory_pgscan_total", "Pages that were looked at to reclaim them.", func(s *measured) uint64 { return s.usage.Memory.Reclaim.Scanned }),
	counter("container_memory_pgsteal_total", "Pages that were reclaimed.", func(s *measured) uint64 { return s.usage.Memory.Reclaim.Stolen }),
	counter("container_memory_workingset_refault_file_total", "File pages that were reclaimed and needed again.", func(s *measured) uint64 { return s.usage.Memory.Reclaim.RefaultedFile }),
	counter("container_memory_workingset_refault_anon_total", "Anonymous pages that were reclaimed and needed again.", func(s *measured) uint64 { return s.usage.Memory.Reclaim.RefaultAnon }),

	onDisk("container_fs_inodes_free", "Free inodes of the file system of the writable layer.", func(s *measured) uint64 { return s.disk.Ffree }),
	onDisk("container_fs_inodes_total", "Inodes of the file system of the writable layer.", func(s *measured) uint64 { return s.disk.Files }),
	onDisk("container_fs_limit_bytes", "Size of the file system of the writable layer, in bytes.", func(s *measured) uint64 { return s.disk.Blocks * uint64(s.disk.Bsize) }),
	onDisk("container_fs_usage_bytes", "What the writable layer takes, in bytes.", func(s *measured) uint64 { return s.diskUsed }),
	onDevice("container_fs_reads_bytes_total", "Bytes read from the device.", func(d cgroups.DeviceIO) uint64 { return d.ReadBytes }),
	onDevice("container_fs_reads_total", "Reads from the device.", func(d cgroups.DeviceIO) uint64 { return d.Reads }),
	onDevice("container_fs_writes_bytes_total", "Bytes written to the device.", func(d cgroups.DeviceIO) uint64 { return d.WriteBytes }),
	onDevice("container_fs_writes_total", "Writes to the device.", func(d cgroups.DeviceIO) uint64 { return d.Writes }),
	{
		name: "container_blkio_device_usage_total", help: "Bytes moved between the container and the device.", kind: cri.MetricType_COUNTER,
		labels: []string{"device", "major", "minor", "operation"}, values: deviceUsage,
	},

	onInterface("container_network_receive_bytes_total", "Bytes received.", func(c network.Counters) uint64 { return c.Rx.Bytes }),
	onInterface("container_network_receive_packets_total", "Packets received.", func(c network.Counters) uint64 { return c.Rx.Packets }),
	onInterface("container_network_receive_packets_dropped_total", "Packets dropped that came in.", func(c network.Counters) uint64 { return c.Rx.Dropped }),
	onInterface("container_network_receive_errors_total", "Errors while receiving.", func(c network.Counters) uint64 { return c.Rx.Errors }),
	onInterface("container_network_transmit_bytes_total", "Bytes sent.", func(c network.Counters) uint64 { return c.Tx.Bytes }),
	onInterface("container_network_transmit_packets_total", "Packets sent.", func(c network.Counters) uint64 { return c.Tx.Packets }),
	onInterface("container_network_transmit_packets_dropped_total", "Packets dropped that were to go out.", func(c network.Counters) uint64 { return c.Tx.Dropped }),
	onInterface("container_network_transmit_errors_total", "Errors while sending.", func(c network.Counters) uint64 { return c.Tx.Errors }),

	gauge("container_processes", "Processes.", func(s *measured) uint64 { return s.tasks.Processes }),
	gauge("container_file_descriptors", "Open file descriptors.", func(s *measured) uint64 { return s.tasks.FileDescriptors }),
	gauge("container_sockets", "Open sockets.", func(s *measured) uint64 { return s.tasks.Sockets }),
	gauge("container_threads_max", "Threads that there may be; 0 for any number.", func(s *measured) uint64 { return s.usage.Limits.Pids }),
	gauge("container_threads", "Threads.", func(s *measured) uint64 { return s.usage.Pids.Current }),
	{
		name: "container_ulimits_soft", help: "Soft limits of the first process.", kind: cri.MetricType_GAUGE, labels: []string{"ulimit"},
		values: openFilesLimit,
	},
	counter("container_oom_events_total", "Processes killed because memory ran out.", func(s *measured) uint64 { return s.usage.OOMKills }),

	pressure("container_pressure_cpu_stalled_seconds_total", "Time in which all tasks waited for a CPU, in seconds.", cpuPressure, full),
	pressure("container_pressure_cpu_waiting_seconds_total", "Time in which some task waited for a CPU, in seconds.", cpuPressure, some),
	pressure("container_pressure_memory_stalled_seconds_total", "Time in which all tasks waited for memory, in seconds.", memoryPressure, full),
	pressure("container_pressure_memory_waiting_seconds_total", "Time in which some task waited for memory, in seconds.", memoryPressure, some),
	pressure("container_pressure_io_stalled_seconds_total", "Time in which all tasks waited for a device, in seconds.", ioPressure, full),
	pressure("container_pressure_io_waiting_seconds_total", "Time in which some task waited for a device, in seconds.", ioPressure, some),

	gauge("container_spec_cpu_period", "Period of the CPU quota, in microseconds.", func(s *measured) uint64 { return s.usage.Limits.PeriodMicros }),
	{
		name: "container_spec_cpu_quota", help: "CPU time in each period, in microseconds.", kind: cri.MetricType_GAUGE,
		values: func(s *measured) []value {
			if s.usage.Limits.QuotaMicros == 0 {
				return nil
			}
			return []value{{value: s.usage.Limits.QuotaMicros}}
		},
	},
	gauge("container_spec_cpu_shares", "CPU shares.", func(s *measured) uint64 { return s.usage.Limits.CPUShares }),
	gauge("container_spec_memory_limit_bytes", "Memory limit, in bytes; 0 for none.", func(s *measured) uint64 { return limit(s.usage.Memory.Limit) }),
	gauge("container_spec_memory_swap_limit_bytes", "Limit of memory and swap (cgroup v1) or of swap (v2), in bytes; 0 for none.", func(s *measured) uint64 { return limit(s.usage.Limits.SwapWithMemory) }),
	gauge("container_spec_memory_reservation_limit_bytes", "Memory that is the container's own when it is short, in bytes; 0 for none.", func(s *measured) uint64 { return limit(s.usage.Limits.MemoryReservation) }),
}

// onV2 is 0 on cgroup v1, which has no such event.
func onV2(of func(*measured) uint64) func(*measured) uint64 {
	return func(s *measured) uint64 {
		if cgroups.Version() != 2 {
			return 0
		}
		return of(s)
	}
}
