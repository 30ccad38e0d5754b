// Package web_test tests the example application as its pod uses it: three programs, one file, one loopback.
package web_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestCompanionsSeeRequestsOfTheApplication(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"app", "collector", "exporter"} {
		// go test notes what the test reads, and so runs it again when a program has changed.
		if _, err := os.ReadFile(filepath.Join(name, "main.go")); err != nil {
			t.Fatal(err)
		}
		build := exec.Command("go", "build", "-o", dir+"/", "./"+name)
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	access := filepath.Join(dir, "access.log")
	app, exporter := freeAddress(t), freeAddress(t)
	collected := filepath.Join(dir, "collected")
	run(t, dir, collected, "collector", "-file", access)
	run(t, dir, os.DevNull, "exporter", "-listen", exporter, "-app", "http://"+app+"/stats")
	want(t, "http://"+exporter+"/metrics", "web_up 0\n") // the application is not there yet
	run(t, dir, os.DevNull, "app", "-listen", app, "-access-log", access)
	want(t, "http://"+app+"/healthz", "ok")
	want(t, "http://"+app+"/", "<h1>Ahoy from ")
	want(t, "http://"+exporter+"/metrics", "web_up 1\n", "# TYPE web_requests_total counter\nweb_requests_total ")
	eventually(t, func() error {
		text, err := os.ReadFile(collected)
		if err == nil && !strings.Contains(string(text), "request=1 ") {
			err = fmt.Errorf("collected: %q", text)
		}
		return err
	})
}

func run(t *testing.T, dir, out, name string, args ...string) {
	t.Helper()
	f, err := os.OpenFile(out, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(dir, name), args...)
	cmd.Stdout = f
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s does not end well on SIGINT: %v", name, err)
		}
		_ = f.Close()
	})
}

func want(t *testing.T, url string, texts ...string) {
	t.Helper()
	eventually(t, func() error {
		resp, err := http.Get(url)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		for _, text := range texts {
			if err == nil && !strings.Contains(string(body), text) {
				err = fmt.Errorf("%s: %q is not in %q", url, text, body)
			}
		}
		return err
	})
}

func eventually(t *testing.T, try func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}
