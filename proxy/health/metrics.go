package health

import (
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/berth-run/berth/internal/version"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Metrics are kube-proxy's, by name, labels and buckets (pkg/proxy/metrics/metrics.go), and some of berth's own.
type Metrics struct {
	registry *prometheus.Registry
	families []string

	sync, full, partial, programming         *prometheus.HistogramVec
	last, queued, noLocal                    *prometheus.GaugeVec
	failures                                 *prometheus.CounterVec // of mode nftables
	healthz, livez                           *prometheus.CounterVec
	endpointsPending, servicesPending        prometheus.Gauge
	endpointsTotal, servicesTotal            prometheus.Counter
	problems                                 *prometheus.CounterVec
	conntrack                                *prometheus.HistogramVec
	conntrackRemoved, resets                 *prometheus.CounterVec
	elements, transactions                   prometheus.Counter
	services, ports, frontends, endpointsNow prometheus.Gauge

	loopbackListeners                  *prometheus.GaugeVec
	loopbackFailures, loopbackRefusals *prometheus.CounterVec
}

// Prefixes of kube-proxy's names, and of berth's.
const (
	prefix = "kubeproxy_"
	own    = "berth_proxy_"
)

// NewMetrics makes metrics of the families that are served.
func NewMetrics(families ...string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), families: families}
	family := []string{"ip_family"}
	sync := prometheus.ExponentialBuckets(0.001, 2, 15)
	m.sync = m.histogram("sync_proxy_rules_duration_seconds", "How long it took to program what had changed", sync, family)
	m.full = m.histogram("sync_full_proxy_rules_duration_seconds", "The same, where all was compared with the kernel", sync, family)
	m.partial = m.histogram("sync_partial_proxy_rules_duration_seconds", "The same, where only what had changed was programmed", sync, family)
	programming := append([]float64{0.25, 0.5}, prometheus.LinearBuckets(1, 1, 59)...)
	programming = append(append(programming, prometheus.LinearBuckets(60, 5, 12)...), prometheus.LinearBuckets(120, 30, 7)...)
	m.programming = m.histogram("network_programming_duration_seconds", "From a change of a Service's pods until it was programmed", programming, family)
	m.last = m.gauges("sync_proxy_rules_last_timestamp_seconds", "When rules were last programmed", family)
	m.queued = m.gauges("sync_proxy_rules_last_queued_timestamp_seconds", "When the last change came in", family)
	m.noLocal = m.gauges("sync_proxy_rules_no_local_endpoints_total", "Ports with a traffic policy Local and endpoints on other nodes only", []string{"traffic_policy", "ip_family"})
	m.loopbackListeners = m.gauges("nftables_localhost_nodeport_listeners", "Node ports that are listened at on loopback", family)
	m.loopbackFailures = m.counters("nftables_localhost_nodeport_listener_creation_failures_total", "Node ports that could not be listened at on loopback", family)
	m.conntrack = m.histogram("conntrack_reconciler_sync_duration_seconds", "How long the kernel's table of connections was looked through for stale ones", sync, family)
	m.conntrackRemoved = m.counters("conntrack_reconciler_deleted_entries_total", "Stale connections that were removed from it", family)
	m.healthz = m.counters("proxy_healthz_total", "Answers of /healthz", []string{"code"})
	m.livez = m.counters("proxy_livez_total", "Answers of /livez", []string{"code"})
	m.endpointsPending = m.gauge(prefix+"sync_proxy_rules_endpoint_changes_pending", "Changes of slices that wait to be programmed")
	m.servicesPending = m.gauge(prefix+"sync_proxy_rules_service_changes_pending", "Changes of Services that wait to be programmed")
	m.endpointsTotal = m.counter(prefix+"sync_proxy_rules_endpoint_changes_total", "Changes of slices")
	m.servicesTotal = m.counter(prefix+"sync_proxy_rules_service_changes_total", "Changes of Services")

	m.problems = prometheus.NewCounterVec(prometheus.CounterOpts{Name: own + "problems_total", Help: "Parts of objects that were left out, by kind of the object"}, []string{"kind"})
	m.registry.MustRegister(m.problems)
	m.loopbackRefusals = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: own + "loopback_refused_total", Help: "Connections and UDP clients of node ports on loopback that were one too many, or that no endpoint answered",
	}, family)
	m.registry.MustRegister(m.loopbackRefusals)
	m.each(family, func(f string) { m.loopbackRefusals.WithLabelValues(f) })
	m.resets = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: own + "connections_reset_total", Help: "Connections of TCP that were reset since their endpoint was gone",
	}, family)
	m.registry.MustRegister(m.resets)
	m.each(family, func(f string) { m.resets.WithLabelValues(f) })
	m.elements = m.counter(own+"elements_changed_total", "Elements of sets put in, taken away or changed")
	m.transactions = m.counter(own+"transactions_total", "Transactions that the kernel has taken")
	m.services = m.gauge(own+"services", "Services that something is done for")
	m.ports = m.gauge(own+"service_ports", "Ports of Services, each in each of its families")
	m.frontends = m.gauge(own+"frontends", "Addresses and ports that are answered at")
	m.endpointsNow = m.gauge(own+"endpoints", "Endpoints, as often as ports have them")
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: own + "build_info", Help: "1, with the version"}, []string{"version"})
	build.WithLabelValues(version.Version).Set(1)
	m.registry.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *Metrics) histogram(name, help string, buckets []float64, labels []string) *prometheus.HistogramVec {
	v := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: prefix + name, Help: help, Buckets: buckets}, labels)
	m.registry.MustRegister(v)
	m.each(labels, func(f string) { v.WithLabelValues(f) })
	return v
}

func (m *Metrics) gauges(name, help string, labels []string) *prometheus.GaugeVec {
	v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: prefix + name, Help: help}, labels)
	m.registry.MustRegister(v)
	m.each(labels, func(f string) { v.WithLabelValues(f) })
	return v
}

func (m *Metrics) counters(name, help string, labels []string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, labels)
	m.registry.MustRegister(v)
	m.each(labels, func(f string) { v.WithLabelValues(f) })
	return v
}

// each has metrics of families be there from the start.
func (m *Metrics) each(labels []string, f func(family string)) {
	if len(labels) != 1 || labels[0] != "ip_family" {
		return
	}
	for _, family := range m.families {
		f(family)
	}
}

func (m *Metrics) gauge(name, help string) prometheus.Gauge {
	v := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	m.registry.MustRegister(v)
	return v
}

func (m *Metrics) counter(name, help string) prometheus.Counter {
	v := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	m.registry.MustRegister(v)
	return v
}

// NFTables adds what kube-proxy has in mode nftables alone.
func (m *Metrics) NFTables() {
	family := []string{"ip_family"}
	m.failures = m.counters("sync_proxy_rules_nftables_sync_failures_total", "How often programming has failed", family)
	m.counters("sync_proxy_rules_nftables_cleanup_failures_total", "Always 0: nothing is cleaned up apart", family)
}

// IPTables adds what kube-proxy has in mode iptables alone; it is asked for, by family, when metrics are.
func (m *Metrics) IPTables(read func() [model.Families]program.Restores) {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prefix+"sync_proxy_rules_iptables_"+name, help, append(labels, "ip_family"), nil)
	}
	m.registry.MustRegister(&restores{
		read: read, families: m.families,
		failures: desc("restore_failures_total", "How often programming has failed"),
		partial:  desc("partial_restore_failures_total", "How often of these it was a change alone; all is compared then"),
		rules:    desc("total", "Rules in the proxy's chains", "table"),
		last:     desc("last", "Rules that were written last", "table"),
	})
}

// restores makes metrics of them.
type restores struct {
	read                           func() [model.Families]program.Restores
	families                       []string
	failures, partial, rules, last *prometheus.Desc
}

// Describe is for prometheus.Collector.
func (c *restores) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.failures, c.partial, c.rules, c.last} {
		to <- d
	}
}

// Collect is for prometheus.Collector.
func (c *restores) Collect(to chan<- prometheus.Metric) {
	tell := func(d *prometheus.Desc, kind prometheus.ValueType, n float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, kind, n, labels...)
	}
	all := c.read()
	for _, f := range c.families {
		r := &all[familyOf(f)]
		tell(c.failures, prometheus.CounterValue, float64(r.Failures), f)
		tell(c.partial, prometheus.CounterValue, float64(r.Partial), f)
		for table, n := range r.Rules {
			tell(c.rules, prometheus.GaugeValue, float64(n), table, f)
		}
		for table, n := range r.Last {
			tell(c.last, prometheus.GaugeValue, float64(n), table, f)
		}
	}
}

func familyOf(name string) model.Family {
	if name == model.IPv6.String() {
		return model.IPv6
	}
	return model.IPv4
}

// Counters adds what the kernel has counted for Services, which is asked for when metrics are.
func (m *Metrics) Counters(read func() (map[program.Counted]program.Count, error)) {
	labels := []string{"namespace", "service", "port", "protocol", "ip_family"}
	m.registry.MustRegister(&serviceCounters{
		read: read,
		connections: prometheus.NewDesc(own+"service_connections_total",
			"New connections to a Service's port, whether they were forwarded or not, but for those of a source that may not", labels, nil),
		refused: prometheus.NewDesc(own+"service_refused_packets_total",
			"Packets to a Service's port that were rejected or dropped, and why; not there as long as there was none", append(labels, "action", "reason"), nil),
		unallocated: prometheus.NewDesc(own+"unallocated_dropped_packets_total",
			"Packets to cluster IPs that no Service has, dropped", []string{"ip_family"}, nil),
		invalid:  prometheus.NewDesc(prefix+"iptables_ct_state_invalid_dropped_packets_total", "Forwarded packets that conntrack takes for none of their connection, dropped", nil, nil),
		loopback: prometheus.NewDesc(prefix+"iptables_localhost_nodeports_accepted_packets_total", "New connections to node ports at loopback addresses", nil, nil),
	})
}

// serviceCounters makes metrics of counters.
type serviceCounters struct {
	read                              func() (map[program.Counted]program.Count, error)
	connections, refused, unallocated *prometheus.Desc
	invalid, loopback                 *prometheus.Desc // kube-proxy's, in mode iptables
}

// Describe is for prometheus.Collector.
func (c *serviceCounters) Describe(to chan<- *prometheus.Desc) {
	to <- c.connections
	to <- c.refused
	to <- c.unallocated
	to <- c.invalid
	to <- c.loopback
}

// Collect is for prometheus.Collector. What cannot be read now is as it was.
func (c *serviceCounters) Collect(to chan<- prometheus.Metric) {
	all, _ := c.read()
	nodes := map[*prometheus.Desc]uint64{} // of both families, as kube-proxy has them
	for of, n := range all {
		desc, labels := c.connections, []string{of.Service.Namespace, of.Service.Name, of.Port, of.Protocol.String(), of.Family.String()}
		switch of.Cause {
		case program.Connections:
		case program.Invalid:
			nodes[c.invalid] += n.Packets
			continue
		case program.AtLoopback:
			nodes[c.loopback] += n.Packets
			continue
		case program.Unallocated:
			desc, labels = c.unallocated, []string{of.Family.String()}
		case program.NoEndpoints:
			desc, labels = c.refused, append(labels, "reject", of.Cause.String())
		default:
			desc, labels = c.refused, append(labels, "drop", of.Cause.String())
		}
		to <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n.Packets), labels...)
	}
	for desc, n := range nodes {
		to <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n))
	}
}

// Handler serves them.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// ServiceQueued and SliceQueued count a change as it comes in.
func (m *Metrics) ServiceQueued() { m.servicesTotal.Inc(); m.servicesPending.Inc(); m.stamp(m.queued) }

// SliceQueued is ServiceQueued for slices.
func (m *Metrics) SliceQueued() { m.endpointsTotal.Inc(); m.endpointsPending.Inc(); m.stamp(m.queued) }

func (m *Metrics) stamp(v *prometheus.GaugeVec) {
	for _, f := range m.families {
		v.WithLabelValues(f).SetToCurrentTime()
	}
}

// Taken notes that all that has come in is being programmed.
func (m *Metrics) Taken() { m.servicesPending.Set(0); m.endpointsPending.Set(0) }

// Synced notes a change that the kernel has, or all of them if full, and the times at which what led to it happened.
func (m *Metrics) Synced(full bool, took time.Duration, triggers []time.Time, transactions, elements int) {
	now := time.Now()
	for _, f := range m.families {
		m.sync.WithLabelValues(f).Observe(took.Seconds())
		if full {
			m.full.WithLabelValues(f).Observe(took.Seconds())
		} else {
			m.partial.WithLabelValues(f).Observe(took.Seconds())
		}
		for _, t := range triggers {
			m.programming.WithLabelValues(f).Observe(max(now.Sub(t), 0).Seconds())
		}
	}
	m.stamp(m.last)
	m.transactions.Add(float64(transactions))
	m.elements.Add(float64(elements))
}

// Failed notes that programming has failed. In mode iptables who programs counts it, by family.
func (m *Metrics) Failed() {
	if m.failures == nil {
		return
	}
	for _, f := range m.families {
		m.failures.WithLabelValues(f).Inc()
	}
}

// ConntrackSwept notes that the table of connections was looked through.
func (m *Metrics) ConntrackSwept(f model.Family, took time.Duration, removed int) {
	m.conntrack.WithLabelValues(f.String()).Observe(took.Seconds())
	m.conntrackRemoved.WithLabelValues(f.String()).Add(float64(removed))
}

// ConnectionsReset notes connections that were reset.
func (m *Metrics) ConnectionsReset(f model.Family, n int) {
	m.resets.WithLabelValues(f.String()).Add(float64(n))
}

// Problem notes a part of an object that was left out.
func (m *Metrics) Problem(kind string) { m.problems.WithLabelValues(kind).Inc() }

// LoopbackListening notes how many node ports of a family are listened at on loopback.
func (m *Metrics) LoopbackListening(f model.Family, n int) {
	m.loopbackListeners.WithLabelValues(f.String()).Set(float64(n))
}

// LoopbackFailed notes a node port that cannot be listened at.
func (m *Metrics) LoopbackFailed(at netip.Addr) {
	f := model.IPv4
	if at.Is6() {
		f = model.IPv6
	}
	m.loopbackFailures.WithLabelValues(f.String()).Inc()
}

// LoopbackRefused notes a connection to a node port on loopback that led nowhere.
func (m *Metrics) LoopbackRefused(f model.Family) {
	m.loopbackRefusals.WithLabelValues(f.String()).Inc()
}

// Counts are the model's sums.
func (m *Metrics) Counts(c model.Counts) {
	m.services.Set(float64(c.Services))
	m.ports.Set(float64(c.Ports))
	m.frontends.Set(float64(c.Frontends))
	m.endpointsNow.Set(float64(c.Endpoints))
	for _, f := range m.families {
		i := familyOf(f)
		m.noLocal.WithLabelValues("internal", f).Set(float64(c.NoLocal[i].Internal))
		m.noLocal.WithLabelValues("external", f).Set(float64(c.NoLocal[i].External))
	}
}
