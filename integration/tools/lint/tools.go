//go:build tools

// Package lint pins the linter of `make lint`.
package lint

import (
	_ "github.com/golangci/golangci-lint/v2/cmd/golangci-lint"
)
