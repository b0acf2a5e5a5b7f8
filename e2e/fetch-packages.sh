#!/usr/bin/env bash
# Downloads the packages of image-packages.txt into the cache and links them as
# OUTDIR/NAME.deb.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: fetch-packages.sh OUTDIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/debs
mkdir -p "$cache" "$1"

while read -r package; do
    if [ ! -s "$cache/$package.deb" ]; then
        echo "downloading $package"
        fresh=$(mktemp -d "$cache/new.XXXXXX")
        trap 'rm -rf "$fresh"' EXIT
        # An image of a machine may come without package lists.
        apt-cache show "$package" > /dev/null 2>&1 || apt-get update -q > "$fresh/log" 2>&1 || true
        (cd "$fresh" && apt-get -q -o APT::Sandbox::User=root download "$package" > log 2>&1) ||
            { cat "$fresh/log" >&2; exit 1; }
        mv "$fresh"/*.deb "$cache/$package.deb"
        rm -rf "$fresh"
    fi
    ln -sf "$cache/$package.deb" "$1/$package.deb"
done < <(grep -vE '^(#|$)' "$here/image-packages.txt")
