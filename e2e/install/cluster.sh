# shellcheck shell=bash disable=SC2154
#
# Kubernetes' control plane in the network of the node that node.sh has started,
# and the kubelet as a service in the node. For tests that source node.sh first.

readonly ADDRESS=192.0.2.1
readonly SERVICE=10.96.0.1

kubectl() { in_network "$out/kubernetes/kubectl" --kubeconfig "$work/admin.conf" "$@"; }

# sign NAME SUBJECT: NAME.key and NAME.crt by the cluster's authority.
sign() {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "$2" \
        -keyout "$work/pki/$1.key" -out "$work/pki/$1.csr" 2> /dev/null
    openssl x509 -req -in "$work/pki/$1.csr" -CA "$work/pki/ca.crt" -CAkey "$work/pki/ca.key" -CAcreateserial \
        -days 2 -out "$work/pki/$1.crt" -extfile <(echo "subjectAltName=DNS:$1,DNS:localhost,DNS:node-1,IP:127.0.0.1,IP:$ADDRESS,IP:$SERVICE") 2> /dev/null
}

# kubeconfig NAME SUBJECT FILE
kubeconfig() {
    sign "$1" "$2"
    cat > "$3" << YAML
apiVersion: v1
kind: Config
clusters: [{ name: c, cluster: { server: "https://$ADDRESS:443", certificate-authority-data: $(base64 -w 0 "$work/pki/ca.crt") } }]
users: [{ name: u, user: { client-certificate-data: $(base64 -w 0 "$work/pki/$1.crt"), client-key-data: $(base64 -w 0 "$work/pki/$1.key") } }]
contexts: [{ name: x, context: { cluster: c, user: u } }]
current-context: x
YAML
}

control_plane_start() {
    local pki=$work/pki bin=$out/kubernetes
    mkdir "$pki"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=cluster \
        -keyout "$pki/ca.key" -out "$pki/ca.crt" 2> /dev/null
    sign api /O=system:masters/CN=api
    sign tokens /CN=tokens
    kubeconfig admin /O=system:masters/CN=admin "$work/admin.conf"
    kubeconfig controllers /CN=system:kube-controller-manager "$work/controllers.conf"
    kubeconfig scheduler /CN=system:kube-scheduler "$work/scheduler.conf"
    in_network ip link add node0 type bridge
    in_network ip addr add "$ADDRESS/24" dev node0
    in_network ip link set node0 up
    # In place of kube-proxy: the API server listens on its service's address.
    in_network ip addr add "$SERVICE/32" dev lo
    spawn etcd "$bin/etcd" --data-dir "$work/etcd" --unsafe-no-fsync
    spawn api "$bin/kube-apiserver" --etcd-servers http://127.0.0.1:2379 --advertise-address "$ADDRESS" \
        --secure-port 443 --tls-cert-file "$pki/api.crt" --tls-private-key-file "$pki/api.key" \
        --client-ca-file "$pki/ca.crt" --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction \
        --allow-privileged --service-cluster-ip-range 10.96.0.0/16 \
        --service-account-key-file "$pki/tokens.crt" --service-account-signing-key-file "$pki/tokens.key" \
        --service-account-issuer https://kubernetes.default.svc.cluster.local \
        --kubelet-client-certificate "$pki/api.crt" --kubelet-client-key "$pki/api.key" \
        --kubelet-certificate-authority "$pki/ca.crt" --kubelet-preferred-address-types InternalIP
    eventually "the API server" kubectl get --raw /readyz
    spawn controllers "$bin/kube-controller-manager" --kubeconfig "$work/controllers.conf" --leader-elect=false \
        --use-service-account-credentials --service-account-private-key-file "$pki/tokens.key" --root-ca-file "$pki/ca.crt" \
        --cert-dir "$work/controllers"
    spawn scheduler "$bin/kube-scheduler" --kubeconfig "$work/scheduler.conf" --leader-elect=false
}

# The kubelet as kubeadm has it: flags in a file, the rest in another.
kubelet_install() {
    install -m 755 "$out/kubernetes/kubelet" "$node/usr/local/bin/kubelet"
    mkdir -p "$node/var/lib/kubelet/pki" "$node/etc/kubernetes"
    kubeconfig kubelet /O=system:nodes/CN=system:node:node-1 "$node/etc/kubernetes/kubelet.conf"
    sign serving /CN=node-1
    cp "$work"/pki/{ca.crt,serving.crt,serving.key} "$node/var/lib/kubelet/pki/"
    cat > "$node/var/lib/kubelet/config.yaml" << YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication:
  anonymous: { enabled: false }
  webhook: { enabled: false }
  x509: { clientCAFile: /var/lib/kubelet/pki/ca.crt }
authorization: { mode: AlwaysAllow }
tlsCertFile: /var/lib/kubelet/pki/serving.crt
tlsPrivateKeyFile: /var/lib/kubelet/pki/serving.key
cgroupDriver: cgroupfs
enforceNodeAllocatable: []
failSwapOn: false
# The machine that runs the tests may have version 1.
failCgroupV1: false
# However full the machine's disk is.
evictionHard: { memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%" }
imageGCHighThresholdPercent: 100
syncFrequency: 10s
nodeStatusUpdateFrequency: 2s
YAML
    echo "KUBELET_FLAGS=--node-ip=$ADDRESS --hostname-override=node-1" > "$node/var/lib/kubelet/flags.env"
    cat > "$node/etc/systemd/system/kubelet.service" << 'UNIT'
[Unit]
After=containerd.service
[Service]
EnvironmentFile=/var/lib/kubelet/flags.env
ExecStart=/usr/local/bin/kubelet --kubeconfig=/etc/kubernetes/kubelet.conf \
    --config=/var/lib/kubelet/config.yaml $KUBELET_FLAGS
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
UNIT
    in_node systemctl daemon-reload
    in_node systemctl enable -q --now kubelet
    eventually "the node to be ready" kubectl wait --for=condition=Ready --timeout=1s node/node-1
    eventually "the account that pods have" kubectl get serviceaccount default
}
