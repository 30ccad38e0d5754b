package cri

import (
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/network"
)

// whole is a container of which everything is known.
func whole() *measured {
	pressure := &cgroups.Pressure{Some: cgroups.Stall{TotalNanos: 2e9}, Full: cgroups.Stall{TotalNanos: 1e9}}
	return &measured{
		container: "c", id: "/kubepods/podX/" + idA, image: "busybox:1", name: idA, namespace: "ns", pod: "p",
		created: time.Unix(10, 0), started: time.Unix(11, 0), pid: 1, openFiles: unix.Rlimit{Cur: 1024},
		usage: &cgroups.Details{
			Stats: cgroups.Stats{
				CPU: cgroups.CPUStats{UsageNanos: 3999999999, Pressure: pressure}, IO: cgroups.IOStats{Pressure: pressure},
				Memory: cgroups.MemoryStats{WorkingSet: 77, Limit: cgroups.Unlimited, Pressure: pressure},
			},
			Devices:   []cgroups.DeviceIO{{Major: 1 << 20, ReadBytes: 5}},
			HugePages: []cgroups.HugePageStats{{Size: "2MB", Usage: 1}},
			Limits:    cgroups.Limits{QuotaMicros: 20000},
		},
		network: []network.Counters{{Name: "eth0", Rx: network.Direction{Bytes: 656}}},
		disk:    &disk{device: "/dev/vda"}, diskUsed: 4096,
	}
}

// Prometheus refuses a scrape with a name that is there twice, or with a value whose labels are not those of its name.
func TestEveryMetricHasHelpAndTheLabelsOfItsName(t *testing.T) {
	values := whole().appendTo(nil)
	seen := map[string]bool{}
	for _, m := range metrics {
		if seen[m.name] || m.help == "" || !strings.HasPrefix(m.name, "container_") {
			t.Errorf("%s: twice, without help, or not of a container", m.name)
		}
		seen[m.name] = true
		if counts := strings.HasSuffix(m.name, "_total") && m.name != "container_fs_inodes_total" || m.name == "container_memory_failcnt"; counts != (m.kind == cri.MetricType_COUNTER) {
			t.Errorf("%s is a %v", m.name, m.kind)
		}
		n := 0
		series := map[string]bool{}
		for _, v := range values {
			if v.GetName() != m.name {
				continue
			}
			n++
			if len(v.GetLabelValues()) != len(m.labelKeys()) || v.GetMetricType() != m.kind || v.GetValue() == nil {
				t.Errorf("%v does not fit its labels %q", v, m.labelKeys())
			}
			if key := strings.Join(v.GetLabelValues(), "\xff"); series[key] {
				t.Errorf("%v twice", v)
			} else {
				series[key] = true
			}
		}
		if n == 0 {
			t.Errorf("%s has no value", m.name)
		}
	}
}

func TestValuesOfMetrics(t *testing.T) {
	for _, tc := range []struct {
		name   string
		labels []string
		want   uint64
	}{
		{"container_cpu_usage_seconds_total", []string{"total"}, 3},
		{"container_memory_working_set_bytes", nil, 77},
		{"container_spec_memory_limit_bytes", nil, 0},
		{"container_spec_cpu_quota", nil, 20000},
		{"container_network_receive_bytes_total", []string{"eth0"}, 656},
		{"container_fs_usage_bytes", []string{"/dev/vda"}, 4096},
		{"container_fs_reads_bytes_total", []string{""}, 5},
		{"container_ulimits_soft", []string{"max_open_files"}, 1024},
		{"container_pressure_io_waiting_seconds_total", nil, 2},
		{"container_pressure_io_stalled_seconds_total", nil, 1},
		{"container_start_time_seconds", nil, 11},
	} {
		want := append([]string{"c", "/kubepods/podX/" + idA, "busybox:1", idA, "ns", "p"}, tc.labels...)
		found := false
		for _, v := range whole().appendTo(nil) {
			if v.GetName() == tc.name && slices.Equal(v.GetLabelValues(), want) {
				found = true
				if v.GetValue().GetValue() != tc.want {
					t.Errorf("%s%q: %d, want %d", tc.name, want, v.GetValue().GetValue(), tc.want)
				}
			}
		}
		if !found {
			t.Errorf("no %s%q", tc.name, want)
		}
	}
}

// A pod's cgroup has no network, no disk and no process of its own, and a kernel may count no pressure.
func TestWhatIsNotKnownHasNoValue(t *testing.T) {
	m := whole()
	m.network, m.disk, m.pid, m.openFiles, m.usage = nil, nil, 0, unix.Rlimit{}, &cgroups.Details{}
	for _, v := range m.appendTo(nil) {
		for _, prefix := range []string{"container_network_", "container_fs_", "container_ulimits_", "container_pressure_", "container_blkio_", "container_spec_cpu_quota", "container_cpu_cfs_"} {
			if strings.HasPrefix(v.GetName(), prefix) {
				t.Errorf("%v", v)
			}
		}
	}
}

func TestTheKubeletFindsADefaultInterfaceAlways(t *testing.T) {
	at := time.Unix(5, 0)
	other := network.Counters{Name: "net1", Tx: network.Direction{Bytes: 1, Errors: 2}}
	for name, tc := range map[string]struct {
		counters []network.Counters
		name     string
		others   int
	}{
		"none":      {nil, "", 0},
		"eth0":      {[]network.Counters{other, {Name: "eth0"}}, "eth0", 1},
		"another":   {[]network.Counters{other}, "", 1},
		"only eth0": {[]network.Counters{{Name: "eth0"}}, "eth0", 0},
	} {
		got := networkUsage(tc.counters, at)
		if got.GetDefaultInterface() == nil || got.GetDefaultInterface().GetName() != tc.name || len(got.GetInterfaces()) != tc.others || got.GetTimestamp() != at.UnixNano() {
			t.Errorf("%s: %v", name, got)
		}
	}
}
