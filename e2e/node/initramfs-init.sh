#!/bin/busybox sh
# shellcheck shell=dash
#
# PID 1 until the node's root is there: a read-only file system under a layer
# in memory, so that every boot begins alike.
set -e
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
for module in /modules/*; do
    $b insmod "$module"
done
$b mount -t erofs -o ro /dev/vda /lower
$b mount -t tmpfs -o mode=0755 upper /upper
$b mkdir /upper/data /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /new
$b umount /proc
$b mount --move /dev /new/dev
exec $b switch_root /new /sbin/node-init
