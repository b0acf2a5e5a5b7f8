//! What an OpenTelemetry collector gets to know of pods' starts.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::collector::{Collector, Received, Span};
use e2e::{Node, eventually};
use serde_json::json;
use tonic::Code;

use crate::{bad_networks, on_drupe, pod_refused};

const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 4317);
/// OTLP's numbers.
const ERROR: i32 = 2;
const SERVER: i32 = 2;

fn with_traces(builder: e2e::NodeBuilder) -> e2e::NodeBuilder {
    let endpoint = format!("http://{ADDRESS}");
    builder.config(move |config| config["traces"] = json!({ "endpoint": endpoint }))
}

fn names(spans: &[Received]) -> BTreeSet<&str> {
    let names = spans.iter().map(|received| received.span.name.as_str());
    names.collect()
}

fn is_error(span: &Span) -> bool {
    span.status
        .as_ref()
        .is_some_and(|status| status.code == ERROR)
}

#[test]
fn a_start_arrives_with_its_steps_below_the_callers_span() -> Result<()> {
    on_drupe(with_traces(Node::builder()).start()?, |node| {
        let collector = Collector::start(&node.netns, ADDRESS)?;
        let pod = node.run_pod("alone")?;
        let spans = collector.start_of("alone")?;
        let (request, steps) = spans.split_first().context("no spans")?;
        ensure!(
            request.span.parent_span_id.is_empty(),
            "{:?}",
            request.span.parent_span_id
        );
        assert_eq!(request.span.name, "runtime.v1.RuntimeService/RunPodSandbox");
        assert_eq!(request.span.kind, SERVER);
        assert!(!is_error(&request.span));
        let uid = pod.config.metadata.as_ref().context("metadata")?;
        for (key, value) in [
            ("k8s.namespace.name", "e2e"),
            ("k8s.pod.uid", &*uid.uid),
            ("drupe.pod.id", &*pod.id),
            ("drupe.handler", "microvm"),
            ("drupe.outcome", "started"),
        ] {
            assert_eq!(request.text(key), Some(value), "{key}");
        }
        let machine = request.text("drupe.machine");
        ensure!(matches!(machine, Some("uml" | "kvm")), "{machine:?}");
        assert_eq!(request.of_sender("service.name"), Some("drupe"));
        // As long, and as long after the request, as CRI says.
        let timeline = e2e::pod::timeline(node, &pod.id)?;
        assert_eq!(steps.len(), timeline.len());
        let begun = request.span.start_time_unix_nano;
        for part in &timeline {
            let from = begun + u64::try_from(part.start.as_nanos())?;
            let to = from + u64::try_from(part.duration.as_nanos())?;
            ensure!(
                steps.iter().any(|step| step.span.name == part.name
                    && step.span.start_time_unix_nano.abs_diff(from) < 1_000
                    && step.span.end_time_unix_nano.abs_diff(to) < 1_000),
                "{part:?} is not among the spans"
            );
            ensure!(to <= request.span.end_time_unix_nano + 1_000, "{part:?}");
        }
        let known = names(steps);
        for step in [
            "netns",
            "scratch",
            "cni",
            "vmm",
            "boot",
            "redirect",
            "configure",
        ] {
            ensure!(known.contains(step), "{step} is not in {known:?}");
        }

        // As a kubelet whose tracing is on.
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let caller = "b7ad6b7169203331";
        let config = node.pod_config("called");
        std::fs::create_dir_all(&config.log_directory)?;
        let asked = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        let traceparent = format!("00-{trace}-{caller}-01");
        node.cri()?.run_pod_sandbox_in_trace(asked, &traceparent)?;
        let spans = collector.start_of("called")?;
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        assert_eq!(hex(&spans[0].span.parent_span_id), caller);
        assert_eq!(spans.len(), steps.len() + 1);
        for received in &spans {
            assert_eq!(hex(&received.span.trace_id), trace);
        }

        // One on the node's kernel has a supervisor in place of a machine.
        let mut config = node.pod_config("on-the-host");
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        let options = context.namespace_options.get_or_insert_default();
        options.network = NamespaceMode::Node.into();
        node.run_pod_with(config)?;
        let spans = collector.start_of("on-the-host")?;
        assert_eq!(spans[0].text("drupe.machine"), Some("host"));
        assert_eq!(
            names(&spans[1..]),
            BTreeSet::from(["scratch", "supervisor", "configure"])
        );
        Ok(())
    })
}

#[test]
fn a_failed_start_arrives_as_an_error_that_names_its_step() -> Result<()> {
    let node = with_traces(Node::builder().plugin("e2e-fails")).prepare()?;
    node.write_plugin("e2e-fails", bad_networks::FAILS)?;
    node.start_server()?;
    on_drupe(node, |node| {
        let collector = Collector::start(&node.netns, ADDRESS)?;
        pod_refused(node, "unplugged", Code::Internal, &["no cherries today"])?;
        let spans = collector.start_of("unplugged")?;
        let request = &spans[0];
        assert_eq!(request.text("drupe.outcome"), Some("failed"));
        assert_eq!(request.text("drupe.failed_step"), Some("cni"));
        let failed = spans.iter().filter(|received| is_error(&received.span));
        let failed: Vec<_> = failed
            .map(|received| {
                let status = received.span.status.as_ref();
                let said = status.map_or("", |status| &status.message);
                ensure!(said.contains("no cherries today"), "{said}");
                Ok(received.span.name.as_str())
            })
            .collect::<Result<_>>()?;
        assert_eq!(failed, [request.span.name.as_str(), "cni"]);
        let known = names(&spans);
        ensure!(known.contains("undo"), "{known:?}");
        Ok(())
    })
}

#[test]
fn a_collector_that_is_not_there_is_one_warning_until_it_answers() -> Result<()> {
    on_drupe(with_traces(Node::builder()).start()?, |node| {
        let warnings = || {
            let log = node.log()?;
            Ok::<_, anyhow::Error>(log.matches("traces cannot be sent").count())
        };
        // Each is sent by itself: the first ones' failure is known before.
        node.run_pod("first")?.stop()?;
        eventually("the warning", Duration::from_secs(20), || {
            ensure!(warnings()? == 1, "not said");
            Ok(())
        })?;
        node.run_pod("second")?.stop()?;
        node.run_pod("third")?.stop()?;
        let collector = Collector::start(&node.netns, ADDRESS)?;
        node.run_pod("found")?;
        let spans = collector.start_of("found")?;
        ensure!(spans.len() > 5, "{:?}", names(&spans));
        assert_eq!(warnings()?, 1);
        // Said when the collector has answered.
        eventually("word of the end", Duration::from_secs(20), || {
            ensure!(node.log()?.contains("traces are sent again"), "not said");
            Ok(())
        })
    })
}
