package cluster

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"

	"github.com/berth-run/berth/integration/lab"
)

// pushAddon pushes an image of one static program, which it is named after.
func (c *Cluster) pushAddon(ctx context.Context, repo, tag, program string) error {
	b, err := c.Builder()
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.Work) }()
	return pushProgram(ctx, b, repo, tag, program, path.Base(repo))
}

// PushExample pushes the image of examples/web.
func (c *Cluster) PushExample(ctx context.Context) error {
	root, err := lab.RepoRoot()
	if err != nil {
		return err
	}
	b, err := c.Builder()
	if err != nil {
		return err
	}
	return errors.Join(b.PushApp(ctx, filepath.Join(root, "examples/web")), os.RemoveAll(b.Work))
}

// startAddon pushes the image of an add-on, applies its manifest, and waits until its pods are ready.
func (c *Cluster) startAddon(ctx context.Context, repo, program, manifest, workload string) error {
	if err := c.pushAddon(ctx, repo, "cluster", program); err != nil {
		return err
	}
	if err := c.Apply(ctx, manifest); err != nil {
		return err
	}
	return c.rolledOut(ctx, workload)
}

// rolledOut waits until the pods of an add-on are ready.
func (c *Cluster) rolledOut(ctx context.Context, workload string) error {
	_, err := c.Kubectl(ctx, "--namespace", "kube-system", "rollout", "status", workload, "--timeout", "4m")
	return err
}
