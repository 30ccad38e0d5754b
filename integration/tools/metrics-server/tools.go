//go:build tools

// Package metricsserver pins the metrics server that the integration tests run: build.sh builds it from this module.
package metricsserver

import _ "sigs.k8s.io/metrics-server/cmd/metrics-server"
