//go:build tools

// Package e2e pins Kubernetes' own end-to-end tests, the program that runs them, and the image that most of them use: build.sh builds
// them from this module.
package e2e

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "k8s.io/kubernetes/test/e2e"
	_ "k8s.io/kubernetes/test/images/agnhost"
)
