#!/usr/bin/env bash
# Builds the Go tools that go.mod pins and links them into OUTDIR. A build is
# kept under the hash of go.mod and go.sum.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: build.sh OUTDIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
key=$(cat "$here/go.mod" "$here/go.sum" "$here/build.sh" | sha256sum | cut -c1-24)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/tools/$key
mkdir -p "$1"

tools=(crictl critest ginkgo)

if [ ! -x "$cache/ginkgo" ]; then
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    version=$(go -C "$here" list -mod=readonly -m -f '{{.Version}}' sigs.k8s.io/cri-tools)
    echo "building crictl and critest $version"
    flags=(-mod=readonly -trimpath -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$version")
    go -C "$here" build "${flags[@]}" -o "$fresh/crictl" sigs.k8s.io/cri-tools/cmd/crictl
    go -C "$here" test -c "${flags[@]}" -o "$fresh/critest" sigs.k8s.io/cri-tools/cmd/critest
    # critest's -parallel executes it.
    go -C "$here" build "${flags[@]}" -o "$fresh/ginkgo" github.com/onsi/ginkgo/v2/ginkgo
    mkdir -p "$cache"
    # The last one says that all are there.
    for tool in "${tools[@]}"; do
        mv "$fresh/$tool" "$cache/$tool.new"
        mv "$cache/$tool.new" "$cache/$tool"
    done
fi
for tool in "${tools[@]}"; do
    ln -sf "$cache/$tool" "$1/$tool"
done
