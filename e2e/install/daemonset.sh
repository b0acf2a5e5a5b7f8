#!/usr/bin/env bash
# The DaemonSet on a node whose kubelet has containerd: it makes it a node of
# drupe, upgrades it, goes back by itself from what does not work, and removes
# itself without a trace.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/node.sh"
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/cluster.sh"
deploy=$install_tests/../../deploy

# variant NAME SCRIPT [OPTION...]: pushes the image as NAME after SCRIPT has
# changed its files, in the directory that they are in, and with options of
# `umoci config`.
variant() {
    local layout=$work/variant files=$work/variant-files
    mkdir "$layout"
    tar -xf "$out/drupe-image.tar" -C "$layout"
    umoci unpack --image "$layout:$image_version" "$files" > "$work/last" 2>&1 || fail "umoci: $(< "$work/last")"
    (cd "$files/rootfs" && eval "$2")
    umoci repack --image "$layout:$image_version" "$files" > "$work/last" 2>&1 || fail "umoci: $(< "$work/last")"
    [ $# -eq 2 ] || umoci config --image "$layout:$image_version" "${@:3}"
    in_network skopeo copy --quiet --insecure-policy --dest-tls-verify=false \
        "oci:$layout:$image_version" "docker://$registry/$1"
    rm -rf "$layout" "$files"
}

# deploy TAG [CONFIGURATION]: as a user's overlay would.
deploy() {
    local overlay=$work/overlay
    mkdir -p "$overlay"
    cp "$deploy"/kubernetes/*.yaml "$overlay/"
    printf '%s\n' "${2:-}" >> "$overlay/config.yaml"
    sed -i "s|newName: .*|newName: $registry/drupe|; s|newTag: .*|newTag: \"$1\"|" "$overlay/kustomization.yaml"
    kubectl apply -k "$overlay" > /dev/null
}

# Files of the node, with what is in them: all but logs, images, and what the
# kubelet and containerd keep for themselves.
files_of_node() {
    (cd "$node" && find . -xdev \( -path ./var/log -o -path ./var/lib/containerd -o -path ./var/lib/kubelet \
        -o -path ./var/lib/cni -o -path ./tmp -o -path ./var/lib/systemd -o -path ./root \
        -o -path ./var/cache -o -path ./var/tmp -o -path ./proc -o -path ./sys -o -path ./dev -o -path ./run \) -prune \
        -o -printf '%y %m %p %l\n' -a -type f -exec sha256sum {} +) | LC_ALL=C sort
}

runtime_of_node() { kubectl get node node-1 -o 'jsonpath={.status.nodeInfo.containerRuntimeVersion}'; }
runs_on() { [[ "$(runtime_of_node)" == $1://* ]]; }
label_of() { kubectl get node node-1 -o "jsonpath={.metadata.labels.$1}"; }
has_label() { [ "$(label_of "$1")" = "$2" ]; }
log_of() { kubectl -n drupe-system logs -l "app=drupe-$1" --tail=50 --prefix=false; }
log_says() { grep -q "$2" <<< "$(log_of "$1")"; }
service() { in_node systemctl show -p "$2" --value "$1"; }
is_stopped() { [ "$(service "$1" ActiveState)" = inactive ]; }
version_of_node() { in_node readlink /opt/drupe/current; }
# shellcheck disable=SC2053
is_version() { [[ "$(version_of_node)" == $1 ]]; }
daemon_is() { [ "$(in_node readlink "/proc/$(service drupe MainPID)/exe")" = "/opt/drupe/$1/bin/drupe" ]; }
has_event() { grep -q "DrupeNotInstalled.*$1" <<< "$(kubectl get events -n default)"; }
restarts_of() { kubectl get pod "$1" -o 'jsonpath={.status.containerStatuses[0].restartCount}'; }
ready_installers() { [ "$(kubectl get daemonset -n drupe-system drupe-install -o 'jsonpath={.status.numberReady}')" = "$1" ]; }
# What changes when a pod does not live on.
life_of() { kubectl get pod "$1" -o "jsonpath={.status.containerStatuses[0]['containerID','restartCount']}"; }

annotation_is() {
    [ "$(kubectl get node node-1 -o 'jsonpath={.metadata.annotations.kubeadm\.alpha\.kubernetes\.io/cri-socket}')" = "$1" ]
}

# kill_until COMMAND...: kills node.sh on the node again and again, five times at
# most, and waits for the command to succeed.
kill_until() {
    local killed=0 begun=$SECONDS main
    until "$@"; do
        [ $((SECONDS - begun)) -lt "$WITHIN" ] || fail "waited $WITHIN s for $*"
        sleep 0.5
        main=$(service drupe-node MainPID)
        if [ "$killed" -lt 5 ] && [ "${main:-0}" != 0 ] && in_node kill -KILL "$main"; then killed=$((killed + 1)); fi
    done
    [ "$killed" -gt 0 ] || fail "node.sh was not killed"
}

# pod NAME EXTRA: a pod that runs the image's shell.
pod() {
    kubectl apply -f - > /dev/null << YAML
apiVersion: v1
kind: Pod
metadata: { name: $1 }
spec:
  $2
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: $registry/tools:1
    command: [sleep, "86400"]
YAML
}
kernel_of() { kubectl exec "$1" -- uname -r; }
ready() {
    kubectl wait --for=condition=Ready "pod/$1" --timeout=60s > /dev/null ||
        fail "pod $1: $(kubectl describe pod "$1" | tail -n 12)"
}

node_unpack
network_start
node_start
start_registry
image_version=$(tar -xOf "$out/drupe-image.tar" index.json | sed -n 's/.*ref.name": "\([^"]*\)".*/\1/p')
push "$out/drupe-image.tar" drupe:one
push "$out/drupe-image.tar" tools:1
variant pause:1 : --config.entrypoint sleep --config.cmd infinity
control_plane_start

say "a node with containerd"
# A machine for tests may let nobody be spared by the OOM killer.
in_node sh -c 'mkdir -p /etc/containerd && containerd config default > /etc/containerd/config.toml'
sed -i "s|sandbox_image = .*|sandbox_image = \"$registry/pause:1\"|; s|bin_dir = .*|bin_dir = \"/usr/lib/cni\"|
    s|restrict_oom_score_adj = .*|restrict_oom_score_adj = true|" "$node/etc/containerd/config.toml"
in_node systemctl restart containerd
kubelet_install
runs_on containerd || fail "the node has $(runtime_of_node)"
pod before ""
ready before
[ "$(kernel_of before)" = "$(uname -r)" ] || fail "a pod of containerd has a kernel of its own"

say "the API server takes the manifests"
kubectl create namespace drupe-system --save-config > /dev/null
kubectl apply -k "$deploy/kubernetes" --dry-run=server > "$work/last"
kubectl delete namespace drupe-system > /dev/null
kubectl annotate node node-1 kubeadm.alpha.kubernetes.io/cri-socket=unix:///run/containerd/containerd.sock > /dev/null
files_of_node > "$work/files-before"
[ "$(wc -l < "$work/files-before")" -gt 5000 ] || fail "hardly a file is compared"

say "a version that does not start: containerd stays, and its pods"
variant drupe:broken 'printf "#!/bin/sh\nexit 3\n" > usr/bin/drupe; echo broken > usr/share/drupe/version'
deploy broken
kubectl label node node-1 drupe.internal/node=install > /dev/null
eventually "an event of the node" has_event 'the daemon does not start'
eventually "the installer to say so" log_says install 'the daemon does not start'
runs_on containerd || fail "the node has $(runtime_of_node)"
[ "$(restarts_of before)" = 0 ] || fail "the pod from before was restarted"
[ -z "$(label_of 'handler\.drupe\.internal/microvm')" ] || fail "the node has a label of a handler"

say "one whose machines do not start: the same"
variant drupe:no-machine 'printf "#!/bin/sh\nexit 3\n" > usr/lib/drupe/drupe-vmm; echo no-machine > usr/share/drupe/version'
deploy no-machine
eventually "an event of the node" has_event 'a pod does not start'
runs_on containerd || fail "the node has $(runtime_of_node)"
[ "$(restarts_of before)" = 0 ] || fail "the pod from before was restarted"

say "one that cannot pull the DaemonSet's image: the node goes back to containerd"
mkdir -p "/proc/$init/root/run/systemd/system/drupe-node.service.d"
printf '[Service]\nEnvironment=DRUPE_SWITCH_WITHIN=10\n' > "/proc/$init/root/run/systemd/system/drupe-node.service.d/test.conf"
deploy one "images: { registries: { '$registry': { plain_http: false } } }"
eventually "an event of the node" has_event 'has not brought up the DaemonSet'
eventually "the node to have containerd" runs_on containerd
eventually "the installer to say so" log_says install 'has not brought up'
ready before
[ "$(kernel_of before)" = "$(uname -r)" ] || fail "the pod has a kernel of its own"
! in_node systemctl is-active -q drupe || fail "drupe runs"
rm "/proc/$init/root/run/systemd/system/drupe-node.service.d/test.conf"

say "one that works: the node becomes a node of drupe, through a power failure and kills of the installer"
deploy one
eventually "the switch to have stopped the kubelet" is_stopped kubelet
node_power_off
node_start
kill_until runs_on drupe
eventually "the annotation of kubeadm" annotation_is unix:///run/drupe/drupe.sock
eventually "the handlers' labels" has_label 'handler\.drupe\.internal/microvm' true
has_label 'handler\.drupe\.internal/host' true || fail "no label of the handler host"
has_label 'machine\.drupe\.internal/microvm' uml || fail "no label of the machine of microvm"
has_label 'machine\.drupe\.internal/host' '' || fail "a label of a machine that is none"
eventually "the installer to say so" log_says install installed
[ -z "$(in_node crictl --config /dev/null -r unix:///run/containerd/containerd.sock pods -q)" ] || fail "pods are left in containerd"

! kubectl --as system:serviceaccount:drupe-system:drupe-node label node node-1 of-another=node > "$work/last" 2>&1 ||
    fail "the account of the DaemonSet may change nodes that it is not on"
grep -q 'no node but its own' "$work/last" || fail "denied for another reason: $(< "$work/last")"

say "a pod with the RuntimeClass has a kernel of its own; the one from before runs again"
pod later "runtimeClassName: microvm"
ready later
kernel=$(kernel_of later)
[[ "$kernel" == *-drupe ]] || fail "the kernel is $kernel"
ready before
kernel=$(kernel_of before)
[[ "$kernel" == *-drupe ]] || fail "the kernel is $kernel"

say "an upgrade: the new version serves, pods live on"
alive=$(life_of later)
variant drupe:two 'printf x >> usr/bin/drupe; echo two > usr/share/drupe/version'
deploy two
eventually "the other version" is_version 'versions/two-*'
eventually "the installer to say so" log_says install 'installed'
eventually "the daemon of the other version" daemon_is "$(version_of_node)"
[ "$(life_of later)" = "$alive" ] || fail "the pod was restarted: $alive became $(life_of later)"
kubectl exec later -- true

say "an upgrade to a version that does not start: the one before serves again, pods live on"
second=$(version_of_node)
variant drupe:broken2 'printf "#!/bin/sh\nexit 3\n" > usr/bin/drupe; echo broken2 > usr/share/drupe/version'
deploy broken2
eventually "an event of the node" has_event 'drupe broken2.*the daemon does not start'
[ "$(version_of_node)" = "$second" ] || fail "the version is $(version_of_node)"
daemon_is "$second" || fail "the daemon is another"
[ "$(life_of later)" = "$alive" ] || fail "the pod was restarted: $alive became $(life_of later)"
kubectl exec later -- true
ready_installers 0 || fail "the DaemonSet's pod is ready"
deploy two
eventually "the installer to be ready" ready_installers 1

say "label the node for removal: containerd is back, and nothing is left"
kubectl delete pod later > /dev/null
kubectl label node node-1 drupe.internal/node=remove --overwrite > /dev/null
kill_until runs_on containerd
eventually "the label to be gone" has_label 'drupe\.internal/node' ''
annotation_is unix:///run/containerd/containerd.sock || fail "the node's annotation is still of drupe"
[ -z "$(label_of 'handler\.drupe\.internal/microvm')" ] || fail "the node has a label of a handler"
[ -z "$(label_of 'machine\.drupe\.internal/microvm')" ] || fail "the node has a label of a machine"
ready before
[ "$(kernel_of before)" = "$(uname -r)" ] || fail "the pod has a kernel of its own"
files_of_node > "$work/files-after"
diff "$work/files-before" "$work/files-after" > "$work/last" || fail "files differ: $(< "$work/last")"
[ ! -e "/proc/$init/root/run/drupe" ] || fail "/run/drupe is left"
! in_node pgrep -f 'drupe|crictl' || fail "processes are left"
kubectl delete -k "$work/overlay" > /dev/null
echo "passed in $SECONDS s"
