#!/usr/bin/env bash
# Runs the benchmark of the kvm machine beside QEMU's microvm in the emulated
# node, anew for every round, and prints what all rounds together say;
# arguments name its parts (boot, disk, net), all of them without.
set -euo pipefail

readonly ROUNDS=5
# A round takes half a minute on two idle cores, idling two.
readonly SECONDS_A_NODE=${NODE_TEST_LIMIT:-300}

here=$(cd "$(dirname "$0")" && pwd)
benches=$here/../../vmm/benches/kvm
[ $# -gt 0 ] || set -- boot disk net
# What runs in a node of its own: at most six guests, of which each makes the
# emulator translate some 100 MiB and more of the 2 GiB that run.sh says why a
# node should not go beyond.
nodes=()
for part in "$@"; do
    case $part in
        boot) often=(boot) once=(idle-drupe idle-qemu) ;;
        disk) often=(disk) once=() ;;
        net) often=(net-host net-pods) once=() ;;
        *) echo "no part $part: boot, disk or net" >&2; exit 2 ;;
    esac
    for ((round = 0; round < ROUNDS; round++)); do
        for name in "${often[@]}"; do nodes+=("$name $round"); done
    done
    for name in "${once[@]}"; do nodes+=("$name 0"); done
done

binary=$("${CARGO:-cargo}" build --release --workspace --bench kvm --message-format json-render-diagnostics |
    sed -nE '/"kind":\["bench"\]/s/.*"executable":"([^"]+)".*/\1/p')
[ -x "$binary" ] || { echo "cargo names no program of the benchmark" >&2; exit 1; }
work=$(mktemp -d "${TMPDIR:-/tmp}/drupe-bench.XXXXXX")
trap 'rm -rf "$work"' EXIT
# Every round is of the same program, whatever is built meanwhile.
cp "$binary" "$work/bench"
# Whoever can link Rust programs has a C compiler.
cc -static -O1 -Wall -o "$work/reader" "$benches/reader.c"

# Runs round $2 of part $1 in a new node and keeps its samples if all goes well.
in_node() {
    local code=0 cpus=2
    # Two guests at once on two emulated processors: in most nodes the second
    # one does not come up, of QEMU's as of drupe's. On one processor they do.
    [ "$1" != net-pods ] || cpus=1
    "$here/run.sh" -c "$cpus" -t "$SECONDS_A_NODE" -a "$work/bench" -a "$work/reader" -- \
        /drupe/bench round "$1" "$2" /drupe/out/guest /drupe/out/bin/drupe-vmm /drupe/reader \
        > "$work/output" || code=$?
    cat "$work/output"
    [ "$code" -ne 0 ] || grep '^{' "$work/output" >> "$work/samples" || code=1
    return "$code"
}

again=4
for node in "${nodes[@]}"; do
    read -r part round <<< "$node"
    echo "bench: $part, round $round, load $(cut -d ' ' -f 1 /proc/loadavg), after $SECONDS s"
    code=0
    in_node "$part" "$round" || code=$?
    # The node did not come up, died or stands still, or a guest in it never
    # said a word (124, 125): that can be the emulator, four times a run.
    while [ "$code" -ge 124 ] && [ "$code" -le 125 ] && [ "$again" -gt 0 ]; do
        again=$((again - 1))
        echo "bench: node given up (exit code $code); once more in a new one: $part, round $round" >&2
        code=0
        in_node "$part" "$round" || code=$?
    done
    [ "$code" -eq 0 ] || { echo "bench: exit code $code of $part, round $round" >&2; exit "$code"; }
done
"$work/bench" table < "$work/samples"
