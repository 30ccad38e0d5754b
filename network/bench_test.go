package network

import (
	"cmp"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkPod is the network of a pod, set up and torn down: bridge with masquerade, host-local, a host port; beside as many
// other pods as the name says, with the same. Between the pods the kernel has time to free what was deleted: see BenchmarkFloor.
func BenchmarkPod(b *testing.B) {
	for _, backend := range []string{"iptables", "nftables"} {
		for _, others := range []int{0, 200} {
			b.Run(fmt.Sprintf("%s/pods=%d", backend, others), func(b *testing.B) { benchmarkPod(b, backend, nil, others) })
		}
	}
	b.Run("Programs", func(b *testing.B) { benchmarkPod(b, "iptables", []string{ExecAll}, 0) })
}

func benchmarkPod(b *testing.B, backend string, exec []string, others int) {
	dir := b.TempDir()
	if err := os.Mkdir(dir+"/conf", 0o700); err != nil {
		b.Fatal(err)
	}
	conflist := `{"cniVersion":"1.0.0","name":"bench","plugins":[
{"type":"bridge","bridge":"br0","isGateway":true,"ipMasq":true,"ipMasqBackend":"` + backend + `","hairpinMode":true,
"ipam":{"type":"host-local","dataDir":"` + dir + `/ipam","ranges":[[{"subnet":"10.90.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","backend":"` + backend + `","capabilities":{"portMappings":true}}]}`
	if err := os.WriteFile(dir+"/conf/10.conflist", []byte(conflist), 0o600); err != nil {
		b.Fatal(err)
	}
	run, err := os.MkdirTemp("/run", "berth-bench") // on a tmpfs, as in production
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(run) })
	m, err := Open(Options{RunDir: run, ConfDir: dir + "/conf", BinDirs: []string{referenceBin(b)}, CacheDir: dir + "/cache", Exec: exec, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close() //nolint:errcheck // it tells no errors
	host := dir + "/host"
	namespace := func(path string) {
		if err := Pin(NamespaceSet{Net: path}); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = Unpin(path) })
	}
	namespace(host)
	pod := func(n int) Pod {
		return Pod{
			ID: "pod" + itoa(n), Name: "web", Namespace: "shop", UID: "u", NetNS: dir + "/pod" + itoa(n),
			PortMappings: []PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: int32(8000 + n)}},
		}
	}
	inHost := func(f func() error) cost {
		start := costNow()
		if err := InNamespaces([]string{host}, f); err != nil {
			b.Fatal(err)
		}
		return costNow().less(start)
	}
	add := func(n int) cost {
		return inHost(func() error { _, err := m.Setup(b.Context(), pod(n)); return err })
	}
	for n := range others {
		namespace(pod(n).NetNS)
		add(n)
	}
	var up, down []cost
	p := pod(others)
	namespace(p.NetNS)
	for b.Loop() {
		up = append(up, add(others))
		down = append(down, inHost(func() error { return m.Teardown(b.Context(), p) }))
		time.Sleep(pause)
	}
	report(b, "up", up)
	report(b, "down", down)
}

// cost is what something takes: wall is what whoever waits for it sees, cpu what the process and the kernel do for it, which says
// more on a machine that others use.
type cost struct{ wall, cpu time.Duration }

func costNow() cost {
	var r unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &r) // cannot fail
	return cost{time.Duration(time.Now().UnixNano()), time.Duration(r.Utime.Nano() + r.Stime.Nano())}
}

func (c cost) less(o cost) cost { return cost{c.wall - o.wall, c.cpu - o.cpu} }

// report reports medians.
func report(b *testing.B, what string, costs []cost) {
	median := func(of func(cost) time.Duration) float64 {
		slices.SortFunc(costs, func(x, y cost) int { return cmp.Compare(of(x), of(y)) })
		return float64(of(costs[len(costs)/2]).Microseconds()) / 1000
	}
	b.ReportMetric(median(func(c cost) time.Duration { return c.wall }), "ms/"+what)
	b.ReportMetric(median(func(c cost) time.Duration { return c.cpu }), "cpu-ms/"+what)
}

// pause is how long the kernel may take to free what was deleted.
const pause = 50 * time.Millisecond
