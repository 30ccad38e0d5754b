//go:build tools

// Package traefik pins the ingress controller that the integration tests run: build.sh builds it from this module.
package traefik

import _ "github.com/traefik/traefik/v3/cmd/traefik"
