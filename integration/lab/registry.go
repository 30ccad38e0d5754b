package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/berth-run/berth/integration/testimages"
)

// Mirrored are the hosts whose images a registry of tests serves.
var Mirrored = []string{"registry.k8s.io", "k8s.gcr.io", "gcr.io", "docker.io", "registry.example"}

// StartRegistry starts a registry on loopback with the test images, and makes it the mirror of the hosts that tests name.
// The images are built once for a machine and served read-only from the cache.
func (n *Node) StartRegistry(ctx context.Context) error {
	data, err := n.seed(ctx)
	if err != nil {
		return fmt.Errorf("test images: %w", err)
	}
	return n.startRegistry(ctx, data, true)
}

// StartEmptyRegistry starts a registry on loopback that takes pushes; its content goes with the node.
func (n *Node) StartEmptyRegistry(ctx context.Context) error {
	return n.startRegistry(ctx, filepath.Join(n.Dir, "registry"), false)
}

// Builder pushes images to the node's registry.
func (n *Node) Builder() (*testimages.Builder, error) {
	work, err := os.MkdirTemp(n.Dir, "images-")
	if err != nil {
		return nil, err
	}
	return &testimages.Builder{Registry: n.Registry, Busybox: n.Tools.Busybox, Work: work}, nil
}

func (n *Node) startRegistry(ctx context.Context, data string, readOnly bool) error {
	p, addr, err := serveRegistry(ctx, n.Tools.Registry, data, n.Dir, readOnly)
	if err != nil {
		return err
	}
	n.processes = append(n.processes, p)
	return n.UseRegistry(addr)
}

// UseRegistry makes a registry (HOST:PORT, plain HTTP) the mirror of the hosts that tests name.
func (n *Node) UseRegistry(addr string) error {
	n.Registry = addr
	for _, host := range append([]string{addr}, Mirrored...) {
		if err := n.mirror(host); err != nil {
			return err
		}
	}
	return nil
}

// mirror writes the hosts.toml that sends pulls from host to the node's registry.
func (n *Node) mirror(host string) error { return Mirror(n.CertsD(), host, n.Registry) }

// Mirror has a registry (HOST:PORT, plain HTTP) serve what a host has, by its hosts.toml in a directory of these.
func Mirror(certsD, host, registry string) error {
	dir := filepath.Join(certsD, host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("server = \"http://%[1]s\"\n\n[host.\"http://%[1]s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", registry)
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644)
}

// serveRegistry runs the registry program on a free port with its data in one directory, its log and configuration in
// another.
func serveRegistry(ctx context.Context, program, data, dir string, readOnly bool) (*Process, string, error) {
	addr, err := freeAddress()
	if err != nil {
		return nil, "", err
	}
	config := fmt.Sprintf(`version: 0.1
log: {level: error}
storage:
  filesystem: {rootdirectory: %s}
  delete: {enabled: true}
  maintenance: {readonly: {enabled: %t}}
http: {addr: "%s"}
`, data, readOnly, addr)
	file := filepath.Join(dir, "registry.yml")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return nil, "", err
	}
	// Trace exporters of the registry are on by default and would look for a collector on this machine.
	env := []string{"OTEL_TRACES_EXPORTER=none", "OTEL_SDK_DISABLED=true"}
	p, err := start("registry", filepath.Join(dir, "registry.log"), env, program, "serve", file)
	if err != nil {
		return nil, "", err
	}
	err = p.ready(ctx, 2*time.Minute, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/v2/", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
	if err != nil {
		return nil, "", errors.Join(err, p.Kill())
	}
	return p, addr, nil
}

// freeAddress is a loopback address with a port that nobody listens on now.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String(), nil
}

// seed returns the data directory of a registry with all test images, made by the first node that asks.
func (n *Node) seed(ctx context.Context) (string, error) {
	return TestImages(ctx, n.Tools.Registry, n.Tools.Busybox, n.logf)
}

// TestImages is the data directory of a registry with all test images, made by the first who asks on this machine. It is not to be
// written to.
func TestImages(ctx context.Context, registry, busybox string, logf func(string, ...any)) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	print, err := testimages.Fingerprint()
	if err != nil {
		return "", err
	}
	final := filepath.Join(cache, "registry-"+print+"-"+filepath.Base(busybox))
	if _, err := os.Stat(final); err == nil {
		return final, nil
	}
	logf("making the test images from Debian packages (once; about 10 seconds)")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(cache, "seed-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(work) }()
	data := filepath.Join(work, "data")
	p, addr, err := serveRegistry(ctx, registry, data, work, false)
	if err != nil {
		return "", err
	}
	b := testimages.Builder{Registry: addr, Busybox: busybox, Work: work}
	if err := errors.Join(b.PushAll(ctx), p.Stop()); err != nil {
		return "", err
	}
	if err := os.Rename(data, final); err != nil && !errors.Is(err, os.ErrExist) {
		if _, stat := os.Stat(final); stat != nil { // another node was quicker, otherwise
			return "", err
		}
	}
	return final, nil
}
