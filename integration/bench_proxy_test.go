//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/berth-run/berth/integration/lab"
)

const (
	// changeRounds are how often a Service is created, moved and deleted.
	changeRounds = 20
	// restRound is as long as kube-proxy waits between two changes, and more: it does not wait for the one before.
	restRound = 1500 * time.Millisecond
	// mostBeside is up to how many Services kube-proxy is measured.
	mostBeside = 10_000
)

// BenchmarkServiceProxy measures berth proxy and kube-proxy, one after the other, beside so many Services of two endpoints as
// BERTH_BENCH_PROXY says, with a real API server, each in a network namespace of its own. See docs/results.md for what the
// figures are.
func BenchmarkServiceProxy(b *testing.B) {
	sizes := numbers(b, "BERTH_BENCH_PROXY")
	if sizes == nil {
		b.Skip("BERTH_BENCH_PROXY has no numbers of Services: see make bench-proxy")
	}
	slices.Sort(sizes)
	programs := proxyPrograms(b)
	services := newProxyCrowd(b)
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "Services\tproxy\tfirst sync\tstart again\tcreated\tmoved\tdeleted\tRSS\tpeak\tCPU of first sync\tCPU of a change")
	for _, n := range sizes {
		services.grow(b, n)
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			var all []*proxyFigures
			for _, p := range programs {
				if p.name != "berth" && n > mostBeside {
					continue
				}
				f := services.measure(b, p, changeRounds)
				f.row(w, n, p.name)
				all = append(all, f)
			}
			ratios(b, w, all)
		})
	}
	must(b, w.Flush())
	fmt.Print(table.String())
}

type proxyProgram struct {
	name, path string
	args       []string
}

// proxyPrograms are berth and kube-proxy.
func proxyPrograms(b *testing.B) []proxyProgram {
	b.Helper()
	if tools.KubeProxy == "" {
		built, err := lab.BuildTools(b.Context(), os.Stderr, "kube-proxy")
		must(b, err)
		tools.KubeProxy = built.KubeProxy
	}
	root, err := lab.RepoRoot()
	must(b, err)
	return []proxyProgram{{"berth", filepath.Join(root, "bin/berth"), []string{"proxy"}}, {"kube-proxy", tools.KubeProxy, nil}}
}

// proxyFigures are what was measured of a proxy beside a number of Services.
type proxyFigures struct {
	first, again            time.Duration // from its start until all that is asked for is answered; until it says that it is done, where the rules are there
	created, moved, deleted []time.Duration
	rss, peak               int // KiB, after changes
	firstCPU, changeCPU     time.Duration
}

// measure runs a proxy in a new namespace beside the Services that there are, and changes one so often.
func (c *proxyCrowd) measure(b *testing.B, p proxyProgram, changes int) *proxyFigures {
	n := newProxyNode(b, c.cp, fmt.Sprintf("%s-%d", p.name, len(c.vips)))
	f := &proxyFigures{}
	began := time.Now()
	n.start(p.path, p.args...)
	n.answered(c.sample())
	f.first = time.Since(began)
	n.synced()
	time.Sleep(2 * restRound) // what it does afterwards by itself belongs to it
	f.firstCPU = cpu(b, n.proxy.PID())
	for i := range changes {
		c.change(b, n, fmt.Sprintf("probe-%s-%d", n.name, i), f)
		time.Sleep(restRound)
	}
	f.changeCPU = (cpu(b, n.proxy.PID()) - f.firstCPU) / time.Duration(3*changes)
	f.rss, f.peak = statusKiB(b, n.proxy.PID(), "VmRSS"), peakKiB(b, n.proxy.PID())
	must(b, n.proxy.Stop())
	began = time.Now()
	n.start(p.path, p.args...)
	n.synced()
	f.again = time.Since(began)
	must(b, n.proxy.Stop())
	return f
}

// change creates a Service with an endpoint, moves it to the other endpoint, and deletes it. A time is from before the request
// that makes the difference until connections are answered by it.
func (c *proxyCrowd) change(b *testing.B, n *proxyNode, name string, f *proxyFigures) {
	b.Helper()
	vip, err := c.createService(b.Context(), name)
	must(b, err)
	f.created = append(f.created, n.until(vip, func(s string) bool { return s == endpointA }, func() error {
		return c.request(b.Context(), http.MethodPost, slicesPath, sliceOf(name, endpointA))
	}))
	f.moved = append(f.moved, n.until(vip, func(s string) bool { return s == endpointB }, func() error {
		return c.request(b.Context(), http.MethodPut, slicesPath+"/"+name, sliceOf(name, endpointB))
	}))
	f.deleted = append(f.deleted, n.until(vip, func(s string) bool { return s == "" }, func() error {
		return errors.Join(c.request(b.Context(), http.MethodDelete, slicesPath+"/"+name, nil), c.request(b.Context(), http.MethodDelete, servicesPath+"/"+name, nil))
	}))
}

// values are those of a row, in the table's order.
func (f *proxyFigures) values() []float64 {
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return []float64{
		ms(f.first), ms(f.again), ms(median(f.created)), ms(median(f.moved)), ms(median(f.deleted)),
		float64(f.rss) / 1024, float64(f.peak) / 1024, ms(f.firstCPU), ms(f.changeCPU),
	}
}

func (f *proxyFigures) row(w *tabwriter.Writer, n int, name string) {
	v := f.values()
	fmt.Fprintf(w, "%d\t%s", n, name)
	for i, unit := range []string{"ms", "ms", "ms", "ms", "ms", "MiB", "MiB", "ms", "ms"} {
		fmt.Fprintf(w, "\t%.1f %s", v[i], unit)
	}
	fmt.Fprintln(w)
}

// ratios are berth's figures through kube-proxy's.
func ratios(b *testing.B, w *tabwriter.Writer, all []*proxyFigures) {
	names := []string{"first-sync", "start-again", "created", "moved", "deleted", "RSS", "peak", "first-CPU", "change-CPU"}
	ours := all[0].values()
	for i, name := range names[:5] {
		b.ReportMetric(ours[i], "ms/"+name)
	}
	b.ReportMetric(ours[5], "MiB")
	b.ReportMetric(0, "ns/op") // of all rounds together: of no use
	if len(all) < 2 {
		return
	}
	theirs := all[1].values()
	fmt.Fprint(w, "\tratio")
	for i, name := range names {
		b.ReportMetric(ours[i]/theirs[i], "ratio/"+name)
		fmt.Fprintf(w, "\t%.3f", ours[i]/theirs[i])
	}
	fmt.Fprintln(w)
}

// proxyCrowd is a cluster of many Services.
type proxyCrowd struct {
	cp   *lab.ControlPlane
	vips []netip.Addr // of all Services that stay
}

const (
	servicesPath = "/api/v1/namespaces/default/services"
	slicesPath   = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
)

func newProxyCrowd(t testing.TB) *proxyCrowd {
	t.Helper()
	cp, err := lab.StartControlPlane(t.Context(), tools, "--service-cluster-ip-range=10.96.0.0/12",
		"--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000")
	must(t, err)
	t.Cleanup(func() { must(t, cp.Close()) })
	return &proxyCrowd{cp: cp}
}

// grow makes Services of two endpoints until there are so many.
func (c *proxyCrowd) grow(t testing.TB, to int) {
	t.Helper()
	c.fill(t, to, func(int) []string { return []string{endpointA, endpointB} })
}

// fill makes Services until there are so many; addrs are the endpoints of the one with a number.
func (c *proxyCrowd) fill(t testing.TB, to int, addrs func(i int) []string) {
	t.Helper()
	from := len(c.vips)
	c.vips = append(c.vips, make([]netip.Addr, max(to-from, 0))...)
	var all sync.WaitGroup
	next, errs := make(chan int), make(chan error, 16)
	for range cap(errs) {
		all.Go(func() {
			for i := range next {
				name := fmt.Sprintf("load-%06d", i)
				var err error
				if c.vips[i], err = c.createService(t.Context(), name); err == nil {
					err = c.request(t.Context(), http.MethodPost, slicesPath, sliceOf(name, addrs(i)...))
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	var err error
	for i := from; i < to && err == nil; i++ {
		select {
		case next <- i:
		case err = <-errs:
		}
	}
	close(next)
	all.Wait()
	must(t, err)
}

// sample are fifty of the Services, spread over all of them, or all if there are fewer.
func (c *proxyCrowd) sample() []netip.Addr {
	var out []netip.Addr
	const n = 50
	for i := range n {
		out = append(out, c.vips[i*(len(c.vips)-1)/(n-1)])
	}
	return slices.Compact(out)
}

func (c *proxyCrowd) request(ctx context.Context, method, path string, object any) error {
	_, err := c.do(ctx, method, path, object)
	return err
}

func (c *proxyCrowd) do(ctx context.Context, method, path string, object any) ([]byte, error) {
	if object == nil {
		return c.cp.Do(ctx, method, path, "", nil)
	}
	body, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	return c.cp.Do(ctx, method, path, "application/json", body)
}

type object map[string]any

// createService makes a Service and is its cluster IP.
func (c *proxyCrowd) createService(ctx context.Context, name string) (netip.Addr, error) {
	answer, err := c.do(ctx, http.MethodPost, servicesPath, object{
		"apiVersion": "v1", "kind": "Service", "metadata": object{"name": name},
		"spec": object{"ports": []object{{"name": "p", "port": 80, "targetPort": endpointPort}}},
	})
	if err != nil {
		return netip.Addr{}, err
	}
	var s struct {
		Spec struct{ ClusterIP netip.Addr }
	}
	err = json.Unmarshal(answer, &s)
	return s.Spec.ClusterIP, err
}

func sliceOf(service string, addrs ...string) object {
	var endpoints []object
	for _, a := range addrs {
		endpoints = append(endpoints, object{"addresses": []string{a}, "conditions": object{"ready": true}})
	}
	return object{
		"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
		"metadata":    object{"name": service, "labels": object{"kubernetes.io/service-name": service}},
		"addressType": "IPv4", "ports": []object{{"name": "p", "port": endpointPort, "protocol": "TCP"}}, "endpoints": endpoints,
	}
}
