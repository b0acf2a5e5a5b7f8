#!/usr/bin/env bash
# Builds Kubernetes' programs and etcd, which go.mod pins, and links them into
# OUTDIR. A build is kept under the hash of go.mod and go.sum.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: build.sh OUTDIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
key=$(cat "$here/go.mod" "$here/go.sum" "$here/build.sh" | sha256sum | cut -c1-24)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/kubernetes/$key
mkdir -p "$1"

programs=(kubelet kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl)

if [ ! -x "$cache/etcd" ]; then
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    version=$(go -C "$here" list -mod=readonly -m -f '{{.Version}}' k8s.io/kubernetes)
    echo "building Kubernetes $version and etcd: takes minutes, once"
    IFS=. read -r major minor _ <<<"${version#v}"
    linked="-s -w"
    # They refuse to work with each other without a version.
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        linked+=" -X $package.gitVersion=$version -X $package.gitMajor=$major -X $package.gitMinor=$minor"
    done
    export CGO_ENABLED=0
    for program in "${programs[@]}"; do
        go -C "$here" build -mod=readonly -trimpath -ldflags "$linked" -o "$fresh/$program" "k8s.io/kubernetes/cmd/$program"
    done
    go -C "$here" build -mod=readonly -trimpath -ldflags "-s -w" -o "$fresh/etcd" go.etcd.io/etcd/server/v3
    mkdir -p "$cache"
    # The last one says that all are there.
    for program in "${programs[@]}" etcd; do
        mv "$fresh/$program" "$cache/$program.new"
        mv "$cache/$program.new" "$cache/$program"
    done
fi
for program in "${programs[@]}" etcd; do
    ln -sf "$cache/$program" "$1/$program"
done
