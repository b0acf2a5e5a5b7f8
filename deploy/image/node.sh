#!/bin/sh
# node.sh: makes this node what /opt/drupe/state/wanted says, as a service of
# systemd, since the pod that asks for it (pod.sh) ends with the runtime that it
# runs on. Every step may be killed and is done again by the next run; what has
# happened is in files of the state directory:
#
#   wanted    "install VERSION POD" or "remove - POD"; the pod writes it
#   result    "WANTED: ok" or "WANTED: REASON why it is not so"; the pod waits for it
#   runtime   endpoint of the runtime that the kubelet had before
#   previous  the version to go back to
#   started   the version that the daemon runs and a pod has started with
#   switched  the kubelet works with drupe
set -eu

base=/opt/drupe
state=$base/state
units=/etc/systemd/system
drop_in=$units/kubelet.service.d/90-drupe.conf
config=/etc/drupe/config.yaml
socket=unix:///run/drupe/drupe.sock
# What the kubelet may take until the DaemonSet's pod runs on drupe: its image
# is pulled in that time.
switch_within=${DRUPE_SWITCH_WITHIN:-240}
# What containers may take to end.
grace=10
wanted=$(cat "$state/wanted")

say() { echo "drupe-node: $*"; }

# put FILE TEXT: all of it or nothing.
put() {
    printf '%s\n' "$2" > "$1.new"
    sync "$1.new"
    mv "$1.new" "$1"
}

result() {
    say "$wanted: $1"
    put "$state/result" "$wanted: $1"
}

cri() {
    endpoint=$1
    shift
    "$base/node/crictl" --config /dev/null -t 60s -r "$endpoint" -i "$endpoint" "$@"
}

# empty ENDPOINT: ends containers in grace, and removes all pods of a runtime.
empty() {
    for _ in 1 2 3; do
        cri "$1" ps -q | timeout 600 xargs -r -n 1 -P 16 "$base/node/crictl" --config /dev/null \
            -t 60s -r "$1" -i "$1" stop --timeout "$grace" > /dev/null || true
        cri "$1" rmp -fa > /dev/null || true
        left=$(cri "$1" pods -q) || continue
        [ -n "$left" ] || return 0
    done
    return 1
}

# The endpoint that the kubelet has now, by its flag, its file, or its default.
kubelet_endpoint() {
    pid=$(systemctl show -p MainPID --value kubelet)
    [ "$pid" != 0 ] || return 1
    tr '\0' '\n' < "/proc/$pid/cmdline" > "$state/kubelet"
    found=$(sed -n 's/^--container-runtime-endpoint=//p; /^--container-runtime-endpoint$/{n;p}' "$state/kubelet" | tail -n 1)
    file=$(sed -n 's/^--config=//p; /^--config$/{n;p}' "$state/kubelet" | tail -n 1)
    if [ -z "$found" ] && [ -n "$file" ]; then
        found=$(sed -n "/^ *#/d; s/.*containerRuntimeEndpoint[\"']*: *[\"']*\([^\"', }]*\).*/\1/p" "$file" | head -n 1)
    fi
    found=${found:-unix:///run/containerd/containerd.sock}
    case $found in /*) found=unix://$found ;; esac
    rm "$state/kubelet"
    echo "$found"
}

# The command line of kubelet.service as its files have it.
kubelet_command() {
    systemctl cat kubelet | awk '
        { line = line $0 }
        sub(/\\$/, " ", line) { next }
        sub(/^ExecStart=/, "", line) { if (line != "") last = line }
        { line = "" }
        END { print last }'
}

remove_drop_in() {
    rm -f "$drop_in"
    [ ! -d "${drop_in%/*}" ] || rmdir --ignore-fail-on-non-empty "${drop_in%/*}"
    systemctl daemon-reload
}

use_version() {
    ln -sfn "versions/$1" "$base/current.new"
    mv -T "$base/current.new" "$base/current"
    cp "$base/current/drupe.service" "$units/drupe.service.new"
    mv "$units/drupe.service.new" "$units/drupe.service"
    mkdir -p "${config%/*}"
    ln -sfn "$base/current/config.yaml" "$config"
    systemctl daemon-reload
}

# Starts the daemon of the current version; pods live on.
start_daemon() {
    rm -f "$state/started"
    systemctl enable -q drupe
    # A unit that starts over and over is "activating" until it is ready.
    timeout 60 systemctl restart drupe
}

# Starts a pod of the default handler, and removes it: a machine, a guest and a
# network come up on this node. It needs no image.
probe() {
    cat > "$state/probe.json" << JSON
{ "metadata": { "name": "drupe-probe", "namespace": "drupe-system", "uid": "drupe-probe" } }
JSON
    remove_probe
    probed=$(cri "$socket" runp "$state/probe.json" 2>&1) || return 1
    remove_probe
}

remove_probe() { cri "$socket" pods -q --name '^drupe-probe$' | xargs -r "$base/node/crictl" --config /dev/null -t 60s -r "$socket" rmp -f > /dev/null; }

why_not_started() { journalctl -u drupe -n 3 -o cat --no-pager 2> /dev/null | tr '\n' ' ' | cut -c 1-500; }

# The first install has come to nothing: the kubelet has its old runtime again.
undo_first() {
    if [ -e "$drop_in" ]; then
        systemctl stop kubelet
        empty "$socket" || say "pods are left on drupe"
        remove_drop_in
    fi
    systemctl disable -q --now drupe || true
    rm -f "$state/started" "$state/switched"
    # It runs, unless it was stopped for the switch.
    systemctl start kubelet
}

go_back() {
    previous=$(cat "$state/previous")
    if [ -n "$previous" ]; then
        use_version "$previous"
        if start_daemon; then put "$state/started" "$previous"; else say "the version before does not start either"; fi
    else
        undo_first
    fi
    result "$1"
}

install_version() {
    version=$1
    if [ "$(systemctl show -p LoadState --value kubelet)" != loaded ]; then
        result "this node has no kubelet.service"
        return
    fi
    if [ -e "$config" ] && [ ! -L "$config" ] || [ -e /usr/bin/drupe ]; then
        result "drupe is installed on this node by other means: remove it first"
        return
    fi
    current=$(readlink "$base/current" || true)
    if [ "$current" != "versions/$version" ]; then
        # Only a version that the kubelet works with is one to go back to.
        if [ -e "$state/switched" ]; then put "$state/previous" "${current#versions/}"; else put "$state/previous" ""; fi
        use_version "$version"
    fi
    if [ "$(cat "$state/started" 2> /dev/null || true)" != "$version" ]; then
        if ! start_daemon; then
            go_back "the daemon does not start: $(why_not_started)"
            return
        fi
        if ! probe; then
            go_back "a pod does not start: $(echo "$probed" | tr '\n' ' ' | cut -c 1-800)"
            return
        fi
        put "$state/started" "$version"
    fi
    if ! checked=$("$base/current/bin/drupe" check 2>&1); then
        go_back "drupe check: $(echo "$checked" | grep ^BAD | tr -s ' ' | tr '\n' ';')"
        return
    fi
    # The DaemonSet's own pod, and kube-proxy, share the node's namespaces.
    if [ ! -e "$state/switched" ] && ! echo "$checked" | grep -q "^ok.*host's kernel"; then
        go_back "pods of the node's namespaces could not run: install runc or crun"
        return
    fi
    [ -e "$state/switched" ] || switch || return 0
    for old in "$base"/versions/*; do
        case ${old##*/} in "$version" | "$(cat "$state/previous")") ;; *) rm -rf "$old" ;; esac
    done
    result ok
}

switch() {
    if [ ! -s "$state/runtime" ]; then
        if ! runtime=$(kubelet_endpoint); then
            go_back "the kubelet does not run: which runtime it has cannot be seen"
            return 1
        fi
        put "$state/runtime" "$runtime"
    fi
    remove_drop_in
    command=$(kubelet_command)
    case ${command%% *} in
        */kubelet) ;;
        *)
            go_back "kubelet.service does not start the kubelet itself: $command"
            return 1
            ;;
    esac
    systemctl stop kubelet
    if ! empty "$(cat "$state/runtime")"; then
        go_back "pods of $(cat "$state/runtime") cannot be removed"
        return 1
    fi
    mkdir -p "${drop_in%/*}"
    put "$drop_in" "# Written by drupe's DaemonSet; gone with it.
[Unit]
Wants=drupe.service
After=drupe.service
[Service]
ExecStart=
ExecStart=$command --container-runtime-endpoint=$socket --cgroup-driver=cgroupfs"
    systemctl daemon-reload
    systemctl start kubelet
    begun=$(date +%s)
    until [ -n "$(cri "$socket" ps -q --state running --name '^drupe-node$' || true)" ]; do
        if [ $(($(date +%s) - begun)) -ge "$switch_within" ]; then
            go_back "the kubelet has not brought up the DaemonSet's pod on drupe in $switch_within s: $(why_no_pod)"
            return 1
        fi
        sleep 1
    done
    put "$state/switched" "$version"
}

why_no_pod() { journalctl -u kubelet -n 200 -o cat --no-pager | grep -E '^[EF][0-9]{4} ' | tail -n 1 | cut -c 1-500; }

remove_all() {
    if [ -e "$drop_in" ]; then
        systemctl stop kubelet
        systemctl start drupe || true
        empty "$socket" || say "pods are left on drupe"
        remove_drop_in
    fi
    # An install that was called off may have stopped it. Whether or not it can
    # start now: systemd tries until it can.
    systemctl start kubelet || true
    systemctl disable -q --now drupe || true
    rm -f "$units/drupe.service" "$config"
    [ ! -d "${config%/*}" ] || rmdir --ignore-fail-on-non-empty "${config%/*}"
    # Below a pod's directory the node's own volumes are mounted.
    if [ -n "$(ls -A /run/drupe/pods 2> /dev/null)" ] || grep -qs ' /run/drupe/' /proc/self/mountinfo; then
        result "pods of drupe still run: start the node anew, and label it again"
        return
    fi
    rm -rf --one-file-system /run/drupe /var/lib/drupe
    systemctl disable -q drupe-node || true
    rm -f "$units/drupe-node.service"
    systemctl daemon-reload
    say "removed"
    rm -rf --one-file-system "$base"
}

# Asked and answered: whoever wants another try asks as another pod.
case $(cat "$state/result" 2> /dev/null || true) in "$wanted: "*) exit 0 ;; esac
case $wanted in
    "install "*)
        rest=${wanted#install }
        install_version "${rest%% *}"
        ;;
    "remove "*) remove_all ;;
    *) result "unknown" ;;
esac
exit 0
