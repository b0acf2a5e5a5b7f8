#!/usr/bin/env bash
# Runs those end-to-end tests in the emulated node that the arguments, or else
# scenarios.txt, name: on E2E_MACHINE (kvm), E2E_THREADS (1) at once, a few in
# each boot of the node.
set -euo pipefail

# How much slower than the machine below it the node is, and then some.
readonly PATIENCE=10
# A test makes the emulator translate some 300 MiB, of the 2 GiB that run.sh
# says why a node should not go beyond.
readonly TESTS_A_NODE=4
# They take a minute on two idle cores; past this something hangs.
readonly SECONDS_A_NODE=${NODE_TEST_LIMIT:-400}
# Tests that need a node with more than one CPU, and how many. The others have
# one: the emulator loses guests of several processors that run at once.
declare -A CPUS=([machine::a_pod_that_asks_for_four_cpus_runs_on_four]=4)

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

output=$(mktemp)
trap 'rm -f "$output"' EXIT

# Runs tests $2... in one boot of the node, which has $1 CPUs.
in_node() {
    local cpus=$1 list code=0
    shift
    printf -v list '%q ' "$@"
    "$here/run.sh" -t "$SECONDS_A_NODE" -c "$cpus" -a "$binary=e2e" -- "
        export DRUPE_OUT=/drupe/out E2E_MACHINE=${E2E_MACHINE:-kvm} E2E_PATIENCE=$PATIENCE
        exec /drupe/e2e --exact --test-threads=${E2E_THREADS:-1} $list" | tee "$output" ||
        code=${PIPESTATUS[0]}
    # No test has a guest that does this.
    if [ "$code" -ne 0 ] && grep -q "processor shut down (triple fault)" "$output"; then
        code=125
    fi
    return "$code"
}

failed=0
again=2
# Runs tests $2... in nodes of $1 CPUs.
run() {
    local cpus=$1 code=0
    shift
    [ $# -gt 0 ] || return 0
    in_node "$cpus" "$@" || code=$?
    # The node did not come up, died or stands still, or a guest in it did (124,
    # 125): that can be the emulator, twice a run at most. A test that fails is
    # not tried again.
    if [ "$code" -ge 124 ] && [ "$code" -le 125 ] && [ "$again" -gt 0 ]; then
        again=$((again - 1))
        echo "node: given up (exit code $code); its tests once more in a new one: $*" >&2
        code=0
        in_node "$cpus" "$@" || code=$?
    fi
    [ "$code" -eq 0 ] || { failed=$code; echo "node: exit code $code of $*" >&2; }
    # Whoever interrupts means all of it.
    [ "$code" -lt 129 ] || exit "$code"
}

some=()
for name in "${names[@]}"; do
    if [ -n "${CPUS[$name]:-}" ]; then
        run "${CPUS[$name]}" "$name"
        continue
    fi
    some+=("$name")
    if [ ${#some[@]} -eq "$TESTS_A_NODE" ]; then
        run 1 "${some[@]}"
        some=()
    fi
done
run 1 "${some[@]}"
exit "$failed"
