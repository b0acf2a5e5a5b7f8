#!/usr/bin/env bash
# clear.sh WORK FORWARDING: waits for the end of its input, which test.sh has the
# other end of; then ends all that runs in the fresh machine of directory WORK
# and clears it away. FORWARDING is what ip_forward was before.
set -uo pipefail
# Whoever reads what this says may be gone.
trap '' PIPE INT TERM HUP

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/../namespaces.sh"
work=$1 forwarding=$2
name=${work##*/}
# What killed processes may take to be gone.
readonly WITHIN=30
cat > /dev/null

members() {
    local group
    while read -r group; do
        [ ! -d "$group" ] || find "$group" -name cgroup.procs -exec cat {} +
    done < <(groups_of "$name") | sort -u
}

# Its first process takes all others along.
begun=$SECONDS
while pids=$(members) && [ -n "$pids" ] && [ $((SECONDS - begun)) -lt $WITHIN ]; do
    # One or another may have gone.
    xargs kill -KILL <<< "$pids" 2> /dev/null
    sleep 0.1
done

# Mounts and links have gone with the namespaces; this is the whole machine's.
device=$(stat -c %Hd:%Ld "$work")
while read -r loop number inode; do
    [ "$number" != "$device" ] || [ -z "$(find "$work" -xdev -inum "$inode" -print -quit)" ] || losetup --detach "$loop"
done < <(losetup --list --noheadings --raw --output NAME,BACK-MAJ:MIN,BACK-INO)
table=$(network_of "$name")
! nft list table ip "$table" > /dev/null 2>&1 || nft delete table ip "$table"
[ "$(< /proc/sys/net/ipv4/ip_forward)" = "$forwarding" ] || echo "$forwarding" > /proc/sys/net/ipv4/ip_forward
remove_group "$name"
rm -rf --one-file-system "$work"
