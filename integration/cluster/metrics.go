package cluster

import (
	"context"
	"path/filepath"
)

// StartMetrics has metrics-server run as a pod, by the manifests that it comes with, unchanged: kubelets show it certificates of the cluster's authority,
// which all pods are given. It waits until the API server hands requests on to it. The directory is what build.sh has made of the target metrics-server.
func (c *Cluster) StartMetrics(ctx context.Context, dir string) error {
	if err := c.pushAddon(ctx, "k8s-staging-metrics-server/metrics-server", "master", filepath.Join(dir, "metrics-server")); err != nil {
		return err
	}
	if _, err := c.Kubectl(ctx, "apply", "--kustomize", filepath.Join(dir, "manifests")); err != nil {
		return err
	}
	if err := c.rolledOut(ctx, "deployment/metrics-server"); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "wait", "--for=condition=Available", "apiservice/v1beta1.metrics.k8s.io", "--timeout", "1m")
	return err
}
