// Command app is a small web application: it serves a page, and writes a line for each request to standard output and to
// an access log that other containers of its pod read. The page names the host, and NODE and EDITION of the environment.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"html/template"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Ahoy</title>
<style>
body { margin: 0; min-height: 100vh; display: flex; align-items: center; justify-content: center; background: #0b2a3c; color: #0b2a3c; font-family: "DejaVu Sans", sans-serif }
main { background: #fff; border-top: 8px solid #f2a33a; border-radius: 8px; padding: 2em 3em }
h1 { margin: 0 0 1em; font-size: 1.5em }
dl { display: grid; grid-template-columns: auto 1fr; gap: .4em 2em; margin: 0 }
dt { color: #6b7f8a }
dd { margin: 0 }
</style>
</head>
<body>
<main>
<h1>Ahoy from {{.Host}}</h1>
<dl>
{{with .Node}}<dt>Node</dt><dd>{{.}}</dd>
{{end}}{{with .Edition}}<dt>Edition</dt><dd>{{.}}</dd>
{{end}}<dt>Requests</dt><dd>{{.Count}} since {{.Since.Format "15:04:05"}}</dd>
</dl>
</main>
</body>
</html>
`))

func main() {
	listen := flag.String("listen", ":8080", "`ADDRESS` to serve on")
	access := flag.String("access-log", "", "`FILE` for a line per request, beside standard output")
	flag.Parse()
	if err := serve(*listen, *access); err != nil {
		log.Fatal(err)
	}
}

func serve(listen, access string) error {
	var out io.Writer = os.Stdout
	if access != "" {
		// A restarted container goes on in the same file.
		f, err := os.OpenFile(access, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		out = io.MultiWriter(os.Stdout, f)
	}
	lines := log.New(out, "", log.LstdFlags|log.LUTC)
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	since := time.Now()
	var served atomic.Int64

	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		count := served.Add(1)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		err := page.Execute(w, struct {
			Host, Node, Edition string
			Count               int64
			Since               time.Time
		}{host, os.Getenv("NODE"), os.Getenv("EDITION"), count, since})
		lines.Printf("request=%d client=%s path=%s error=%v", count, r.RemoteAddr, r.URL.Path, err)
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintln(w, "ok") // a client that is gone wants no answer
	})
	// The exporter turns these into metrics.
	mux.HandleFunc("GET /stats", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, "requests %d\nuptime_seconds %.0f\n", served.Load(), time.Since(since).Seconds())
	})

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	server := &http.Server{Addr: listen, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		<-ctx.Done() // requests under way are answered before the end
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(ctx)
	}()
	lines.Printf("listening on %s", listen)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	lines.Printf("ends after %d requests", served.Load())
	return nil
}
