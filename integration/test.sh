#!/usr/bin/env bash
# test.sh NAME PACKAGES GO-TEST-ARGUMENTS... runs tests with gotestsum and shows what a person wants to see of it: a line for
# each finished test with its time, what tests say, and at the end the count. All output is in bin/NAME.log.
#
# A test that fails is run a second time, by itself, and is called flaky if it then passes: on a busy machine a test of real
# processes can meet a time limit of the machine's making. More than ten failures are no accident, and end it at once.
# What was flaky is told at the end and kept in bin/NAME.flaky; so are tests of which nothing ran.
set -uo pipefail
cd "$(dirname "$0")/.."
name=$1 packages=$2
shift 2
mkdir -p bin
read -r _ runner < <(integration/tools/build.sh gotestsum) || exit 1
rm -f "bin/$name.flaky"
"$runner" --format standard-verbose --hide-summary skipped,output --packages "$packages" --rerun-fails=1 --rerun-fails-max-failures=10 \
  --rerun-fails-run-root-test --rerun-fails-abort-on-data-race --rerun-fails-report "bin/$name.flaky" -- "$@" 2>&1 |
  tee "bin/$name.log" | grep --line-buffered -Ev '^=== (RUN|PAUSE|CONT|NAME)'
status=${PIPESTATUS[0]}
skipped=$(grep -oE '^--- SKIP: [A-Za-z0-9_]+' "bin/$name.log" | sort -u | cut -d' ' -f3 | paste -sd' ')
[ -z "$skipped" ] || echo "$name: skipped as a whole, bin/$name.log says why: $skipped"
if [ -s "bin/$name.flaky" ]; then
  echo "$name: failed at first, and were run again:"
  sed 's/^/  /' "bin/$name.flaky"
fi
exit "$status"
