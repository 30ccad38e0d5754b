//go:build tools

// Package kubeproxy pins the kube-proxy that berth proxy is measured beside: build.sh builds it from this module, which is not that of
// the other Kubernetes programs, so that they need not be built anew when what it needs changes.
package kubeproxy

import (
	_ "k8s.io/kubernetes/cmd/kube-proxy"
)
