#!/usr/bin/env bash
# Takes over the threads of a pod's monitor, and its file server, on kvm, in the
# emulated node: what `vmm/tests/boot/takeover.rs` does on uml as well.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
binary=$("${CARGO:-cargo}" test --release --workspace --test boot --no-run --message-format json-render-diagnostics |
    sed -nE '/"kind":\["test"\]/s/.*"executable":"([^"]+)".*/\1/p')
[ -x "$binary" ] || { echo "cargo names no program of the boot tests" >&2; exit 1; }
work=$(mktemp -d "${TMPDIR:-/tmp}/drupe-jail.XXXXXX")
trap 'rm -rf "$work"' EXIT
cc -static -O1 -o "$work/vsock" "$here/../../vmm/tests/boot/vsock.c"
"$here/run.sh" -t "${NODE_TEST_LIMIT:-400}" -c 1 -a "$binary=boot" -a "$work/vsock" -- "
    export DRUPE_TEST_MACHINE=kvm DRUPE_TEST_KERNEL=/drupe/out/guest/kernel-kvm
    export DRUPE_TEST_VMM=/drupe/out/bin/drupe-vmm DRUPE_TEST_VSOCK_TOOL=/drupe/vsock
    exec /drupe/boot --test-threads=1 --nocapture ${*:-takeover}"
