package cluster

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// startRegistry starts the registry, with a copy of the lab's test images if these are asked for. Anybody on the bridge may push.
func (c *Cluster) startRegistry(ctx context.Context, tools Tools) error {
	data := c.path("registry")
	if c.images {
		seed, err := lab.TestImages(ctx, tools.Registry, tools.Busybox, c.logf)
		if err != nil {
			return fmt.Errorf("test images: %w", err)
		}
		if err := os.CopyFS(data, os.DirFS(seed)); err != nil {
			return fmt.Errorf("registry: %w", err)
		}
	} else if err := os.MkdirAll(data, 0o755); err != nil {
		return err
	}
	config := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage:\n  filesystem: {rootdirectory: %s}\n  delete: {enabled: true}\nhttp: {addr: \"%s\"}\n", data, c.Registry())
	if err := os.WriteFile(c.path("registry.yml"), []byte(config), 0o644); err != nil {
		return err
	}
	if err := c.StartRegistry(ctx); err != nil {
		return err
	}
	c.logf("registry is ready: %s", c.Registry())
	return nil
}

// StartRegistry starts the registry with what it has, and waits until it answers.
func (c *Cluster) StartRegistry(ctx context.Context) error {
	p, err := c.startHere("registry", "serve", c.path("registry.yml"))
	if err != nil {
		return err
	}
	return p.ready(ctx, time.Minute, healthy("http://"+c.Registry()+"/v2/", nil))
}

// Builder pushes images to the cluster's registry.
func (c *Cluster) Builder() (*testimages.Builder, error) {
	work, err := os.MkdirTemp(c.Dir, "images-")
	if err != nil {
		return nil, err
	}
	return &testimages.Builder{Registry: c.Registry(), Busybox: c.program("busybox"), Work: work}, nil
}

// hostsToml writes what leads a node's pulls to the registry: what pods here can pull is what was pushed to it, by the paths that it has
// at these hosts.
func (n *Node) hostsToml() error {
	for _, host := range append([]string{n.c.Registry()}, lab.Mirrored...) {
		if err := lab.Mirror(n.path("certs.d"), host, n.c.Registry()); err != nil {
			return err
		}
	}
	return nil
}
