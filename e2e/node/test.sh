#!/usr/bin/env bash
# Runs those end-to-end tests in the emulated node that the arguments, or else
# scenarios.txt, name: on E2E_MACHINE (kvm), E2E_THREADS (2) at once, a few in
# each boot of the node.
set -euo pipefail

# How much slower than the machine below it the node is, and then some.
readonly PATIENCE=10
# A test makes the emulator translate some 300 MiB, of the 2 GiB that run.sh
# says why a node should not go beyond.
readonly TESTS_A_NODE=4
# They take a minute on two idle cores; past this something hangs.
readonly SECONDS_A_NODE=${NODE_TEST_LIMIT:-400}
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

# Runs tests $@ in one boot of the node.
in_node() {
    local list
    printf -v list '%q ' "$@"
    "$here/run.sh" -t "$SECONDS_A_NODE" -c "$CPUS" -a "$binary=e2e" -- "
        export DRUPE_OUT=/drupe/out E2E_MACHINE=${E2E_MACHINE:-kvm} E2E_PATIENCE=$PATIENCE
        exec /drupe/e2e --exact --test-threads=${E2E_THREADS:-2} $list"
}

failed=0
again=2
for ((first = 0; first < ${#names[@]}; first += TESTS_A_NODE)); do
    some=("${names[@]:first:TESTS_A_NODE}")
    code=0
    in_node "${some[@]}" || code=$?
    # The node did not come up, died or stands still (124, 125): that can be the
    # emulator, twice a run at most. A test that fails is not tried again.
    if [ "$code" -ge 124 ] && [ "$code" -le 125 ] && [ "$again" -gt 0 ]; then
        again=$((again - 1))
        echo "node: given up (exit code $code); its tests once more in a new one: ${some[*]}" >&2
        code=0
        in_node "${some[@]}" || code=$?
    fi
    [ "$code" -eq 0 ] || { failed=$code; echo "node: exit code $code of ${some[*]}" >&2; }
    # Whoever interrupts means all of it.
    [ "$code" -lt 129 ] || break
done
exit "$failed"
