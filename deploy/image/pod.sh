#!/bin/sh
# pod.sh install|remove, in a pod of drupe's DaemonSets (deploy/kubernetes): puts
# the image's files on the node, has node.sh on the node do what ends pods, and
# tells the cluster how it went. With the node's processes it sees the node's
# files as /proc/1/root.
set -eu

base=/opt/drupe
host=/proc/1/root
state=$host$base/state
units=$host/etc/systemd/system
account=/var/run/secrets/kubernetes.io/serviceaccount
given_config=/etc/drupe-config/config.yaml
# How often labels are compared with what the node can do.
look_every=30

say() { echo "$(date -u +%H:%M:%S) $*"; }

on_node() { nsenter -t 1 -m -u -i -n -p -- "$@"; }

# put FILE: from standard input, all of it or nothing.
put() {
    cat > "$1.new"
    mv "$1.new" "$1"
}

# api METHOD PATH TYPE BODY
api() {
    case $KUBERNETES_SERVICE_HOST in
        *:*) server="[$KUBERNETES_SERVICE_HOST]" ;;
        *) server=$KUBERNETES_SERVICE_HOST ;;
    esac
    curl -sS --fail-with-body --max-time 30 --cacert "$account/ca.crt" \
        -H "Authorization: Bearer $(cat "$account/token")" -H "Content-Type: $3" \
        -X "$1" --data "$4" "https://$server:$KUBERNETES_SERVICE_PORT$2"
}

# patched TYPE BODY: the node, with the answer thrown away unless it is an error.
patched() {
    answer=$(api PATCH "/api/v1/nodes/$NODE_NAME" "application/$1-patch+json" "$2" 2>&1) ||
        { say "patch of the node: $answer"; return 1; }
}

# Labels of the handlers that the node has, as members of a JSON object that
# take them away.
no_handlers() {
    api GET "/api/v1/nodes/$NODE_NAME" application/json '' |
        grep -oE '"(handler|machine).drupe.internal/[^"]*":' | sort -u | sed 's/$/null,/' | tr -d '\n'
}

# Each handler that works here is a label, and another the machine that its pods
# get, where they get one.
handlers() {
    on_node "$base/current/bin/drupe" check 2> /dev/null | sed -nE '
        s#^ok +handler ([^ :]*)  +(kvm|uml)[:,].*#"handler.drupe.internal/\1":"true",\n"machine.drupe.internal/\1":"\2",#p
        t
        s#^ok +handler ([^ :]*)  .*#"handler.drupe.internal/\1":"true",#p' | sort | tr -d '\n'
}

event() {
    message=$(printf %s "$2" | tr -d '\000-\037' | sed 's/[\\"]/\\&/g' | cut -c 1-1000)
    now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    answer=$(api POST /api/v1/namespaces/default/events application/json "{
        \"metadata\": { \"generateName\": \"drupe-\", \"namespace\": \"default\" }, \"type\": \"Warning\",
        \"reason\": \"$1\", \"message\": \"$message\", \"count\": 1,
        \"firstTimestamp\": \"$now\", \"lastTimestamp\": \"$now\",
        \"source\": { \"component\": \"drupe-node\", \"host\": \"$NODE_NAME\" },
        \"involvedObject\": { \"kind\": \"Node\", \"apiVersion\": \"v1\", \"name\": \"$NODE_NAME\", \"uid\": \"$NODE_NAME\" } }" 2>&1) ||
        say "event: $answer"
}

# What a kubeadm node says of its runtime; others have no such annotation.
annotate() {
    api PATCH "/api/v1/nodes/$NODE_NAME" application/json-patch+json \
        "[{ \"op\": \"replace\", \"path\": \"/metadata/annotations/kubeadm.alpha.kubernetes.io~1cri-socket\", \"value\": \"$1\" }]" \
        > /dev/null 2>&1 || true
}

# Copies this image's drupe, with this configuration, to a directory of its own.
copy_version() {
    to=$host$base/versions/$version
    [ ! -e "$to" ] || return 0
    rm -rf "$to.new"
    mkdir -p "$to.new/bin"
    cp /usr/bin/drupe "$to.new/bin/"
    cp -R /usr/lib/drupe "$to.new/lib"
    sed "s|/usr/bin/drupe|$base/current/bin/drupe|" /usr/lib/systemd/system/drupe.service > "$to.new/drupe.service"
    cp "$given_config" "$to.new/config.yaml"
    sync
    mv "$to.new" "$to"
}

# ask WANTED: has node.sh do it, unless this very pod has had its answer.
ask() {
    mkdir -p "$state" "$host$base/node"
    ! answered "$1" || return 0
    for file in /usr/share/drupe/node.sh /usr/bin/crictl; do
        to=$host$base/node/${file##*/}
        cmp -s "$file" "$to" || { cp "$file" "$to.new" && mv "$to.new" "$to"; }
    done
    # A run for this very pod goes on; one for another is of no use.
    verb=restart
    [ "$(cat "$state/wanted" 2> /dev/null || true)" != "$1" ] || verb=start
    put "$units/drupe-node.service" < /usr/share/drupe/drupe-node.service
    printf '%s\n' "$1" | put "$state/wanted"
    on_node systemctl daemon-reload
    on_node systemctl enable -q drupe-node
    on_node systemctl "$verb" --no-block drupe-node
}

# answered WANTED: $reason is what node.sh said of it.
answered() {
    [ -e "$state/result" ] || return 1
    read -r reason < "$state/result"
    case $reason in
        "$1: "*) reason=${reason#"$1: "} ;;
        *) return 1 ;;
    esac
}

install_drupe() {
    version=$(cat /usr/share/drupe/version)-$(sha256sum "$given_config" | cut -c 1-8)
    copy_version
    # A container that starts again asks the same; another pod asks anew.
    wanted="install $version $POD_UID"
    say "wants $version on $NODE_NAME"
    ask "$wanted"
    until answered "$wanted"; do sleep 1; done
    if [ "$reason" != ok ]; then
        say "not installed: $reason"
        event DrupeNotInstalled "drupe $version: $reason"
    else
        say "installed"
        # What the readiness probe looks for.
        : > /run/installed
        annotate unix:///run/drupe/drupe.sock
    fi
    shown=
    while :; do
        now=
        if [ -e "$state/switched" ] && on_node systemctl is-active -q drupe; then now=$(handlers); fi
        if [ "$now" != "$shown" ] || [ -z "$now" ]; then
            gone=$(no_handlers)
            # Of two members of one name the later one counts.
            if [ "$now$gone" = "" ] || patched merge "{\"metadata\":{\"labels\":{$(merged "$gone" "$now")}}}"; then
                [ "$now" = "$shown" ] || say "handlers: ${now:-none}"
                shown=$now
            fi
        fi
        sleep "$look_every"
    done
}

# merged GONE NOW: members of both, without those of GONE that are in NOW.
merged() {
    left=$2
    for member in $(printf %s "$1" | tr ',' ' '); do
        name=${member%:null}
        case $2 in *"$name:"*) ;; *) left="$left$member," ;; esac
    done
    printf %s "${left%,}"
}

remove_drupe() {
    if [ -e "$host$base" ]; then
        wanted="remove - $POD_UID"
        [ ! -s "$state/runtime" ] || annotate "$(cat "$state/runtime")"
        say "wants drupe gone from $NODE_NAME"
        ask "$wanted"
        # The end of this is no directory, and most often the end of this pod.
        while [ -e "$host$base" ] && ! answered "$wanted"; do sleep 1; done
        if [ -e "$host$base" ]; then
            say "not removed: $reason"
            event DrupeNotRemoved "$reason"
            while :; do sleep 3600; done
        fi
    fi
    say "removed"
    gone=$(no_handlers)
    # The last label is the one that has this pod here.
    until patched merge "{\"metadata\":{\"labels\":{$gone\"drupe.internal/node\":null}}}"; do sleep 5; done
    while :; do sleep 3600; done
}

trap 'exit 0' TERM INT
case ${1:-} in
    install) install_drupe & ;;
    remove) remove_drupe & ;;
    *) echo "usage: pod.sh install|remove" >&2; exit 2 ;;
esac
# A signal ends this at once, whatever the other waits for.
wait $!
