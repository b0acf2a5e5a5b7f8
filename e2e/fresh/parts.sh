#!/usr/bin/env bash
# parts.sh PART...: what a user of the fresh machine types, in the clone, and how
# long each took.
set -euo pipefail

cd "$HOME/drupe"
printf -- '-- of the machine below: Linux %s, %s; no service manager\n' "$(uname -r)" \
    "$([ -e /dev/kvm ] && echo /dev/kvm || echo "no /dev/kvm")"
took=()
code=0
for part in "$@"; do
    begun=$SECONDS
    deploy/timed.sh "make $part" make "$part" || code=$?
    took+=("make $part: $((SECONDS - begun)) s")
    [ "$code" -eq 0 ] || break
done
printf -- '-- %s\n' "${took[@]}"
exit "$code"
