#!/usr/bin/env bash
# Does on a machine that has nothing what README.md says: a minimal Debian 12 in
# namespaces of its own gets Rust, Go, git and make and a clone of this
# repository's last commit; there `make setup`, `make demo` and `make test` run.
#
#   test.sh [PART...]     those of setup, demo and test that are named, or all
#
# Everything is built anew, the guest kernels too; FRESH_CACHE=1 lets it have
# this machine's cache of those. What cargo and go have downloaded is shared.
#
# The kernel, its modules and devices are this machine's, and there is no service
# manager. Whatever ends this, SIGKILL too: nothing of it is left.
set -euo pipefail

[ "$(id -u)" -eq 0 ] || { echo "run it as root: it makes a system of its own" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR
. "$here/../namespaces.sh"
[ $# -gt 0 ] || set -- setup demo test
for part in "$@"; do
    case $part in setup | demo | test) ;; *) echo "$part is none of setup, demo and test" >&2; exit 2 ;; esac
done

# On a disk: what is built takes some 20 GiB.
place=${TMPDIR:-/var/tmp}
# Its network's addresses are there once. Whoever clears away has the lock, too.
exec 9< "$place"
flock --nonblock 9 || { echo "another fresh machine is there already" >&2; exit 2; }
work=$(mktemp -d "$place/drupe-fresh.XXXXXX")
# Reads from this as long as it lives, and clears away then.
exec {alive}> >(exec setsid "$here/clear.sh" "$work" "$(< /proc/sys/net/ipv4/ip_forward)")
clearing=$!
# Called by the trap below.
# shellcheck disable=SC2317
finish() {
    exec {alive}>&-
    wait "$clearing"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

exec {network}< /proc/self/ns/net
(
    join_group "${work##*/}"
    exec unshare --mount --mount-proc --net --uts --ipc --pid --cgroup --fork \
        "$here/machine.sh" "$work" "/proc/self/fd/$network" "$@"
) {alive}>&- 9>&- < /dev/null &
wait $!
