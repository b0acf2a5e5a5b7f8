//! What every cluster runs for its Services, as pods on the node: kube-proxy,
//! on the node's kernel and network, and CoreDNS in a microVM.

use anyhow::Result;
use serde_json::{Value, json};

use super::files::API_PORT;
use super::{Cluster, HANDLER, NODE_ADDRESS, images};
use crate::Server;
use crate::image::Image;
use crate::node::SUBNET_V4;

pub(super) const DNS_ADDRESS: &str = "10.96.0.10";
pub(super) const DOMAIN: &str = "cluster.local";

/// The namespace of what the cluster itself needs.
pub const SYSTEM: &str = "kube-system";

/// The images, which take seconds to make.
pub(super) struct Images {
    kube_proxy: Image,
    coredns: Image,
}

impl Images {
    pub fn make() -> Result<Self> {
        Ok(Self {
            kube_proxy: images::kube_proxy()?,
            coredns: images::coredns()?,
        })
    }
}

impl Cluster {
    /// Has the add-ons started, and does not wait for them.
    pub(super) fn start_addons(&self, images: &Images) -> Result<()> {
        let node = self.node()?;
        let kube_proxy = images::push(node, "kube-proxy", &images.kube_proxy)?;
        let coredns = images::push(node, "coredns", &images.coredns)?;
        let class = (node.server == Server::Drupe).then_some(HANDLER);
        let objects = [
            kube_proxy_objects(&kube_proxy),
            coredns_objects(&coredns, class),
        ]
        .concat();
        self.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": objects }))?;
        Ok(())
    }

    /// Waits until pods reach Services, by name and by address.
    pub fn wait_for_services(&self) -> Result<()> {
        let system = self.existing_namespace(SYSTEM);
        for what in ["daemonset/kube-proxy", "deployment/coredns"] {
            system.roll_out(what)?;
        }
        Ok(())
    }
}

fn object(api: &str, kind: &str, name: &str, rest: Value) -> Value {
    let mut object = json!({
        "apiVersion": api,
        "kind": kind,
        "metadata": { "name": name, "namespace": SYSTEM },
    });
    if let (Some(object), Value::Object(rest)) = (object.as_object_mut(), rest) {
        object.extend(rest);
    }
    object
}

/// A service account and the cluster role that it has.
fn account(name: &str, role: &str) -> [Value; 2] {
    let binding = json!({
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
        "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": SYSTEM }],
    });
    [
        object("v1", "ServiceAccount", name, json!({})),
        object(
            "rbac.authorization.k8s.io/v1",
            "ClusterRoleBinding",
            name,
            binding,
        ),
    ]
}

fn kube_proxy_objects(image: &str) -> Vec<Value> {
    let account_dir = "/var/run/secrets/kubernetes.io/serviceaccount";
    // By the API server's own address: its Service is what kube-proxy makes.
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "e2e", "cluster": {
            "server": format!("https://{NODE_ADDRESS}:{API_PORT}"),
            "certificate-authority": format!("{account_dir}/ca.crt"),
        }}],
        "users": [{ "name": "e2e", "user": { "tokenFile": format!("{account_dir}/token") } }],
        "contexts": [{ "name": "e2e", "context": { "cluster": "e2e", "user": "e2e" } }],
        "current-context": "e2e",
    });
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": SUBNET_V4,
        "clientConnection": { "kubeconfig": "/config/kubeconfig" },
        // Limits of the machine's kernel, not of the node's network.
        "conntrack": { "maxPerCore": 0, "min": 0 },
    });
    let container = json!({
        "name": "kube-proxy",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["--config=/config/config", "--hostname-override=$(NODE_NAME)"],
        "env": [{ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
        "securityContext": { "privileged": true },
        "volumeMounts": [{ "name": "config", "mountPath": "/config" }],
        "readinessProbe": { "httpGet": { "path": "/healthz", "port": 10256 }, "periodSeconds": 1 },
    });
    let labels = json!({ "k8s-app": "kube-proxy" });
    let daemon_set = json!({ "spec": {
        "selector": { "matchLabels": labels },
        "template": {
            "metadata": { "labels": labels },
            "spec": {
                "hostNetwork": true,
                "serviceAccountName": "kube-proxy",
                "priorityClassName": "system-node-critical",
                "tolerations": [{ "operator": "Exists" }],
                "containers": [container],
                "volumes": [{ "name": "config", "configMap": { "name": "kube-proxy" } }],
            },
        },
    }});
    let files = json!({ "data": {
        "config": config.to_string(),
        "kubeconfig": kubeconfig.to_string(),
    }});
    let mut objects = account("kube-proxy", "system:node-proxier").to_vec();
    objects.push(object("v1", "ConfigMap", "kube-proxy", files));
    objects.push(object("apps/v1", "DaemonSet", "kube-proxy", daemon_set));
    objects
}

fn coredns_objects(image: &str, class: Option<&str>) -> Vec<Value> {
    let corefile = format!(
        ".:53 {{\n  errors\n  health\n  ready\n  \
         kubernetes {DOMAIN} in-addr.arpa ip6.arpa {{\n    pods insecure\n    ttl 5\n  }}\n  \
         cache 5\n}}\n"
    );
    let role = json!({ "rules": [
        { "apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"] },
        { "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"] },
    ]});
    let probe = |path: &str, port: u16| json!({ "httpGet": { "path": path, "port": port } });
    let mut ready = probe("/ready", 8181);
    ready["periodSeconds"] = 1.into();
    let container = json!({
        "name": "coredns",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "resources": {
            "requests": { "cpu": "100m", "memory": "70Mi" },
            "limits": { "memory": "170Mi" },
        },
        "volumeMounts": [{ "name": "config", "mountPath": "/etc/coredns", "readOnly": true }],
        "ports": [
            { "name": "dns", "containerPort": 53, "protocol": "UDP" },
            { "name": "dns-tcp", "containerPort": 53, "protocol": "TCP" },
        ],
        "livenessProbe": probe("/health", 8080),
        "readinessProbe": ready,
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "add": ["NET_BIND_SERVICE"], "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
        },
    });
    let labels = json!({ "k8s-app": "kube-dns" });
    let deployment = json!({ "spec": {
        "selector": { "matchLabels": labels },
        "template": {
            "metadata": { "labels": labels },
            "spec": {
                "runtimeClassName": class,
                "serviceAccountName": "coredns",
                "priorityClassName": "system-cluster-critical",
                "dnsPolicy": "Default",
                "containers": [container],
                "volumes": [{ "name": "config", "configMap": { "name": "coredns" } }],
            },
        },
    }});
    let service = json!({ "spec": {
        "clusterIP": DNS_ADDRESS,
        "selector": labels,
        "ports": [
            { "name": "dns", "port": 53, "protocol": "UDP" },
            { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
        ],
    }});
    let mut objects = account("coredns", "system:coredns").to_vec();
    objects.extend([
        object(
            "rbac.authorization.k8s.io/v1",
            "ClusterRole",
            "system:coredns",
            role,
        ),
        object(
            "v1",
            "ConfigMap",
            "coredns",
            json!({ "data": { "Corefile": corefile } }),
        ),
        object("apps/v1", "Deployment", "coredns", deployment),
        object("v1", "Service", "kube-dns", service),
    ]);
    objects
}
