package admin

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/berth-run/berth/images"
)

// metrics answers in the text format of Prometheus: what the image store knows, and the process itself.
func metrics(store *images.Store) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(imageMetrics{store}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// imageMetrics reads the store when it is asked, so that nothing is counted twice.
type imageMetrics struct{ store *images.Store }

func metric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("berth_image_"+name, help, labels, nil)
}

var (
	pullsNow       = metric("pulls_in_progress", "Pulls under way.")
	pullsNowBytes  = metric("pulls_in_progress_bytes", "Compressed bytes of the layers of pulls under way: fetched so far, and wanted in all.", "what")
	pullsTotal     = metric("pulls_total", "Pulls that have ended, by how.", "result")
	pullsLocal     = metric("pulls_local_total", "Pulls answered with the image that was here, since the registry did not answer.")
	fetchedTotal   = metric("fetched_bytes_total", "Bytes fetched from registries, those of failed tries included.")
	resumedTotal   = metric("downloads_resumed_total", "Downloads that went on where a connection broke off.")
	storeImages    = metric("store_images", "Images on this node.")
	storeBytes     = metric("store_bytes", "What the layers of all images take on disk.")
	storeInodes    = metric("store_inodes", "Inodes that the layers of all images take.")
	allImageMetric = []*prometheus.Desc{
		pullsNow, pullsNowBytes, pullsTotal, pullsLocal, fetchedTotal, resumedTotal, storeImages, storeBytes, storeInodes,
	}
)

// Describe implements prometheus.Collector.
func (m imageMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range allImageMetric {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m imageMetrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	pulls := m.store.Pulls()
	var fetched, wanted int64
	for _, p := range pulls {
		f, w := p.Bytes()
		fetched, wanted = fetched+f, wanted+w
	}
	gauge(pullsNow, float64(len(pulls)))
	gauge(pullsNowBytes, float64(fetched), "fetched")
	gauge(pullsNowBytes, float64(wanted), "wanted")
	counts := m.store.PullCounts()
	counter(pullsTotal, counts.Pulled, "pulled")
	counter(pullsTotal, counts.Failed, "failed")
	counter(pullsLocal, counts.Local)
	counter(fetchedTotal, counts.Bytes)
	counter(resumedTotal, counts.Resumed)
	usage := m.store.Usage()
	gauge(storeImages, float64(len(m.store.Images())))
	gauge(storeBytes, float64(usage.Bytes))
	gauge(storeInodes, float64(usage.Inodes))
}
