#!/usr/bin/env bash
# timed.sh WHAT COMMAND...: says what starts, and how long it took.
set -uo pipefail

what=$1
shift
printf '==> %s\n' "$what"
begun=$SECONDS
"$@"
code=$?
if [ $code -eq 0 ]; then
    printf '==> %s: done in %d s\n' "$what" $((SECONDS - begun))
else
    printf '==> %s: failed after %d s\n' "$what" $((SECONDS - begun)) >&2
fi
exit $code
