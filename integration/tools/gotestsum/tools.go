//go:build tools

// Package gotestsum pins the test runner of `make test`.
package gotestsum

import (
	_ "gotest.tools/gotestsum"
)
