#!/usr/bin/env bash
# Runs, in the machine of run.sh -c, what ask.sh sends, one command after the other, and says when it listens.
set -u
exec 3<> /dev/ttyS3
stty raw -echo <&3
echo 'console: ready'
while read -r id command <&3; do
  out=$(base64 -d <<< "$command" | bash 2>&1 | base64 -w0; exit "${PIPESTATUS[1]}")
  status=$?
  printf '%s %s %s\n' "$id" "$status" "$out" >&3
done
