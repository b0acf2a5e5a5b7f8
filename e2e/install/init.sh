#!/usr/bin/env bash
# init.sh ROOT: first process of the node's namespaces. Gives ROOT what a
# machine's firmware and kernel would, and becomes systemd.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/../namespaces.sh"
root=$1
mount --make-rprivate /
mount --bind "$root" "$root"
cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755,nosuid dev dev
mount -t tmpfs -o mode=755 run run
shopt -s nullglob
# Files of the node's own: systemd sets owner and mode of what it takes for its
# console, which must not be this machine's.
for device in /dev/{null,zero,full,random,urandom,tty,fuse,kvm,kmsg,loop-control} /dev/loop[0-9]*; do
    [ ! -e "$device" ] || cp -a "$device" dev/
done
mkdir dev/net
cp -a /dev/net/tun dev/net/
cp -a /dev/null dev/console
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for n in 0:stdin 1:stdout 2:stderr; do
    ln -s "/proc/self/fd/${n%:*}" "dev/${n#*:}"
done

mount_groups sys/fs/cgroup
enter_root "$root"
exec env -i container=drupe-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd
