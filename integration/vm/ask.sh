#!/usr/bin/env bash
# ask.sh PIPE COMMAND [ARG...] runs a command in the machine of run.sh -c PIPE, whose command is console.sh. Output and exit status
# are the command's; what it leaves running there must have closed its output.
set -euo pipefail
pipe=$1
shift
exec 9> "$pipe.lock"
flock 9
id=$$.$RANDOM
printf '%s %s\n' "$id" "$(printf '%q ' "$@" | base64 -w0)" > "$pipe.in"
while read -r answers status out; do
  [ "$answers" = "$id" ] || continue # of one who did not wait for it
  base64 -d <<< "$out"
  exit "$status"
done < "$pipe.out"
echo "the machine at $pipe has ended" >&2
exit 125
