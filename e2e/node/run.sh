#!/usr/bin/env bash
# Boots the emulated node, runs a command in it and ends as the command did.
# README.md beside this file tells more.
set -euo pipefail

# It boots in five seconds on an idle machine; once in a while the emulator
# hangs before anything runs.
readonly BOOT_LIMIT=${NODE_BOOT_LIMIT:-120}

usage() {
    cat >&2 <<'END'
usage: run.sh [-t SECONDS] [-c CPUS] [-m MIB] [-a FILE[=NAME]]... [-k LOG] -- COMMAND...
  -t  the time the node has, its boot included (300)
  -c  CPUs (2)
  -m  memory in MiB (6144)
  -a  put FILE into the node as /drupe/NAME (its own name)
  -k  keep the node's console in LOG
One COMMAND is a script for bash; several words are one command.
END
    exit 2
}

here=$(cd "$(dirname "$0")" && pwd)
out=${DRUPE_OUT:-$here/../../out}
limit=300 cpus=2 memory=6144 console='' added=()
while getopts t:c:m:a:k: option; do
    case $option in
        t) limit=$OPTARG ;;
        c) cpus=$OPTARG ;;
        m) memory=$OPTARG ;;
        a) added+=("$OPTARG") ;;
        k) console=$(realpath -m "$OPTARG") ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || usage
system=$out/node
[ -e "$system/rootfs.erofs" ] || { echo "$system is missing: run \`make setup\`" >&2; exit 2; }

work=$(mktemp -d "${TMPDIR:-/tmp}/drupe-node.XXXXXX")
children=()
# Called by the trap below.
# shellcheck disable=SC2317
finish() {
    # Whoever still runs; bash would tell of each that it was killed.
    exec 2> /dev/null
    [ ${#children[@]} -eq 0 ] || kill -KILL "${children[@]}" || true
    wait || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
console=${console:-$work/console}

# The second disk: what was built, and the command.
project=$work/project
mkdir -p "$project/out"
for part in bin guest tools debs; do
    [ ! -d "$out/$part" ] || cp -RL --reflink=auto "$out/$part" "$project/out/"
done
for file in "${added[@]}"; do
    install -D "${file%%=*}" "$project/$(basename "${file#*=}")"
done
if [ $# -eq 1 ]; then printf '%s\n' "$1"; else printf '%q ' "$@"; fi > "$project/command"
mkfs.erofs -T0 "$work/project.erofs" "$project" > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 2; }
rm -rf "$project"

# A pipe of its own: QEMU makes what it writes to non-blocking, and standard
# output may be a terminal that others write to as well.
mkfifo "$work/output"
cat "$work/output" &
shown=$!
children+=("$shown")
begun=$SECONDS
# The CPU has what KVM needs, but no XSAVE: QEMU runs a guest's XSETBV without
# asking its hypervisor, whose CPUID then tells of a smaller area than XSAVE
# writes; and four levels of page tables, which are walked faster than five.
# The node's clock is the time stamp counter: the others take the emulator's
# one lock at each look. Its timers tick at a steady rate: one that is set anew
# for each event is set through that lock, and a tick that comes anyway brings
# along an interrupt that was overlooked.
# The most that the emulator can hold of what it has translated: once that is
# full, it stops all processors to throw it away, and on that way gives a guest
# of KVM the interrupt once more that it was given last, be it ready for one or
# not (helper_vmrun leaves exception_index set). Of that guests hang. Nothing
# that matters for how it ends shall need more: some 50 s of two busy CPUs.
setpriv --pdeathsig KILL qemu-system-x86_64 \
    -accel tcg,thread=multi,tb-size=2048 -cpu max,+svm,-xsave,-la57 -M q35,hpet=off \
    -smp "$cpus" -m "$memory" -nodefaults -no-user-config -no-reboot -display none -nic none \
    -kernel "$system/kernel" -initrd "$system/initramfs" \
    -append "console=ttyS0 loglevel=4 panic=-1 tsc=reliable mitigations=off rcupdate.rcu_expedited=1 nohz=off highres=off" \
    -drive "file=$system/rootfs.erofs,if=virtio,format=raw,read-only=on" \
    -drive "file=$work/project.erofs,if=virtio,format=raw,read-only=on" \
    -device virtio-rng-pci -device virtio-serial-pci \
    -chardev "file,id=console,path=$console" -serial chardev:console \
    -chardev "file,id=output,path=$work/output" -device virtserialport,chardev=output,name=output \
    -chardev "file,id=status,path=$work/status" -device virtserialport,chardev=status,name=status \
    < /dev/null 2> "$work/qemu.log" &
qemu=$!
children+=("$qemu")
sleep "$limit" &
alarm=$!
sleep "$BOOT_LIMIT" &
boot_alarm=$!
children+=("$alarm" "$boot_alarm")

ended=0
wait -n -p first "$qemu" "$alarm" "$boot_alarm" || ended=$?
if [ "$first" = "$boot_alarm" ]; then
    if [ ! -s "$work/status" ]; then
        printf 'node: not up after %d s; the end of its console:\n' "$BOOT_LIMIT" >&2
        tail -n 30 "$console" >&2
        exit 125
    fi
    ended=0
    wait -n -p first "$qemu" "$alarm" || ended=$?
fi
if [ "$first" = "$alarm" ]; then
    printf 'node: no end after %d s; the end of its console:\n' "$limit" >&2
    tail -n 30 "$console" >&2
    exit 124
fi
wait "$shown"
code=$(sed -n '$s/^[0-9]\{1,3\}$/&/p' "$work/status" 2> /dev/null || true)
if [ -z "$code" ]; then
    printf 'node: it ended after %d s (QEMU: %d) and did not say how its command did; the end of its console:\n' \
        $((SECONDS - begun)) "$ended" >&2
    cat "$work/qemu.log" >&2
    tail -n 30 "$console" >&2
    exit 125
fi
exit "$code"
