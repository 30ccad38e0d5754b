//go:build tools

// Package sampleapiserver pins the aggregated API server that Kubernetes' conformance tests run as a pod, at the version of its image.
package sampleapiserver

import (
	_ "k8s.io/sample-apiserver"
)
