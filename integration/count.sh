#!/usr/bin/env bash
# count.sh LOG COMMAND... runs a `go test -v` and shows what a person wants to see of it: a line for each finished test with
# its time, what tests say, and at the end the count. All output is in LOG.
set -uo pipefail
log=$1
shift
"$@" 2>&1 | awk -v log_file="$log" '
  BEGIN { printf "" > log_file }
  { print >> log_file }
  /^=== (RUN|PAUSE|CONT|NAME)/ { next }
  /^ *--- (PASS|SKIP|FAIL)/ { count[$2]++ }
  { print; fflush() }
  END {
    printf "%d passed, %d failed, %d skipped (subtests counted); all output: %s\n", count["PASS:"], count["FAIL:"], count["SKIP:"], log_file
    if (!count["PASS:"] && !count["FAIL:"] && !count["SKIP:"]) {
      print "no test ran: is RUN right?"
      exit 1
    }
  }
'
status=("${PIPESTATUS[@]}")
exit $((status[0] ? status[0] : status[1]))
