//! `make bench-cluster`: how long a pod takes from `kubectl create` to Ready,
//! on drupe and on containerd with runc, under the same kubelet.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::Server;
use e2e::cluster::{Cluster, HANDLER, Namespace};
use serde_json::json;

/// Each is measured twice, the second time in the other order.
const PODS: usize = 10;
/// What a kernel of its own may cost. Both were measured in one run, so that a
/// slow machine is no excuse.
const MOST: f64 = 1.5;
const READY_WITHIN: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for server in [
        Server::Drupe,
        Server::Containerd,
        Server::Containerd,
        Server::Drupe,
    ] {
        let times = measure(server)?;
        match server {
            Server::Drupe => ours.extend(times),
            Server::Containerd => theirs.extend(times),
        }
    }
    println!("kubectl create to Ready, ms: median (minimum to maximum)");
    let (ours, theirs) = (spread("drupe", ours), spread("containerd + runc", theirs));
    let ratio = ours / theirs;
    println!("ratio of the medians: {ratio:.2}");
    ensure!(ratio <= MOST, "it is to be {MOST} at most");
    Ok(())
}

fn spread(name: &str, mut times: Vec<Duration>) -> f64 {
    times.sort();
    let ms = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e3);
    let median = ms(times.get(times.len() / 2));
    println!(
        "{name:20} {median:7.0} ({:.0} to {:.0}), {} pods",
        ms(times.first()),
        ms(times.last()),
        times.len()
    );
    median
}

fn measure(server: Server) -> Result<Vec<Duration>> {
    let cluster = Cluster::start(server)?;
    let namespace = cluster.namespace("bench")?;
    let mut watch = Watch::start(&namespace)?;
    // The first pod finds nothing in any cache.
    pod(&namespace, &watch, server, "first")?;
    let times = (0..PODS)
        .map(|number| pod(&namespace, &watch, server, &format!("pod-{number}")))
        .collect::<Result<_>>()?;
    watch.stop()?;
    cluster.finish()?;
    Ok(times)
}

/// One pod, alone on its node but for the cluster's own; gone at the end.
fn pod(ns: &Namespace<'_>, watch: &Watch, server: Server, name: &str) -> Result<Duration> {
    let mut spec = json!({
        "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": "c",
            "image": e2e::node::BUSYBOX,
            "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1; done"],
            "resources": { "limits": { "memory": "128Mi" } },
        }],
    });
    if server == Server::Drupe {
        spec["runtimeClassName"] = json!(HANDLER);
    }
    let object = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name },
        "spec": spec,
    });
    let begun = Instant::now();
    ns.create(&object)?;
    let took = watch.until_ready(name)?.duration_since(begun);
    ns.kubectl(&["delete", "pod", name, "--wait=true"])?;
    Ok(took)
}

/// `kubectl get pods --watch`, whose every line has the time at which it came.
struct Watch {
    kubectl: Child,
    lines: Receiver<(Instant, String)>,
}

impl Watch {
    fn start(ns: &Namespace<'_>) -> Result<Self> {
        let format =
            "jsonpath={.metadata.name} {.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}";
        let mut kubectl = ns.spawn_kubectl(&["get", "pods", "--watch", "-o", format])?;
        let stdout = kubectl.stdout.take().context("kubectl's output")?;
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if send.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { kubectl, lines })
    }

    fn until_ready(&self, name: &str) -> Result<Instant> {
        let wanted = format!("{name} True");
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (at, line) = self
                .lines
                .recv_timeout(left)
                .with_context(|| format!("{name} was not ready in time"))?;
            if line == wanted {
                return Ok(at);
            }
        }
    }

    fn stop(&mut self) -> Result<()> {
        self.kubectl.kill().context("kubectl")?;
        self.kubectl.wait().context("kubectl")?;
        Ok(())
    }
}
