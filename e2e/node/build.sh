#!/usr/bin/env bash
# Builds the emulated node's system from Debian packages and links it into
# OUTDIR: kernel, initramfs and rootfs.erofs. A build is kept under the hash of
# this directory's files, so that a second run asks no network.
set -euo pipefail

readonly KERNEL_PACKAGE=linux-image-cloud-amd64
# What it takes to find the root file system; its own modprobe loads the rest.
readonly BOOT_MODULES=(virtio_pci virtio_blk erofs overlay)
# How long a system outlives its last use.
readonly KEEP_DAYS=7

[ $# -eq 1 ] || { echo "usage: build.sh OUTDIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/node
key=$(cat "$here"/{packages.txt,build.sh,initramfs-init.sh,init.sh} | sha256sum | cut -c1-24)

# Prints the packages of packages.txt.
packages() { grep -vE '^(#|$)' "$here/packages.txt"; }

# apt on this machine's lists, as if nothing were installed: what it downloads
# is whole.
download() {
    mkdir -p "$work/debs/partial"
    local kernel
    kernel=$(apt-cache depends "$KERNEL_PACKAGE" | awk '$1 == "Depends:" { print $2 }')
    [ -n "$kernel" ] || { echo "Debian's $KERNEL_PACKAGE names no kernel" >&2; return 1; }
    mapfile -t names < <(packages)
    apt-get -q -y --no-install-recommends --download-only \
        -o Dir::State::status=/dev/null -o Dir::Cache::archives="$work/debs" \
        -o APT::Sandbox::User=root -o Acquire::Retries=3 install "${names[@]}"
    (cd "$work/debs" && apt-get -q -o APT::Sandbox::User=root download "$kernel")
}

# Unpacks what was downloaded into $root, and does the few things that the
# packages' own scripts would.
unpack() {
    local dir package
    for dir in bin sbin lib lib64; do
        mkdir -p "$root/usr/$dir"
        ln -s "usr/$dir" "$root/$dir"
    done
    for package in "$work"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --keep-directory-symlink
    done
    rm -rf "$root"/usr/share/{doc,man,locale,info}
    cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
    cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
    for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
        ln -s xtables-nft-multi "$root/usr/sbin/$name"
    done
    ln -s mawk "$root/usr/bin/awk"
    ln -sf /proc/mounts "$root/etc/mtab"
    echo node > "$root/etc/hostname"
    echo "127.0.0.1 localhost node" > "$root/etc/hosts"
    install -D -m 0755 "$here/init.sh" "$root/sbin/node-init"
    mkdir -p "$root"/{drupe,proc,sys,dev,run,tmp}
}

# The modules $@ of kernel $version and what they need, in the order to load.
modules() {
    local module
    for module in "$@"; do
        modprobe -d "$root" -S "$version" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

build() {
    root=$work/root
    mkdir -p "$root" "$work/initramfs"/{bin,modules,proc,sys,dev,lower,upper,new} "$work/result"
    echo "node: downloading Debian packages"
    # An image of a machine may come without package lists.
    apt-cache show "$KERNEL_PACKAGE" > /dev/null 2>&1 || apt-get update -q > "$work/log" 2>&1 || true
    download > "$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; return 1; }
    echo "node: putting the system together"
    unpack
    version=$(cd "$root/lib/modules" && echo *)
    depmod -b "$root" "$version"

    install -m 0755 "$root/bin/busybox" "$work/initramfs/bin/busybox"
    install -m 0755 "$here/initramfs-init.sh" "$work/initramfs/init"
    local order=0 file
    while read -r file; do
        cp "$file" "$work/initramfs/modules/$(printf %02d "$order")-${file##*/}"
        order=$((order + 1))
    done < <(modules "${BOOT_MODULES[@]}")
    (cd "$work/initramfs" && find . | cpio -o -H newc -R 0:0 --quiet) > "$work/result/initramfs"

    mv "$root/boot/vmlinuz-$version" "$work/result/kernel"
    rm -rf "${root:?}/boot"
    mkfs.erofs -T0 --all-root "$work/result/rootfs.erofs" "$root" > "$work/log" 2>&1 ||
        { tail -n 30 "$work/log" >&2; return 1; }
}

if [ ! -d "$cache/$key" ]; then
    mkdir -p "$cache"
    exec 9> "$cache/lock"
    flock 9
fi
if [ ! -d "$cache/$key" ]; then
    begun=$SECONDS
    work=$(mktemp -d "$cache/new.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    build
    # Another checkout may run another system; one that none has asked for
    # lately is of no use.
    find "$cache" -mindepth 1 -maxdepth 1 -type d ! -path "$work" -mtime "+$KEEP_DAYS" -exec rm -rf {} +
    mv "$work/result" "$cache/$key"
    echo "node: built in $((SECONDS - begun)) s"
fi
touch "$cache/$key"
mkdir -p "$1"
for file in kernel initramfs rootfs.erofs; do
    ln -sf "$cache/$key/$file" "$1/$file"
done
