//! Services, names and what reaches pods through them.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Namespace, images};
use e2e::eventually;
use serde_json::{Value, json};

use crate::{busybox, idle_pod, pod};

/// The events of a Service's change reach kube-proxy and CoreDNS by watches.
const KNOWN_WITHIN: Duration = Duration::from_secs(30);

const REPLICAS: usize = 3;

/// nginx that says its pod's name, ends in peace and is seen to end before.
fn web(image: &str, version: &str) -> Value {
    let page = "echo $VERSION $(hostname) > /var/www/index.html && exec nginx -g 'daemon off;'";
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": "web" },
        "spec": {
            "replicas": REPLICAS,
            "selector": { "matchLabels": { "app": "web" } },
            "strategy": { "rollingUpdate": { "maxUnavailable": 0, "maxSurge": 1 } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [{
                    "name": "nginx",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", page],
                    "env": [{ "name": "VERSION", "value": version }],
                    "readinessProbe": { "httpGet": { "port": 80 }, "periodSeconds": 1 },
                    // Until nobody is sent to it any more.
                    "lifecycle": { "preStop": { "sleep": { "seconds": 3 } } },
                }]},
            },
        },
    })
}

fn service(name: &str, extra: Value) -> Value {
    let mut spec = json!({ "selector": { "app": "web" }, "ports": [{ "port": 80 }] });
    if let (Some(spec), Value::Object(extra)) = (spec.as_object_mut(), extra) {
        spec.extend(extra);
    }
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name }, "spec": spec })
}

/// The Deployment `web`, a Service of that name and a headless one.
fn start_web(ns: &Namespace<'_>) -> Result<String> {
    ns.cluster().wait_for_services()?;
    let image = images::nginx(ns.node()?)?;
    ns.apply(&service("web", json!({})))?;
    ns.apply(&service("each", json!({ "clusterIP": "None" })))?;
    ns.apply(&web(&image, "one"))?;
    ns.roll_out("deployment/web")?;
    Ok(image)
}

pub fn services_are_reached_by_name_and_address(ns: &Namespace<'_>) -> Result<()> {
    start_web(ns)?;
    ns.apply(&idle_pod("client"))?;
    ns.wait("pod/client", "condition=Ready")?;
    let address = ns.field("service/web", "{.spec.clusterIP}")?;
    let full = format!("web.{}.svc.cluster.local", ns.name);
    let shorter = format!("web.{}", ns.name);
    for host in ["web", &shorter, &full, &address] {
        eventually(&format!("{host} to answer"), KNOWN_WITHIN, || {
            let page = get(ns, &format!("http://{host}/"))?;
            ensure!(page.starts_with("one web-"), "{page:?}");
            Ok::<_, anyhow::Error>(())
        })?;
    }

    let pods = names(ns, "{.items[*].metadata.name}")?;
    let mut answered = BTreeSet::new();
    eventually("every endpoint to answer", KNOWN_WITHIN, || {
        let page = get(ns, "http://web/")?;
        let name = page.strip_prefix("one ").context(page.clone())?;
        answered.insert(name.to_owned());
        ensure!(answered == pods, "{answered:?} of {pods:?}");
        Ok::<_, anyhow::Error>(())
    })?;

    let addresses = names(ns, "{.items[*].status.podIP}")?;
    ensure!(addresses.len() == REPLICAS, "{addresses:?}");
    let headless = format!("each.{}.svc.cluster.local", ns.name);
    eventually("the headless Service's name", KNOWN_WITHIN, || {
        let said = ns.kubectl(&["exec", "client", "--", "nslookup", &headless])?;
        // The server's own address comes before.
        let (_, found) = said.split_once("Name:").context(said.clone())?;
        let words = found.split_whitespace();
        let found: BTreeSet<String> = words
            .filter(|word| word.parse::<Ipv4Addr>().is_ok())
            .map(str::to_owned)
            .collect();
        ensure!(found == addresses, "{found:?} of {addresses:?}: {said}");
        Ok::<_, anyhow::Error>(())
    })
}

/// Words of a field of the web pods.
fn names(ns: &Namespace<'_>, path: &str) -> Result<BTreeSet<String>> {
    let output = format!("jsonpath={path}");
    let words = ns.kubectl(&["get", "pods", "-l", "app=web", "-o", &output])?;
    Ok(words.split_whitespace().map(str::to_owned).collect())
}

fn get(ns: &Namespace<'_>, url: &str) -> Result<String> {
    ns.kubectl(&[
        "exec", "client", "--", "timeout", "5", "wget", "-q", "-O-", url,
    ])
}

pub fn a_pod_asks_the_api_server_as_itself(ns: &Namespace<'_>) -> Result<()> {
    ns.cluster().wait_for_services()?;
    let image = images::with_program(ns.node()?, "kubectl")?;
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let whoami = "auth whoami -o jsonpath='{.status.userInfo.username}'";
    // What it finds in its environment, and by name.
    let script = format!(
        "kubectl {whoami} && echo && kubectl --server https://kubernetes.default \
         --certificate-authority {account}/ca.crt --token $(cat {account}/token) {whoami}"
    );
    let mut client = busybox("client", &script);
    client["image"] = json!(image);
    ns.apply(&pod(
        "client",
        json!({ "restartPolicy": "Never", "containers": [client] }),
    ))?;
    ns.wait("pod/client", "jsonpath={.status.phase}=Succeeded")
        .with_context(|| ns.kubectl(&["logs", "client"]).unwrap_or_default())?;
    let said = ns.kubectl(&["logs", "client"])?;
    let itself = format!("system:serviceaccount:{}:default", ns.name);
    ensure!(said == format!("{itself}\n{itself}"), "{said:?}");
    Ok(())
}

/// A pod that asks the Service for pages, one after the other.
pub struct Load<'a> {
    ns: &'a Namespace<'a>,
    image: String,
    log: PathBuf,
}

impl<'a> Load<'a> {
    /// nginx and the pod `load`, which has been answered.
    pub fn start(ns: &'a Namespace<'a>) -> Result<Self> {
        let image = start_web(ns)?;
        let script = "until timeout 5 wget -q -O- http://web/; do sleep 1; done; echo begun; \
                      while :; do timeout 5 wget -q -O- http://web/ || echo failed: $(date); done";
        let client = busybox("load", script);
        ns.apply(&pod(
            "load",
            json!({ "containers": [client], "terminationGracePeriodSeconds": 1 }),
        ))?;
        ns.wait("pod/load", "condition=Ready")?;
        let uid = ns.field("pod/load", "{.metadata.uid}")?;
        let log = ns.cluster().pod_logs();
        let log = log.join(format!("{}_load_{uid}/load/0.log", ns.name));
        let load = Self { ns, image, log };
        load.answered("one ", 1)?;
        Ok(load)
    }

    /// Waits until there are `more` pages that begin like this than now.
    pub fn answered(&self, page: &str, more: usize) -> Result<()> {
        let before = self.count(page)?;
        eventually("requests to be answered", KNOWN_WITHIN, || {
            let now = self.count(page)?;
            ensure!(now >= before + more, "{now} after {before}");
            Ok::<_, anyhow::Error>(())
        })
        .with_context(|| {
            let end = ["logs", "load", "--tail=20"];
            self.ns
                .kubectl(&end)
                .unwrap_or_else(|error| error.to_string())
        })
    }

    /// Lines of the log that begin like this.
    fn count(&self, beginning: &str) -> Result<usize> {
        let log = fs::read_to_string(&self.log).context("the log of the load")?;
        // "TIME STREAM FULL TEXT": the kubelet reads it only while drupe runs.
        let text = |line| str::splitn(line, 4, ' ').nth(3);
        let is_wanted = |line: &&str| line.starts_with(beginning);
        Ok(log.lines().filter_map(text).filter(is_wanted).count())
    }

    /// Fails if a request has failed since the first was answered.
    pub fn finish(self) -> Result<()> {
        let log = self.ns.kubectl(&["logs", "load"])?;
        let (_, log) = log.split_once("begun\n").context("not begun")?;
        let is_page = |line: &&str| line.starts_with("one web-") || line.starts_with("two web-");
        let (pages, others): (Vec<_>, Vec<_>) = log.lines().partition(is_page);
        ensure!(
            others.is_empty(),
            "beside {} pages:\n{}",
            pages.len(),
            others.join("\n")
        );
        println!("  {} requests answered, none failed", pages.len());
        Ok(())
    }

    pub fn update(&self) -> Result<()> {
        self.ns.apply(&web(&self.image, "two"))?;
        self.ns.roll_out("deployment/web")
    }
}

pub fn an_update_fails_no_request(ns: &Namespace<'_>) -> Result<()> {
    let load = Load::start(ns)?;
    load.update()?;
    load.answered("two ", 10)?;
    load.finish()
}

pub fn a_daemonset_serves_on_the_nodes_network(ns: &Namespace<'_>) -> Result<()> {
    let daemon_set = |text: &str| {
        let script = format!(
            "mkdir -p /www && echo {text} > /www/index.html && \
             exec httpd -f -p 192.0.2.1:8088 -h /www"
        );
        let mut server = busybox("agent", &script);
        server["readinessProbe"] = json!({ "httpGet": { "port": 8088 }, "periodSeconds": 1 });
        json!({
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": { "name": "agent" },
            "spec": {
                "selector": { "matchLabels": { "app": "agent" } },
                "template": {
                    "metadata": { "labels": { "app": "agent" } },
                    "spec": {
                        "hostNetwork": true,
                        "containers": [server],
                        "terminationGracePeriodSeconds": 1,
                    },
                },
            },
        })
    };
    ns.apply(&idle_pod("client"))?;
    ns.wait("pod/client", "condition=Ready")?;
    // The second takes the port that the first had.
    for text in ["one", "two"] {
        ns.apply(&daemon_set(text))?;
        ns.roll_out("daemonset/agent")?;
        let page = get(ns, "http://192.0.2.1:8088/")?;
        ensure!(page == text, "{page:?} instead of {text:?}");
    }
    Ok(())
}
