//go:build tools

// Package kubernetes pins the Kubernetes programs that the integration tests run: build.sh builds them from this module.
package kubernetes

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kubectl"
	_ "k8s.io/kubernetes/cmd/kubelet"
	_ "k8s.io/kubernetes/pkg/proxy/nftables" // with its tests: kubeproxy.sh
)
