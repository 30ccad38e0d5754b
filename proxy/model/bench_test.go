package model

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// crowd makes n Services of one port with so many endpoints each, a tenth of them on this node, in a quarter of the Services
// with zone hints; every tenth has a node port. It hands out one object at a time and keeps none.
func crowd(m *Model, n, endpoints int) {
	for i := range n {
		m.SetService(crowdService(i))
		m.SetSlice(crowdSlice(i, endpoints))
	}
}

func crowdService(i int) *corev1.Service {
	s := service(fmt.Sprintf("service-%d", i), fmt.Sprintf("172.30.%d.%d", i/250, 1+i%250))
	s.CreationTimestamp = metav1.NewTime(time.Unix(int64(i), 0))
	if i%10 == 0 {
		withNodePort(s)
		s.Spec.Ports[0].NodePort = int32(30000 + i/10)
	}
	return s
}

func crowdSlice(i, endpoints int) *discoveryv1.EndpointSlice {
	s := slice1(fmt.Sprintf("service-%d", i))
	for j := range endpoints {
		e, _ := endpoint(fmt.Sprintf("10.%d.%d.%d:8080 far", 1+j, i/250, 1+i%250))
		if (i+j)%10 == 0 {
			e.NodeName = ptr("node1")
		}
		if i%4 == 0 {
			e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: fmt.Sprintf("zone%d", j%3)}}}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

func benchmarkSizes(b *testing.B, bench func(b *testing.B, m *Model, n int)) {
	for _, n := range []int{1000, 10000} {
		b.Run(fmt.Sprintf("%d", n), func(b *testing.B) {
			m := modelOf(b)
			crowd(m, n, 5)
			m.Commit()
			b.ReportAllocs()
			b.ResetTimer()
			bench(b, m, n)
		})
	}
}

// An endpoint of one Service comes and goes.
func BenchmarkChangeSlice(b *testing.B) {
	benchmarkSizes(b, func(b *testing.B, m *Model, n int) {
		states := [2]*discoveryv1.EndpointSlice{crowdSlice(n/2, 4), crowdSlice(n/2, 5)}
		for i := range b.N {
			m.SetSlice(states[i%2])
			if d := m.Commit(); len(d.Services) != 1 {
				b.Fatal(d)
			}
		}
	})
}

// A Service with five endpoints comes and goes.
func BenchmarkChangeService(b *testing.B) {
	benchmarkSizes(b, func(b *testing.B, m *Model, n int) {
		s := crowdService(n + 5)
		m.SetSlice(crowdSlice(n+5, 5))
		m.Commit()
		for i := range b.N {
			if i%2 == 0 {
				m.SetService(s)
			} else {
				m.DeleteService(named(s))
			}
			if d := m.Commit(); len(d.Services) != 1 {
				b.Fatal(d)
			}
		}
	})
}

// An informer tells the same once more.
func BenchmarkResync(b *testing.B) {
	benchmarkSizes(b, func(b *testing.B, m *Model, n int) {
		s := crowdSlice(n/2, 5)
		for range b.N {
			m.SetSlice(s)
		}
		if d := m.Commit(); !d.Empty() {
			b.Fatal(d)
		}
	})
}

// The node's zone changes: all Services are computed anew.
func BenchmarkChangeZone(b *testing.B) {
	benchmarkSizes(b, func(b *testing.B, m *Model, n int) {
		for i := range b.N {
			node := testNode()
			node.Labels[corev1.LabelTopologyZone] = fmt.Sprintf("zone%d", i%2)
			m.SetNode(node)
			if d := m.Commit(); len(d.Services) != n/4 {
				b.Fatal(len(d.Services))
			}
		}
	})
}

// heap is the bytes that are live.
func heap() int64 {
	var s runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}

// Memory is what keeps a proxy small: 10,000 Services with 50,000 endpoints.
func TestMemoryOfServices(t *testing.T) {
	const n, endpoints = 10000, 5
	m := modelOf(t)
	before := heap()
	crowd(m, n, endpoints)
	m.Commit()
	size := heap() - before
	c := m.State().Counts()
	if c.Services != n || c.Frontends != n+n/10 {
		t.Fatalf("counts %+v", c)
	}
	t.Logf("%d Services with %d endpoints: %.1f MiB, %d bytes a Service", n, n*endpoints, float64(size)/(1<<20), size/n)
	if per := size / n; per > 2500 {
		t.Errorf("%d bytes a Service", per)
	}
	// All goes with the objects.
	for i := range n {
		m.DeleteService(named(crowdService(i)))
		m.DeleteSlice(named(crowdSlice(i, 0)))
	}
	m.Commit()
	if left := heap() - before; left > size/3 {
		t.Errorf("%d bytes are left of %d", left, size)
	}
	if c := m.State().Counts(); c != (Counts{}) || len(m.state.entries)+len(m.slices)+len(m.state.claims.held)+len(m.state.hairpins) > 0 {
		t.Errorf("left: %+v", c)
	}
	runtime.KeepAlive(m)
}

// kubernetes#128928: a proxy that kept something of each slice that ever was grew for days, to 8 GB. 50,000 slices with names of their own
// come and go, of Services that stay, that are there later, and that go first: what is kept is what there is.
func TestK8s128928_SlicesThatHaveGoneAreForgotten(t *testing.T) {
	const slices, services = 50000, 500
	m := modelOf(t)
	turn := func(n int) {
		sliceOf := func(i int) *discoveryv1.EndpointSlice {
			s := crowdSlice(i, 2)
			s.Name = fmt.Sprintf("slice-%d-%d", n, i)
			return s
		}
		for i := range services {
			m.SetSlice(sliceOf(i))
		}
		m.Commit()
		for i := range services {
			m.SetService(crowdService(i))
		}
		m.Commit()
		if c := m.State().Counts(); c.Services != services || c.Endpoints < services {
			t.Fatalf("%+v", c)
		}
		for i := n % 3; i < services; i += 3 {
			m.DeleteService(named(crowdService(i)))
		}
		m.Commit()
		for i := range services {
			m.DeleteSlice(named(sliceOf(i)))
		}
		m.Commit()
	}
	for n := range 6 {
		turn(n) // tables are as large as they get
	}
	before := heap()
	for n := range slices / services {
		turn(6 + n)
	}
	if left := heap() - before; left > 256<<10 { // five bytes a slice
		t.Errorf("%d bytes are left of %d slices", left, slices)
	}
	if c := m.State().Counts(); c.Endpoints != 0 || len(m.slices) != 0 {
		t.Errorf("left: %+v, %d slices", c, len(m.slices))
	}
	runtime.KeepAlive(m)
}
