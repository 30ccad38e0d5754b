//go:build tools

// Package e2e pins Kubernetes' own end-to-end tests, the program that runs them, and what is in their images: build.sh builds
// them from this module.
package e2e

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "k8s.io/kubernetes/test/e2e"
	_ "k8s.io/kubernetes/test/images/agnhost"
	_ "k8s.io/kubernetes/test/images/regression-issue-74839"
)
