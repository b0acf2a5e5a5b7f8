#!/usr/bin/env bash
# Runs those end-to-end tests in the emulated node that the arguments, or else
# scenarios.txt, name: on E2E_MACHINE (kvm), E2E_THREADS (2) at once.
set -euo pipefail

# How much slower than the machine below it the node is, and then some.
readonly PATIENCE=10
# They take seven minutes on two idle cores; past this something hangs.
readonly SECONDS_IN_ALL=1800
# A pod that asks for four CPUs gets them of a node that has as many.
readonly CPUS=4

here=$(cd "$(dirname "$0")" && pwd)
mapfile -t names < <(if [ $# -gt 0 ]; then printf '%s\n' "$@"; else grep -vE '^(#|$)' "$here/scenarios.txt"; fi)

binary=$("${CARGO:-cargo}" test --release --workspace --test e2e --no-run --message-format json-render-diagnostics |
    sed -nE '/"kind":\["test"\]/s/.*"executable":"([^"]+)".*/\1/p')
[ -x "$binary" ] || { echo "cargo names no program of the end-to-end tests" >&2; exit 1; }

# A name that is no test would pass unseen.
known=$("$binary" --list --exact "${names[@]}" | sed -n 's/: test$//p')
for name in "${names[@]}"; do
    grep -qxF "$name" <<< "$known" || { echo "there is no end-to-end test $name" >&2; exit 1; }
done

printf -v list '%q ' "${names[@]}"
in_node() {
    "$here/run.sh" -t "$SECONDS_IN_ALL" -c "$CPUS" -a "$binary=e2e" -- "
        export DRUPE_OUT=/drupe/out E2E_MACHINE=${E2E_MACHINE:-kvm} E2E_PATIENCE=$PATIENCE
        exec /drupe/e2e --exact --test-threads=${E2E_THREADS:-2} $list"
}

code=0
in_node || code=$?
# The emulator's own race: QEMU can deliver the node an interrupt in the middle
# of its return from a guest, of which the node's kernel dies. A test that fails
# is another matter and is not tried again.
if [ "$code" -eq 125 ]; then
    echo "node: the emulated machine itself gave up; once more" >&2
    code=0
    in_node || code=$?
fi
exit "$code"
