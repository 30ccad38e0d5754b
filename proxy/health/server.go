package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"k8s.io/component-base/metrics/prometheus/slis"
)

// retryListen is how long after a failure an address is tried again, as in kube-proxy.
const retryListen = 5 * time.Second

// newServer has bounds: whoever reaches the node reaches it.
func newServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), // what clients do wrong is theirs
	}
}

// Serve serves at an address until the context ends. An address that is taken is tried again, or is an error if hard.
func Serve(ctx context.Context, what, address string, h http.Handler, hard bool, log *slog.Logger) error {
	said := false
	for {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err == nil {
			return serve(ctx, l, h)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case hard:
			return fmt.Errorf("%s at %s: %w", what, address, err)
		case !said:
			log.Warn("an address cannot be listened at; it is tried again", "for", what, "address", address, "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryListen):
		}
	}
}

func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	server := newServer(h)
	server.WriteTimeout = 2 * time.Minute // a profile takes its time
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Pages are what is served beside the metrics.
type Pages struct {
	Metrics *Metrics
	// Mode is what /proxyMode says.
	Mode string
	// Config is what /configz shows, below kubeproxy.config.k8s.io.
	Config any
	// Profiling serves /debug/pprof.
	Profiling bool
}

// Handler serves /metrics, /metrics/slis, /healthz (always ok, as kube-proxy has it at this address), /proxyMode, /configz.
func (p *Pages) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", p.Metrics.Handler())
	slis.SLIMetricsWithReset{}.Install(mux)
	text := func(path, body string, also func()) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			also()
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			_, _ = w.Write([]byte(body))
		})
	}
	text("/healthz", "ok", func() { observe("ping", "healthz", true) })
	text("/proxyMode", p.Mode, func() {})
	mux.HandleFunc("/configz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		_ = json.NewEncoder(w).Encode(map[string]any{"kubeproxy.config.k8s.io": p.Config})
	})
	if p.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// observe counts a health check for /metrics/slis (KEP-3466). Its metrics are the process's, like all of component-base.
func observe(name, kind string, good bool) {
	status := slis.Success
	if !good {
		status = slis.Error
	}
	_ = slis.ObserveHealthcheck(context.Background(), name, kind, status)
}
