#!/usr/bin/env bash
# Builds the CoreDNS that go.mod pins, with the plugins that it comes with, and
# links it into OUTDIR. A build is kept under the hash of go.mod and go.sum. Its
# modules are its own: with Kubernetes' they would agree on other versions.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: build.sh OUTDIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
key=$(cat "$here/go.mod" "$here/go.sum" "$here/build.sh" | sha256sum | cut -c1-24)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/coredns/$key
mkdir -p "$1"

if [ ! -x "$cache/coredns" ]; then
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    echo "building CoreDNS $(go -C "$here" list -mod=readonly -m -f '{{.Version}}' github.com/coredns/coredns)"
    CGO_ENABLED=0 go -C "$here" build -mod=readonly -trimpath -ldflags "-s -w" -o "$fresh/coredns" github.com/coredns/coredns
    mkdir -p "$cache"
    mv "$fresh/coredns" "$cache/coredns.new"
    mv "$cache/coredns.new" "$cache/coredns"
fi
ln -sf "$cache/coredns" "$1/coredns"
