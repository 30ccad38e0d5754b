#!/usr/bin/env bash
# progress.sh TITLE COMMAND... runs the command and shows its output as it comes. Whenever there has been none for a while
# (at first two seconds, then ten) a line tells that it still runs, and for how long.
set -uo pipefail
title=$1
shift
echo "$title ..."
began=$SECONDS
"$@" 2>&1 < /dev/null | {
  wait=2 part=''
  while :; do
    if IFS= read -r -t "$wait" line; then
      printf '%s%s\n' "$part" "$line"
      part=''
    elif [ $? -gt 128 ]; then # no more output in time; a part of a line may have come
      part+=$line wait=10
      echo "$title: $((SECONDS - began)) s ..."
    else
      [ -z "$part$line" ] || printf '%s%s\n' "$part" "$line"
      break
    fi
  done
}
status=${PIPESTATUS[0]}
[ "$status" = 0 ] && outcome='done' || outcome="failed (exit code $status)"
echo "$title: $outcome in $((SECONDS - began)) s"
exit "$status"
