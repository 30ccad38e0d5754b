#!/usr/bin/env bash
# fuzz.sh [PATTERN] runs each fuzz target whose name matches for FUZZTIME (default 1m), one after the other, and prints a
# table: how long, how many inputs, what was found. A finding is an input that Go keeps below testdata/fuzz, from where every
# go test runs it again; it makes the exit code 1. All output is in bin/fuzz.log.
set -uo pipefail
cd "$(dirname "$0")/.."
pattern=${1:-.}
mkdir -p bin
: > bin/fuzz.log
status=0 total=0
row='%-26s %-32s %8s %12s  %s\n'
# shellcheck disable=SC2059 # the format is ours
printf "$row" package target seconds inputs findings
while IFS=: read -r file func; do
  package=./${file%/*} target=${func#func }
  [[ $target =~ $pattern ]] || continue
  began=$SECONDS
  if out=$(CGO_ENABLED=1 "${GO:-go}" test -tags seccomp -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-1m}" -fuzzminimizetime 5s "$package" 2>&1); then
    found=none
  elif [[ $out == *'context deadline exceeded'* && $out != *testdata/fuzz/* ]]; then
    found='none, it ended late' # Go's own: on a busy machine its worker is not back when the time is over
  else
    status=1
    found=$(grep -oE 'testdata/fuzz/[A-Za-z0-9_]+/[0-9a-f]+' <<< "$out" | sort -u | tr '\n' ' ')
    found=${found:-failed, see bin/fuzz.log}
  fi
  printf '=== %s %s\n%s\n' "$package" "$target" "$out" >> bin/fuzz.log
  inputs=$(sed -nE 's/.*execs: ([0-9]+) .*/\1/p' <<< "$out" | tail -n 1)
  total=$((total + ${inputs:-0}))
  # shellcheck disable=SC2059
  printf "$row" "${file%/*}" "$target" $((SECONDS - began)) "${inputs:-0}" "$found"
done < <(git grep -oE '^func Fuzz[A-Za-z0-9_]+' -- '*_test.go')
echo "fuzz: $total inputs in $SECONDS s, $([ $status = 0 ] && echo 'nothing found' || echo 'there are findings')"
exit $status
