//go:build tools

// Package kubeadm pins kubeadm, with which operators make clusters: build.sh builds it from this module. It is apart from those of the other
// programs of Kubernetes since a change of their go.sum has all that is built from them built anew.
package kubeadm

import _ "k8s.io/kubernetes/cmd/kubeadm"
