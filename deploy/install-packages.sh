#!/usr/bin/env bash
# Installs those packages of deploy/packages.txt (and of the arguments) that
# this machine lacks. Asks nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)

missing=()
while read -r package; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done < <(grep -vE '^(#|$)' "$here/packages.txt"; [ $# -eq 0 ] || printf '%s\n' "$@")

[ ${#missing[@]} -gt 0 ] || exit 0
printf 'installing %d Debian packages: %s\n' "${#missing[@]}" "${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! {
    "${as_root[@]}" apt-get update -q &&
        # A daemon that a package brings (the registry) must not start.
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
            apt-get install -q -y --no-install-recommends "${missing[@]}"
} > "$log" 2>&1 < /dev/null; then
    tail -n 30 "$log" >&2
    exit 1
fi
