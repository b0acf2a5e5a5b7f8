#!/usr/bin/env bash
# Links cargo-deb, which makes the Debian package, into OUTDIR. A build is kept
# under the hash of this script.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: cargo-deb.sh OUTDIR" >&2; exit 2; }
version=3.8.0
key=$(sha256sum "$0" | cut -c1-24)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/tools/$key
mkdir -p "$1"

if [ ! -x "$cache/cargo-deb" ]; then
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    echo "building cargo-deb $version"
    "${CARGO:-cargo}" install cargo-deb --locked --version "$version" --root "$fresh" --quiet
    mkdir -p "$cache"
    mv "$fresh/bin/cargo-deb" "$cache/cargo-deb.new"
    mv "$cache/cargo-deb.new" "$cache/cargo-deb"
fi
ln -sf "$cache/cargo-deb" "$1/cargo-deb"
