// Command exporter asks the application beside it, over the pod's loopback, for its counters, and serves them as metrics
// in the text format of Prometheus.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	listen := flag.String("listen", ":9090", "`ADDRESS` to serve metrics on")
	app := flag.String("app", "http://127.0.0.1:8080/stats", "`URL` of the application's counters")
	flag.Parse()
	if err := serve(*listen, *app); err != nil {
		log.Fatal(err)
	}
}

func serve(listen, app string) error {
	client := &http.Client{Timeout: 2 * time.Second}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		// A scrape that fails is a metric too: alerts are made of it.
		text, err := scrape(r.Context(), client, app)
		up := 1
		if err != nil {
			log.Printf("scrape %s: %v", app, err)
			up = 0
		}
		_, _ = fmt.Fprintf(w, "# TYPE web_up gauge\nweb_up %d\n%s", up, text)
	})
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	server := &http.Server{Addr: listen, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		<-ctx.Done()
		_ = server.Close()
	}()
	log.Printf("serving metrics of %s on %s", app, listen)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// scrape reads the application's counters, lines of a name and a number, and writes them as metrics.
func scrape(ctx context.Context, client *http.Client, app string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, app, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return "", errors.New(resp.Status)
	}
	return metrics(resp.Body)
}

func metrics(counters io.Reader) (string, error) {
	var b strings.Builder
	lines := bufio.NewScanner(counters)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if !ok {
			return "", fmt.Errorf("counter without a value: %q", lines.Text())
		}
		kind := "gauge"
		if name == "requests" {
			name, kind = "requests_total", "counter"
		}
		fmt.Fprintf(&b, "# TYPE web_%[1]s %[2]s\nweb_%[1]s %[3]s\n", name, kind, value)
	}
	return b.String(), lines.Err()
}
