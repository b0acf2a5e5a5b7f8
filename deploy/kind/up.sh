#!/usr/bin/env bash
# up.sh KIND_NODE: a kind cluster whose worker runs drupe, from kind's image of a
# node (kindest/node:vX.Y.Z) and out/drupe-image.tar, which `make image` makes.
# Needs docker, kind, kubectl and skopeo. `kind delete cluster --name drupe` and
# `docker rm -f drupe-registry` undo it.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: up.sh KIND_NODE" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
archive=$here/../../out/drupe-image.tar
[ -e "$archive" ] || { echo "$archive is missing: run \`make image\`" >&2; exit 1; }
# Both runtimes of the worker pull from here, by this name.
registry=drupe-registry:5000
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

docker build --build-arg "KIND_NODE=$1" -t drupe-kind-node "$here"
kind create cluster --config "$here/cluster.yaml" --image drupe-kind-node
docker run -d --restart=always -p 127.0.0.1:5001:5000 --network kind --name drupe-registry registry:2
# It may not listen yet.
skopeo copy --retry-times 5 --dest-tls-verify=false "oci-archive:$archive" docker://127.0.0.1:5001/drupe:kind

for node in $(kind get nodes --name drupe); do
    docker exec -i "$node" sh -c "mkdir -p /etc/containerd/certs.d/$registry && cat > /etc/containerd/certs.d/$registry/hosts.toml" << TOML
[host."http://$registry"]
TOML
done

cp "$here"/../kubernetes/*.yaml "$work/"
sed -i "s|newName: .*|newName: $registry/drupe|; s|newTag: .*|newTag: kind|" "$work/kustomization.yaml"
echo "images: { registries: { '$registry': { plain_http: true } } }" >> "$work/config.yaml"
kubectl --context kind-drupe apply -k "$work"
kubectl --context kind-drupe label node drupe-worker drupe.internal/node=install --overwrite
kubectl --context kind-drupe wait --for='jsonpath={.metadata.labels.handler\.drupe\.internal/microvm}=true' \
    --timeout=10m node/drupe-worker
