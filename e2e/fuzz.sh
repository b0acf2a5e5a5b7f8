#!/usr/bin/env bash
# Fuzzes what reads the words of guests, clients and registries: each target
# below the crates' fuzz/fuzz_targets, or those named.
#   fuzz.sh [SECONDS] [TARGET...]
# Finds go to fuzz/artifacts/; one worth keeping belongs into
# fuzz/corpus/TARGET/, which `cargo test` plays as well. Needs root, for
# namespaces and a tap.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
shift || true

host=$(rustc -vV | sed -n 's/^host: //p')
# What cargo-fuzz passes. The sanitizer's switch is not a stable one yet, but
# the stable compiler has it.
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module \
 -Cllvm-args=-sanitizer-coverage-level=4 \
 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
 -Cllvm-args=-sanitizer-coverage-pc-table \
 -Cllvm-args=-sanitizer-coverage-trace-compares"
unset CARGO_TARGET_DIR
# Threads and namespaces live until the end: nothing of theirs is a leak.
export ASAN_OPTIONS=detect_leaks=0

# Fuzzes target $1 in its crate's directory.
fuzz() {
    local target=$1 log=artifacts/$1.log
    mkdir -p artifacts "corpus-found/$target" "corpus/$target"
    echo "fuzzing $target for $seconds s"
    if ! "target/$host/release/$target" -max_total_time="$seconds" -timeout=20 \
        -rss_limit_mb=2048 -max_len=4096 -len_control=0 \
        -artifact_prefix="artifacts/$target-" \
        "corpus-found/$target" "corpus/$target" > "$log" 2>&1; then
        tail -n 40 "$log" >&2
        exit 1
    fi
    grep -E '^(Done|#[0-9]+.*DONE)' "$log" || true
}

wanted=" $* "
known=()
for crate in vmm cri-server imagesvc; do
    targets=()
    for file in "$crate"/fuzz/fuzz_targets/*.rs; do
        target=$(basename "$file" .rs)
        known+=("$target")
        if [ $# = 0 ] || [[ $wanted == *" $target "* ]]; then
            targets+=("$target")
        fi
    done
    [ ${#targets[@]} -gt 0 ] || continue
    pushd "$crate/fuzz" > /dev/null
    # The dependencies are those that ship.
    cp ../../Cargo.lock .
    cargo build --quiet --release --target "$host"
    for target in "${targets[@]}"; do
        fuzz "$target"
    done
    popd > /dev/null
done
for target in "$@"; do
    if [[ " ${known[*]} " != *" $target "* ]]; then
        echo "no target $target: ${known[*]}" >&2
        exit 2
    fi
done
