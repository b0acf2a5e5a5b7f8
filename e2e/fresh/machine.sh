#!/usr/bin/env bash
# machine.sh WORK NETWORK PART...: first process of the fresh machine's
# namespaces. Makes the machine in WORK, with a link to the network namespace at
# the path NETWORK, and becomes what runs the parts.
set -euo pipefail

readonly SUITE=bookworm
# What README.md says a machine has to have, of Debian's packages.
readonly GIVEN=git,make
# Of RFC 2544: nobody's.
readonly HERE=198.18.77.2 THERE=198.18.77.1

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$here/../namespaces.sh"
work=$1 network=$2
shift 2
root=$work/root

say() { printf -- '-- %s\n' "$*"; }

# quietly COMMAND...: shows the end of what it says if it fails.
quietly() { "$@" > "$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; echo "failed: $*" >&2; exit 1; }; }

# The link goes with its end in here, and clear.sh takes the rest away.
link_up() {
    local there=(nsenter "--net=$network" --) table
    table=$(network_of "${work##*/}")
    ip link add eth0 type veth peer name "$table" netns "$network"
    ip link set lo up
    ip address add "$HERE/30" dev eth0
    ip link set eth0 up
    ip route add default via "$THERE"
    "${there[@]}" ip address add "$THERE/30" dev "$table"
    "${there[@]}" ip link set "$table" up
    "${there[@]}" nft "add table ip $table { chain out {
        type nat hook postrouting priority srcnat; ip saddr $HERE masquerade; }; }"
    # /proc/sys/net is that of whoever opens it.
    "${there[@]}" sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
    if grep -qE '^nameserver +(127\.|::1)' /etc/resolv.conf; then
        echo "/etc/resolv.conf names a server on loopback, which is another one in here" >&2
        exit 2
    fi
}

bootstrap() {
    debian_sources "$SUITE" | mmdebstrap --mode=root --variant=minbase --format=directory --include="$GIVEN" \
        "$SUITE" "$root" -
}

# given FROM TO [OPTIONS]: a directory of the machine below, read-only unless
# the options say otherwise.
given() {
    [ -d "$1" ] || return 0
    mkdir -p "$root$2"
    mount --bind "$1" "$root$2"
    mount -o "remount,bind,${3:-ro}" "$root$2"
}

link_up
begun=$SECONDS
quietly bootstrap
say "Debian $(< "$root/etc/debian_version"), $(find "$root/var/lib/dpkg/info" -name '*.list' | wc -l) packages, made in $((SECONDS - begun)) s"
[ -z "$(git -C "$top" status --porcelain)" ] || say "changes that are not committed are left out"
quietly git clone "file://$top" "$root/root/drupe"
say "commit $(git -C "$root/root/drupe" log -1 --format='%h %s')"

# How the machine below reaches others.
cp --remove-destination /etc/resolv.conf "$root/etc/resolv.conf"
find /usr/local/share/ca-certificates -name '*.crt' -exec install -D -m 644 -t "$root/usr/local/share/ca-certificates" {} +
echo "127.0.0.1 localhost fresh" > "$root/etc/hosts"
hostname fresh
environment=(HOME=/root TERM=dumb LANG=C.UTF-8
    PATH=/opt/rust/bin:/opt/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY GOPROXY GOSUMDB GOFLAGS TEST_THREADS; do
    [ -z "${!name:-}" ] || environment+=("$name=${!name}")
done

mount --bind "$root" "$root"
cargo=${CARGO_HOME:-$HOME/.cargo}
given "$(rustc --print sysroot)" /opt/rust
given "$(go env GOROOT)" /opt/go
given /lib/modules /lib/modules
given "$cargo/registry" /root/.cargo/registry rw
given "$(go env GOMODCACHE)" /root/go/pkg/mod rw
[ ! -e "$cargo/config.toml" ] || install -m 644 "$cargo/config.toml" "$root/root/.cargo/config.toml"
if [ -n "${FRESH_CACHE:-}" ]; then
    given "${XDG_CACHE_HOME:-$HOME/.cache}/drupe/guest-kernel" /root/.cache/drupe/guest-kernel rw
    say "with the machine's cache of guest kernels"
fi
install -m 755 "$here/parts.sh" "$root/root/parts.sh"

cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount --make-rslave dev
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t tmpfs -o mode=755 run run
mount_groups sys/fs/cgroup
enter_root "$root"
exec env -i "${environment[@]}" /root/parts.sh "$@"
