#!/usr/bin/env bash
# The Debian package on a node with systemd: what docs/install.md says of
# installing, restarting, upgrading and removing it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/node.sh"

apt() {
    in_node env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@" > "$work/apt.log" 2>&1 ||
        fail "apt-get $*: $(tail -n 20 "$work/apt.log")"
}

# alive: the pod's container is the one that was started, on the same kernel.
alive() {
    [ "$(machine_of "$pod")" = "$machine" ] || fail "the pod's machine is another"
    [ "$(in_node crictl ps -q)" = "$container" ] || fail "the pod's container does not run"
    local now
    now=$(uptime_in "$container")
    [ "$now" -ge "$uptime" ] || fail "the guest's uptime went from $uptime to $now s"
    uptime=$now
}

daemon() { in_node systemctl show -p MainPID --value drupe; }

is_restarted() { [ "$(daemon)" != "$1" ] && in_node systemctl is-active -q drupe; }

# package VERSION: drupe's package as if it were of another version.
package() {
    dpkg-deb -R "$out/drupe.deb" "$work/package"
    sed -i "s/^Version: .*/Version: $1/" "$work/package/DEBIAN/control"
    dpkg-deb --root-owner-group -Znone -b "$work/package" "$node/root/newer.deb" > /dev/null
    rm -r "$work/package"
}

node_unpack
cp "$out/drupe.deb" "$node/root/drupe.deb"
network_start
node_start

say "apt install: the service runs, and the node can run pods"
apt install /root/drupe.deb
in_node systemctl is-active -q drupe
in_node systemctl is-enabled -q drupe
in_node drupe check > "$work/last" || fail "drupe check: $(< "$work/last")"
in_node cp /usr/share/doc/drupe/crictl.yaml /etc/crictl.yaml
in_node crictl info > /dev/null

say "a pod by crictl"
start_registry
push "$out/drupe-image.tar" tools:1
image=$registry/tools:1
in_node crictl pull "$image" > /dev/null
cat > "$node/root/pod.json" << 'JSON'
{ "metadata": { "name": "web", "namespace": "default", "uid": "1" }, "log_directory": "/var/log/pods/web" }
JSON
cat > "$node/root/container.json" << JSON
{ "metadata": { "name": "c" }, "image": { "image": "$image" }, "command": ["sleep", "86400"], "log_path": "c.log" }
JSON
mkdir -p "$node/var/log/pods/web"
container=$(in_node crictl run --no-pull /root/container.json /root/pod.json)
pod=$(in_node crictl pods -q)
machine=$(machine_of "$pod")
uptime=$(uptime_in "$container")
grep -q 'default/web .* ready' <<< "$(in_node drupe pods)" || fail "drupe pods does not show the pod"

say "systemctl restart: the pod lives on"
before=$(daemon)
in_node systemctl restart drupe
is_restarted "$before" || fail "the daemon is the old one"
alive

say "kill -9 of the daemon: systemd starts it again, the pod lives on"
before=$(daemon)
in_node kill -KILL "$before"
eventually "the daemon to be back" is_restarted "$before"
alive

say "an upgrade: the new version serves, the configuration stays, the pod lives on"
echo "# changed by the operator" >> "$node/etc/drupe/config.yaml"
package 99.0
before=$(daemon)
apt install /root/newer.deb
is_restarted "$before" || fail "the daemon is the old one"
grep -q '^Version: 99.0' <<< "$(in_node dpkg -s drupe)" || fail "the version is another"
grep -q 'changed by the operator' "$node/etc/drupe/config.yaml"
alive

say "apt remove with a pod: it runs on; installed again, drupe takes it up"
apt remove drupe
grep -q 'pods run on' "$work/apt.log" || fail "apt remove says nothing of pods: $(< "$work/apt.log")"
[ ! -e "$node/usr/bin/drupe" ] || fail "the program is still there"
[ -e "$node/etc/drupe/config.yaml" ] || fail "the configuration is gone"
[ "$(machine_of "$pod")" = "$machine" ] || fail "the pod has ended"
apt purge drupe
[ -d "$node/var/lib/drupe" ] || fail "/var/lib/drupe went while a pod ran"
apt install /root/newer.deb
alive

say "drained, removed and purged: nothing is left"
in_node crictl rmp -fa > /dev/null
apt remove drupe
[ -e "$node/etc/drupe/config.yaml" ] || fail "the configuration is gone"
[ -d "$node/var/lib/drupe" ] || fail "/var/lib/drupe is gone"
! in_node systemctl is-active -q drupe || fail "the daemon runs"
apt purge drupe
left=$(in_node find / -xdev -path '*drupe*' ! -path '/proc/*' ! -path '/sys/*' ! -path '/root/*' \
    ! -path '/var/log/*' ! -path '/tmp/*')
[ -z "$left" ] || fail "left behind: $left"
! in_node pgrep -f drupe || fail "processes are left"
echo "passed in $SECONDS s"
