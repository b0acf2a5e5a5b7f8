//! What Prometheus scrapes from the daemon, and that the dashboard asks for
//! nothing else.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::{Node, eventually, http};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tonic::Code;

use crate::{on_drupe, pod_refused, refused, shares_the_hosts_kernel};

pub const ADDRESS: &str = "127.0.0.1:9750";

/// The text of one scrape.
pub struct Scrape(String);

impl Scrape {
    pub fn of(node: &Node) -> Result<Self> {
        let answer = node.netns.run(|| http::get(ADDRESS, "/metrics"))?;
        ensure!(answer.status == 200, "status {}", answer.status);
        let kind = answer.header("content-type").context("no content type")?;
        ensure!(kind.starts_with("application/openmetrics-text;"), "{kind}");
        let text = String::from_utf8(answer.body)?;
        ensure!(text.ends_with("# EOF\n"), "it is cut off: {text}");
        Ok(Self(text))
    }

    /// Names of samples with their labels, and values.
    fn samples(&self) -> impl Iterator<Item = (&str, f64)> {
        let lines = self.0.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(|line| {
            let (sample, value) = line.rsplit_once(' ')?;
            Some((sample, value.parse().ok()?))
        })
    }

    /// The one sample of this name that has all these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let mut found = self.samples().filter(|(sample, _)| {
            let of_name = sample.strip_prefix(name);
            of_name.is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
                && labels.iter().all(|(key, value)| {
                    let label = format!("{key}=\"{value}\"");
                    sample.contains(&format!("{{{label}")) || sample.contains(&format!(",{label}"))
                })
        });
        let (_, value) = found
            .next()
            .with_context(|| format!("no {name} with {labels:?} in:\n{}", self.0))?;
        ensure!(found.next().is_none(), "{name} with {labels:?} is no one");
        Ok(value)
    }

    fn names(&self) -> BTreeSet<&str> {
        self.samples()
            .map(|(sample, _)| sample.split('{').next().unwrap_or_default())
            .collect()
    }
}

fn with_metrics() -> Result<Node> {
    let node = Node::builder()
        .config(|config| config["metrics"] = json!({ "address": ADDRESS }))
        .start()?;
    Ok(node)
}

#[test]
fn a_pods_life_is_scraped_as_it_was() -> Result<()> {
    on_drupe(with_metrics()?, |node| {
        let microvm = ("handler", "microvm");
        let before = Scrape::of(node)?;
        assert_eq!(
            before.value("drupe_pods", &[("phase", "ready"), microvm])?,
            0.0
        );
        let starts = [microvm, ("outcome", "started")];
        assert_eq!(before.value("drupe_pod_starts_total", &starts)?, 0.0);
        let stopped = [("reason", "stopped")];
        assert_eq!(before.value("drupe_machine_exits_total", &stopped)?, 0.0);
        assert_eq!(before.value("drupe_image_pull_bytes_total", &[])?, 0.0);

        node.pull_busybox()?;
        let begun = std::time::Instant::now();
        let pod = node.run_pod("scraped")?;
        let took = begun.elapsed().as_secs_f64();
        let container = pod.start_idle("c")?;
        let over = pod.start("over", &["true"])?;
        over.wait_exit()?;

        let running = Scrape::of(node)?;
        let ready = [("phase", "ready"), microvm];
        assert_eq!(running.value("drupe_pods", &ready)?, 1.0);
        let machine = [microvm, ("machine", e2e::Machine::under_test()?.name())];
        assert_eq!(running.value("drupe_machine_pods", &machine)?, 1.0);
        assert_eq!(running.value("drupe_handler_usable", &machine)?, 1.0);
        for state in ["running", "exited"] {
            assert_eq!(
                running.value("drupe_containers", &[("state", state)])?,
                1.0,
                "{state}"
            );
        }
        assert_eq!(running.value("drupe_pod_starts_total", &starts)?, 1.0);
        // The timeline that CRI shows, in seconds.
        let timeline = e2e::pod::timeline(node, &pod.id)?;
        ensure!(!timeline.is_empty(), "no timeline");
        for phase in [
            "netns",
            "scratch",
            "cni",
            "vmm",
            "boot",
            "redirect",
            "cgroup",
            "configure",
        ] {
            let labels = [("phase", phase), microvm];
            let count = running.value("drupe_pod_start_phase_seconds_count", &labels)?;
            assert_eq!(count, 1.0, "{phase}");
            let seconds = running.value("drupe_pod_start_phase_seconds_sum", &labels)?;
            let shown: f64 = timeline
                .iter()
                .filter(|part| part.name == phase)
                .map(|part| part.duration.as_secs_f64())
                .sum();
            ensure!(
                (seconds - shown).abs() < 1e-6,
                "{phase}: {seconds} s instead of {shown} s"
            );
        }
        let total = [("phase", "total"), microvm];
        let seconds = running.value("drupe_pod_start_phase_seconds_sum", &total)?;
        ensure!(seconds > 0.0 && seconds <= took, "{seconds} of {took} s");
        let run = [("method", "RunPodSandbox"), ("code", "OK")];
        assert_eq!(
            running.value("drupe_cri_requests_seconds_count", &run)?,
            1.0
        );
        let waited = running.value("drupe_cri_requests_seconds_sum", &run)?;
        ensure!(waited >= seconds && waited <= took, "{waited} of {took} s");
        let pulled = [("outcome", "pulled")];
        assert_eq!(running.value("drupe_image_pulls_total", &pulled)?, 1.0);
        let bytes = running.value("drupe_image_pull_bytes_total", &[])?;
        let layers = layer_bytes(node)?;
        ensure!(bytes == layers, "{bytes} bytes of {layers}");
        ensure!(
            !running.0.contains(&pod.id) && !running.0.contains(&container.id),
            "a pod has a series of its own"
        );

        pod.stop()?;
        let held = Scrape::of(node)?;
        let of_stopped = [("phase", "stopped"), microvm];
        assert_eq!(held.value("drupe_pods", &of_stopped)?, 1.0);
        assert_eq!(held.value("drupe_machine_exits_total", &stopped)?, 1.0);
        pod.remove()?;
        // Again, for what is here already.
        node.pull_busybox()?;
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let gone = node.cri()?.pod_sandbox_status(request);
        refused(gone, Code::NotFound, &["not found"])?;

        let after = Scrape::of(node)?;
        for phase in ["ready", "stopped", "removing"] {
            let labels = [("phase", phase), microvm];
            assert_eq!(after.value("drupe_pods", &labels)?, 0.0, "{phase}");
        }
        for state in ["created", "running", "exited"] {
            let labels = [("state", state)];
            assert_eq!(after.value("drupe_containers", &labels)?, 0.0, "{state}");
        }
        assert_eq!(after.value("drupe_pod_starts_total", &starts)?, 1.0);
        assert_eq!(after.value("drupe_machine_exits_total", &stopped)?, 1.0);
        let current = [("outcome", "up-to-date")];
        assert_eq!(after.value("drupe_image_pulls_total", &current)?, 1.0);
        assert_eq!(after.value("drupe_image_pull_bytes_total", &[])?, bytes);
        let missed = [("method", "PodSandboxStatus"), ("code", "NotFound")];
        assert_eq!(
            after.value("drupe_cri_requests_seconds_count", &missed)?,
            1.0
        );
        Ok(())
    })
}

/// What the registry has of busybox's layers.
fn layer_bytes(node: &Node) -> Result<f64> {
    let status = node.cri()?.image_status(ImageStatusRequest {
        image: Some(ImageSpec {
            image: e2e::node::BUSYBOX.to_owned(),
            ..Default::default()
        }),
        verbose: true,
    })?;
    let info: Value = serde_json::from_str(status.info.get("info").context("no information")?)?;
    let layers = info["layers"].as_array().context("no layers")?;
    let sizes = layers
        .iter()
        .map(|layer| layer["compressedSize"].as_f64().context("no size"));
    sizes.sum()
}

#[test]
fn machines_that_end_by_themselves_are_counted_by_how() -> Result<()> {
    on_drupe(with_metrics()?, |node| {
        node.pull_busybox()?;
        let exits = |reason: &str| {
            Scrape::of(node)?.value("drupe_machine_exits_total", &[("reason", reason)])
        };
        // Whoever kills the VMM leaves it no word.
        let pod = node.run_pod("killed")?;
        let info = pod_info(node, &pod.id)?;
        let pid = info["pid"].as_i64().context("no pid")?;
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        eventually("the pod to be lost", Duration::from_secs(20), || {
            let lost = [("phase", "lost"), ("handler", "microvm")];
            let count = Scrape::of(node)?.value("drupe_pods", &lost)?;
            ensure!(count == 1.0, "{count} pods are lost");
            Ok::<_, anyhow::Error>(())
        })?;
        assert_eq!(exits("monitor-lost")?, 1.0);
        pod.remove()?;
        assert_eq!(exits("stopped")?, 0.0, "it was over before");

        // A daemon that is restarted begins anew.
        node.stop_server()?;
        node.edit_config(|config| {
            config["runtimes"]["microvm"]["kernel_args"] = json!(["rdinit=/no/such/init"])
        })?;
        node.start_server()?;
        assert_eq!(exits("monitor-lost")?, 0.0);
        pod_refused(node, "panics", Code::Internal, &["kernel panic"])?;
        assert_eq!(exits("guest-panic")?, 1.0);
        let failed = [("handler", "microvm"), ("outcome", "failed")];
        assert_eq!(
            Scrape::of(node)?.value("drupe_pod_starts_total", &failed)?,
            1.0
        );
        Ok(())
    })
}

fn pod_info(node: &Node, pod: &str) -> Result<Value> {
    let status = node.cri()?.pod_sandbox_status(PodSandboxStatusRequest {
        pod_sandbox_id: pod.to_owned(),
        verbose: true,
    })?;
    let info = status.info.get("info").context("no information")?;
    Ok(serde_json::from_str(info)?)
}

#[test]
fn nothing_listens_unless_asked_and_a_bad_address_is_named() -> Result<()> {
    let node = Node::builder().start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    // Only what execs and attaches go over.
    let listening = || node.netns.output("ss", &["-Hltnp"]);
    let of_daemon = |text: &str| text.lines().filter(|l| l.contains("\"drupe\"")).count();
    let off = listening()?;
    assert_eq!(of_daemon(&off), 1, "{off}");
    node.stop_server()?;

    node.edit_config(|config| config["metrics"] = json!({ "address": ADDRESS }))?;
    node.start_server()?;
    let on = listening()?;
    assert_eq!(of_daemon(&on), 2, "{on}");
    ensure!(on.contains(ADDRESS), "{on}");
    node.stop_server()?;

    // In nobody's network; without a port; with none that could be known.
    for (address, parts) in [
        (
            "192.0.2.7:9750",
            ["metrics.address", "cannot listen on 192.0.2.7:9750"],
        ),
        ("127.0.0.1", ["metrics.address", "socket address"]),
        ("127.0.0.1:0", ["metrics.address", "port 0"]),
    ] {
        node.edit_config(|config| config["metrics"] = json!({ "address": address }))?;
        let before = node.log()?.len();
        let (status, said) = node.run_server_to_its_end(Duration::from_secs(20))?;
        let said = &said[before..];
        ensure!(!status.success(), "it served at {address}: {said}");
        for part in parts {
            ensure!(said.contains(part), "{part:?} is not in: {said}");
        }
    }
    node.finish_without_server()
}

/// Every name of a metric in the dashboard's queries.
fn names(dashboard: &Value, found: &mut BTreeSet<String>) {
    match dashboard {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if ["expr", "query", "definition"].contains(&&**key) => {
                        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
                        let of_drupe = words.filter(|word| word.starts_with("drupe_"));
                        found.extend(of_drupe.map(str::to_owned));
                    }
                    value => names(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| names(value, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_asks_for_metrics_that_are_there() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/grafana/drupe.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let mut asked = BTreeSet::new();
    names(&dashboard, &mut asked);
    ensure!(asked.len() >= 8, "hardly a dashboard: {asked:?}");
    let documented =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md"))?;
    on_drupe(with_metrics()?, |node| {
        let scrape = Scrape::of(node)?;
        // Some have no sample before something happens, and are announced.
        let announced = scrape.0.lines().filter_map(|line| {
            let (name, _) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
            Some(name)
        });
        let there: BTreeSet<&str> = scrape.names().into_iter().chain(announced).collect();
        for name in &asked {
            ensure!(there.contains(name.as_str()), "{name} is not scraped");
        }
        // And every metric is described, by the name that it is asked for.
        for line in scrape.0.lines() {
            let Some(family) = line.strip_prefix("# TYPE ") else {
                continue;
            };
            let (name, kind) = family.split_once(' ').context(line.to_owned())?;
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            let name = format!("`{name}{suffix}`");
            ensure!(documented.contains(&name), "{name} is not in the docs");
        }
        Ok(())
    })
}
