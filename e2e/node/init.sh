#!/bin/sh
# PID 1 of the emulated node: makes it what an installed machine would be, runs
# the command that came on the second disk, says how it ended and powers off.
export PATH=/drupe/out/bin:/drupe/out/tools:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8

power_off() {
    busybox poweroff -f
    # The power goes while this waits.
    while :; do sleep 60; done
}

# The console is a file of the host's, which shows its end when a node ends
# without an answer.
fail() {
    echo "node: $*" > /dev/console
    power_off
}

# Runs a step without which there is no node.
must() {
    "$@" || fail "$* failed"
}

must mount -t proc proc /proc
must mount -t sysfs sys /sys
must mount -t cgroup2 cgroup /sys/fs/cgroup
must mount -t tmpfs -o mode=0755 run /run
must mount -t tmpfs -o mode=1777,size=90% tmp /tmp
must mkdir -p /dev/pts /dev/shm
must mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /dev/pts
must mount -t tmpfs -o mode=1777 shm /dev/shm
must mount -t erofs -o ro /dev/vdb /drupe
# What is mounted here shows in other mount namespaces, as where systemd runs.
must mount --make-rshared /
must ln -sfn /proc/self/fd /dev/fd
must ip link set lo up
must modprobe -a virtio_console kvm_amd tun loop
echo node > /proc/sys/kernel/hostname
read -r controllers < /sys/fs/cgroup/cgroup.controllers
for controller in $controllers; do
    echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control
done

for port in /sys/class/virtio-ports/*; do
    case $(cat "$port/name") in
        output) output=/dev/${port##*/} ;;
        status) status=/dev/${port##*/} ;;
    esac
done
if [ -z "$output" ] || [ -z "$status" ]; then
    fail "no ports to answer on"
fi

must cd /drupe
echo up > "$status" || fail "the node could not be said to be up"
setsid bash /drupe/command < /dev/null > "$output" 2>&1
code=$?
echo "$code" > "$status" || fail "the exit code $code could not be told"
power_off
