#!/usr/bin/env bash
# Makes the root file system of a Debian 12 node with systemd, from the mirror
# that this machine has configured, and links it as OUTDIR/root.tar. It is kept
# under the hash of this directory's files, so that a second run asks no network.
set -euo pipefail

readonly SUITE=bookworm
# How long a system outlives its last use.
readonly KEEP_DAYS=7

[ $# -eq 1 ] || { echo "usage: build.sh OUTDIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR
. "$here/../namespaces.sh"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/install
key=$(cat "$here/packages.txt" "$here/build.sh" | sha256sum | cut -c1-24)

build() {
    packages=$(grep -vE '^(#|$)' "$here/packages.txt" | paste -sd,)
    debian_sources "$SUITE" | mmdebstrap --mode=root --variant=minbase --format=tar --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        "$SUITE" "$work/root.tar" - > "$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; return 1; }
}

mkdir -p "$cache" "$1"
exec 9> "$cache/lock"
flock 9
if [ ! -s "$cache/$key/root.tar" ]; then
    begun=$SECONDS
    work=$(mktemp -d "$cache/new.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    echo "node with systemd: downloading Debian packages"
    build
    find "$cache" -mindepth 1 -maxdepth 1 -type d ! -path "$work" -mtime "+$KEEP_DAYS" -exec rm -rf {} +
    mkdir -p "$cache/$key"
    mv "$work/root.tar" "$cache/$key/root.tar"
    echo "node with systemd: built in $((SECONDS - begun)) s"
fi
touch "$cache/$key"
ln -sf "$cache/$key/root.tar" "$1/root.tar"
