#!/usr/bin/env bash
# Fuzzes the devices with hostile guests: each target, or those named.
#   run.sh [SECONDS] [TARGET...]
# Finds go to artifacts/; one worth keeping belongs into corpus/TARGET/, which
# `cargo test` plays as well. Needs root, for namespaces and a tap.
set -euo pipefail
cd "$(dirname "$0")"

seconds=${1:-60}
shift || true
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
    targets=(blk balloon net vsock fs rng vhost_user)
fi

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
# The dependencies are those that ship.
cp ../../Cargo.lock .
cargo build --quiet --release --target "$host"

# Threads and namespaces live until the end: nothing of theirs is a leak.
export ASAN_OPTIONS=detect_leaks=0
mkdir -p artifacts
for target in "${targets[@]}"; do
    mkdir -p "corpus-found/$target" "corpus/$target"
    echo "fuzzing $target for $seconds s"
    log=artifacts/$target.log
    if ! "target/$host/release/$target" -max_total_time="$seconds" -timeout=20 \
        -rss_limit_mb=2048 -max_len=4096 -len_control=0 \
        -artifact_prefix="artifacts/$target-" \
        "corpus-found/$target" "corpus/$target" > "$log" 2>&1; then
        tail -n 40 "$log" >&2
        exit 1
    fi
    grep -E '^(Done|#[0-9]+.*DONE)' "$log" || true
done
