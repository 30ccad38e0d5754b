//go:build tools

// Package controllers pins kube-scheduler and kube-controller-manager, which only a whole cluster needs: build.sh builds them from
// this module. It is apart from that of the other programs of Kubernetes since a change of its go.sum has all that is built from it
// built anew.
package controllers

import (
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
	_ "k8s.io/kubernetes/cmd/kube-scheduler"
)
