# shellcheck shell=bash
# A Debian node with systemd in namespaces of its own, for tests that source
# this. systemd is its first process and sees its own processes, mounts, network
# and control groups; kernel and devices are this machine's.

# What a test may wait for something that systemd, drupe or a kubelet does.
readonly WITHIN=${WITHIN:-180}
# Settings of the machine's kernel that systemd or a kubelet changes.
readonly SYSCTLS=(fs/file-max fs/nr_open vm/overcommit_memory vm/panic_on_oom
    kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes)

install_tests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR
. "$install_tests/../namespaces.sh"
out=$(realpath "${DRUPE_OUT:-$install_tests/../../out}")
work=
node=
init=
network=
holder=

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

say() { printf -- '-- %s\n' "$*"; }

# eventually WHAT COMMAND...: until the command succeeds. Most of what is waited
# for is an answer of a server, which sends no event.
eventually() {
    local what=$1 begun=$SECONDS
    shift
    until "$@" > "$work/last" 2>&1; do
        [ $((SECONDS - begun)) -lt "$WITHIN" ] ||
            fail "waited $WITHIN s for $what; last: $(tail -n 5 "$work/last")"
        sleep 0.2
    done
}

in_node() { nsenter -t "$init" --all -- "$@"; }

# Commands of this machine in the network of the node.
in_network() { nsenter -t "$network" --net -- "$@"; }

# Starts a program of this machine in the network of the node; its log is NAME.log.
spawn() {
    nsenter -t "$network" --net -- "${@:2}" > "$work/$1.log" 2>&1 < /dev/null &
    children+=($!)
}

# Unpacks a node into $work/root and makes $node its directory.
node_unpack() {
    work=$(mktemp -d "${TMPDIR:-/tmp}/drupe-install.XXXXXX")
    trap node_end EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    node=$work/root
    mkdir "$node"
    tar -xf "$out/install/root.tar" -C "$node"
    echo node-1 > "$node/etc/hostname"
    echo "127.0.0.1 localhost node-1" > "$node/etc/hosts"
    rm -f "$node/etc/resolv.conf"
    echo "nameserver 192.0.2.1" > "$node/etc/resolv.conf"
    # The machine's settings are not the node's to change.
    ln -s /dev/null "$node/etc/systemd/system/systemd-sysctl.service"
    ln -s /dev/null "$node/etc/systemd/system/console-getty.service"
    install -D -m 755 "$out/tools/crictl" "$node/usr/local/bin/crictl"
    # A pod network that needs nothing from outside.
    mkdir -p "$node/etc/cni/net.d"
    cat > "$node/etc/cni/net.d/10-node.conflist" << 'CNI'
{ "cniVersion": "1.0.0", "name": "node", "plugins": [{
  "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
  "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.88.0.0/16" }]],
            "routes": [{ "dst": "0.0.0.0/0" }] } }] }
CNI
}

# The node's network, which what else is in it goes on with when the node does not.
network_start() {
    local setting
    for setting in "${SYSCTLS[@]}"; do
        echo "$(< "/proc/sys/$setting") $setting"
    done > "$work/sysctls"
    unshare --net sleep infinity &
    network=$!
    children+=("$network")
    eventually "the node's network" has_own_network
    in_network ip link set lo up
}

has_own_network() { [ "$(readlink "/proc/$network/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }

node_start() {
    (
        join_group "${work##*/}"
        exec nsenter -t "$network" --net -- setsid unshare --mount --uts --ipc --pid --cgroup --fork --kill-child \
            "$install_tests/init.sh" "$node"
    ) > "$work/node.log" 2>&1 < /dev/null &
    holder=$!
    eventually "the node's first process" pgrep -x -P "$holder" systemd
    init=$(pgrep -x -P "$holder" systemd)
    eventually "systemd in the node" in_node systemctl is-active -q basic.target
}

# As when the power fails: no process of the node ends in order.
node_power_off() {
    [ -z "$init" ] || kill -KILL "$init" 2> /dev/null || true
    init=
    wait "$holder" 2> /dev/null || true
    remove_group "${work##*/}"
}

# Ends all that runs in the node, and shows why if it is the end of a failure.
node_end() {
    local code=$? value setting
    if [ "$code" -ne 0 ] && [ -n "$init" ]; then
        in_node journalctl --no-pager -u drupe -u drupe-node -u kubelet -n "${JOURNAL_LINES:-60}" >&2 || true
    fi
    [ ${#children[@]} -eq 0 ] || kill -KILL "${children[@]}" 2> /dev/null || true
    [ -z "$holder" ] || node_power_off
    wait 2> /dev/null
    if [ -e "$work/sysctls" ]; then
        while read -r value setting; do
            [ "$(< "/proc/sys/$setting")" = "$value" ] || echo "$value" > "/proc/sys/$setting"
        done < "$work/sysctls"
    fi
    rm -rf --one-file-system "$work"
}
# Programs of this machine that a test has started.
children=()

# A registry on the node's loopback, where runtimes speak HTTP to it.
readonly registry=127.0.0.1:5000

start_registry() {
    cat > "$work/registry.yml" << YAML
version: 0.1
storage: { filesystem: { rootdirectory: $work/registry } }
http: { addr: "$registry" }
YAML
    spawn registry docker-registry serve "$work/registry.yml"
    eventually "the registry" in_network curl -fs "http://$registry/v2/"
}

# push ARCHIVE NAME: an OCI archive, as the image NAME of the registry.
push() {
    in_network skopeo copy --quiet --insecure-policy --dest-tls-verify=false "oci-archive:$1" "docker://$registry/$2"
}

# machine_of POD: the process that holds the pod's machine, as the node sees it.
machine_of() { in_node pgrep -f "drupe-vmm $1"; }

# uptime_in CONTAINER: whole seconds since its kernel started.
uptime_in() { in_node crictl exec -s "$1" cut -d . -f 1 /proc/uptime; }
