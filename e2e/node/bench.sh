#!/usr/bin/env bash
# Runs the benchmark of the kvm machine beside QEMU's microvm in the emulated
# node; arguments name its parts (boot, disk, net), all of them without.
set -euo pipefail

# What it may take.
readonly SECONDS_IN_ALL=${BENCH_SECONDS:-1500}

here=$(cd "$(dirname "$0")" && pwd)
benches=$here/../../vmm/benches/kvm
binary=$("${CARGO:-cargo}" build --release --workspace --bench kvm --message-format json-render-diagnostics |
    sed -nE '/"kind":\["bench"\]/s/.*"executable":"([^"]+)".*/\1/p')
[ -x "$binary" ] || { echo "cargo names no program of the benchmark" >&2; exit 1; }
work=$(mktemp -d "${TMPDIR:-/tmp}/drupe-bench.XXXXXX")
trap 'rm -rf "$work"' EXIT
# Whoever can link Rust programs has a C compiler.
cc -static -O1 -Wall -o "$work/reader" "$benches/reader.c"
"$here/run.sh" -t "$SECONDS_IN_ALL" -a "$binary=bench" -a "$work/reader=reader" -- \
    /drupe/bench /drupe/out/guest /drupe/out/bin/drupe-vmm /drupe/reader "$@"
