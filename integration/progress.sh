#!/usr/bin/env bash
# Reads `go test -v` and shows what a person wants to see: a line for each finished test with its time, all output of those
# that fail, and at the end the count. The full output stays in bin/test-integration.log.
set -uo pipefail
log=bin/test-integration.log
awk -v log="$log" '
  BEGIN { printf "" > log }
  { print >> log }
  /^=== (RUN|PAUSE|CONT|NAME)/ { next }
  /^ *--- (PASS|SKIP|FAIL)/ { count[$2]++; print; fflush(); next }
  /^(ok|FAIL|PASS|panic:)/ { print; fflush(); next }
  { print; fflush() }
  END {
    printf "test-integration: %d passed, %d failed, %d skipped; all output: %s\n", count["PASS:"], count["FAIL:"], count["SKIP:"], log
  }
'
