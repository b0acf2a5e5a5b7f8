#!/usr/bin/env bash
# Builds the Go tools that go.mod pins and links them into OUTDIR. A build is
# kept under the hash of go.mod and go.sum.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: build.sh OUTDIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
key=$(cat "$here/go.mod" "$here/go.sum" "$here/build.sh" | sha256sum | cut -c1-24)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/tools/$key
mkdir -p "$1"

if [ ! -x "$cache/crictl" ]; then
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    version=$(go -C "$here" list -mod=readonly -m -f '{{.Version}}' sigs.k8s.io/cri-tools)
    echo "building crictl $version"
    go -C "$here" build -mod=readonly -trimpath -o "$fresh/crictl" \
        -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$version" \
        sigs.k8s.io/cri-tools/cmd/crictl
    mkdir -p "$cache"
    mv "$fresh/crictl" "$cache/crictl.new"
    mv "$cache/crictl.new" "$cache/crictl"
fi
ln -sf "$cache/crictl" "$1/crictl"
