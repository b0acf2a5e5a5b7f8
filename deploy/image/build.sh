#!/usr/bin/env bash
# build.sh OUT: drupe as an OCI image, an archive in the layout of the OCI image
# specification: what `make install` installs, crictl, and the scripts by which
# a DaemonSet puts all that on nodes (deploy/kubernetes). Beside it are busybox
# and curl of Debian for those scripts. The same inputs give the same bytes.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: build.sh OUT" >&2; exit 2; }
readonly SUITE=bookworm
here=$(cd "$(dirname "$0")" && pwd)
top=$here/../..
output=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir "$root"

# Debian's programs, kept under what they are made by.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/drupe/image
base=$cache/$(sha256sum "$here/build.sh" | cut -c1-24).tar
if [ ! -s "$base" ]; then
    mkdir -p "$cache"
    sources=/etc/apt/sources.list.d/debian.sources
    if ! grep -qs "$SUITE" "$sources"; then
        sources=$work/sources
        echo "deb http://deb.debian.org/debian $SUITE main" > "$sources"
    fi
    mmdebstrap --mode=root --variant=extract --format=tar --include=busybox-static,curl \
        "$SUITE" "$work/base.tar" - < "$sources" > "$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; exit 1; }
    mv "$work/base.tar" "$base.new"
    mv "$base.new" "$base"
fi
tar -xf "$base" -C "$root"
# What a program that asks the Kubernetes API needs; licences stay.
find "$root/usr/share" -mindepth 1 -maxdepth 1 ! -name doc -exec rm -rf {} +
find "$root/usr/share/doc" -type f ! -name copyright -delete
(cd "$root" && rm -rf boot home media mnt opt srv dev proc sys run var etc sbin usr/{local,games,include,src,sbin} usr/lib/*/gconv)
mkdir -p "$root"/{etc,dev,proc,sys,run,tmp,sbin,usr/sbin}
chroot "$root" /bin/busybox --install -s

DESTDIR=$root "$here/../install.sh" install > "$work/log"
rm -rf "$root"/usr/share/{man,bash-completion,zsh,fish}
install -D -m 644 "$here/../debian/copyright" "$root/usr/share/doc/drupe/copyright"
install -D -m 755 "$top/out/tools/crictl" "$root/usr/bin/crictl"
install -D -m 755 -t "$root/usr/share/drupe" "$here/pod.sh" "$here/node.sh"
install -m 644 -t "$root/usr/share/drupe" "$here/drupe-node.service"
# A version on a node is one content.
version=$("$top/out/bin/drupe" --version | cut -d ' ' -f 2)
content=$(cd "$root" && find usr/bin/drupe usr/bin/crictl usr/lib/drupe usr/lib/systemd usr/share/drupe -type f -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)
echo "$version-$content" > "$root/usr/share/drupe/version"

blobs=$work/image/blobs/sha256
mkdir -p "$blobs"
# Puts the file $1 among the blobs; prints "DIGEST SIZE".
blob() {
    local digest
    digest=$(sha256sum "$1" | cut -d ' ' -f 1)
    mv "$1" "$blobs/$digest"
    echo "$digest $(stat -c %s "$blobs/$digest")"
}
archive() { tar -C "$1" --sort=name --format=gnu --mtime=@0 --owner=0 --group=0 --numeric-owner -cf "$2" "${@:3}"; }

chmod 1777 "$root/tmp"
archive "$root" "$work/layer.tar" .
diff_id=$(sha256sum "$work/layer.tar" | cut -d ' ' -f 1)
gzip -n -6 "$work/layer.tar"
read -r layer layer_size < <(blob "$work/layer.tar.gz")
labels='"org.opencontainers.image.title": "drupe",
  "org.opencontainers.image.description": "A container runtime for Kubernetes in which every pod has a kernel of its own",
  "org.opencontainers.image.version": "'$version'",
  "org.opencontainers.image.licenses": "Apache-2.0 AND GPL-2.0-only AND LGPL-2.1-or-later"'
cat > "$work/config" << JSON
{ "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
  "config": { "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Entrypoint": ["/usr/share/drupe/pod.sh"],
  "Labels": { $labels } },
  "rootfs": { "type": "layers", "diff_ids": ["sha256:$diff_id"] } }
JSON
read -r config config_size < <(blob "$work/config")
cat > "$work/manifest" << JSON
{ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
  "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": "sha256:$config", "size": $config_size },
  "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "sha256:$layer", "size": $layer_size }],
  "annotations": { $labels } }
JSON
read -r manifest manifest_size < <(blob "$work/manifest")
cat > "$work/image/index.json" << JSON
{ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
  "manifests": [{ "mediaType": "application/vnd.oci.image.manifest.v1+json",
  "digest": "sha256:$manifest", "size": $manifest_size,
  "platform": { "architecture": "amd64", "os": "linux" },
  "annotations": { "org.opencontainers.image.ref.name": "$version" } }] }
JSON
echo '{ "imageLayoutVersion": "1.0.0" }' > "$work/image/oci-layout"
archive "$work/image" "$work/image.tar" oci-layout index.json blobs
mkdir -p "$(dirname "$output")"
mv "$work/image.tar" "$output"
echo "$output: $(cat "$root/usr/share/drupe/version"), $((layer_size / 1048576)) MiB"
