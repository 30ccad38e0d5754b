#!/usr/bin/env bash
# tests.sh PATTERN runs, in the machine of run.sh, the integration tests whose names match. bin/integration.test is them,
# compiled before: `go test -c -tags integration -o bin/integration.test ./integration`.
set -euo pipefail
cd "$(dirname "$0")/.."
export BERTH_PATIENCE=20
exec ../bin/integration.test -test.v -test.count=1 -test.timeout 2h -test.run "$1"
