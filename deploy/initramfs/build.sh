#!/bin/bash
# Writes the guest's initramfs: the agent as /init and the console it speaks to
# before it has mounted anything. A cpio archive in the newc format that the
# kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst),
# the same bytes for the same agent: no times, no owners, no inode numbers of
# this machine, and no need to be root to put a device file in it.
#
# usage: build.sh OUTPUT [AGENT]
# Without AGENT, a static drupe-agent binary, it is built first.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: ${0##*/} OUTPUT [AGENT]" >&2
    exit 2
fi
output=$1

# build_agent: one static binary, small because it is resident in every pod.
build_agent() {
    local target
    target=$(uname -m)-unknown-linux-gnu
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    local libraries
    libraries=/usr/lib/$(uname -m)-linux-gnu
    (
        cd "$root"
        RUSTFLAGS='-C target-feature=+crt-static' \
            LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$libraries \
            ${CARGO:-cargo} build --quiet --profile agent --target "$target" \
            --package drupe-agent
        echo "${CARGO_TARGET_DIR:-$root/target}/$target/agent/drupe-agent"
    )
}

agent=${2:-$(build_agent)}
if [ ! -f "$agent" ]; then
    echo "${0##*/}: there is no agent at $agent" >&2
    exit 1
fi
mkdir -p "$(dirname "$output")"
# Octal, as in stat(2): a directory, a character device, an executable.
readonly directory=040755 device=020600 executable=0100755

inode=0

# entry NAME MODE SIZE [MAJOR MINOR]: a header, padded to four bytes.
entry() {
    local name=$1 mode=$2 size=$3 major=${4:-0} minor=${5:-0}
    inode=$((inode + 1))
    local length=$((${#name} + 1))
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\0' \
        "$inode" "$((mode))" 0 0 1 0 "$size" 0 0 "$major" "$minor" "$length" 0 "$name"
    pad $((110 + length))
}

# pad LENGTH: null bytes from LENGTH to the next multiple of four.
pad() {
    local rest=$((-$1 & 3))
    [ "$rest" -eq 0 ] || head -c "$rest" /dev/zero
}

size=$(stat -c %s "$agent")
{
    entry dev "$directory" 0
    entry dev/console "$device" 0 5 1
    entry init "$executable" "$size"
    cat "$agent"
    pad "$size"
    entry 'TRAILER!!!' 0 0
} >"$output.partial"
mv "$output.partial" "$output"
