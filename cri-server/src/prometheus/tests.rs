//! What a scraper reads.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::{Request, Response};
use imagesvc::{ErrorKind, Observer as _, PullOutcome};
use podsandbox::{MachineEnd, NotStarted, Observer as _, Step};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::{Code, Status};
use tower::{Service, service_fn};

use super::machines::Machines;
use super::pods::Tally;
use super::{Metrics, Requests, server};

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new(&["microvm".to_owned(), "host".to_owned()]))
}

fn scraped(registry: &Registry) -> String {
    let mut text = String::new();
    encode(&mut text, registry).unwrap();
    text
}

/// The value of the one sample of this name and labels.
fn value(metrics: &Metrics, sample: &str) -> Option<f64> {
    let text = scraped(&metrics.counted());
    let mut found = text
        .lines()
        .filter_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    let value = found.next().map(|value| value.parse().unwrap());
    assert_eq!(found.next(), None, "{sample} is there twice");
    value
}

#[test]
fn what_has_not_happened_is_zero() {
    let metrics = metrics();
    for sample in [
        r#"drupe_pod_starts_total{handler="microvm",outcome="started"}"#,
        r#"drupe_pod_starts_total{handler="host",outcome="failed"}"#,
        r#"drupe_pod_start_phase_seconds_count{phase="total",handler="microvm"}"#,
        r#"drupe_machine_exits_total{reason="guest-panic"}"#,
        r#"drupe_agent_errors_total{code="Unavailable"}"#,
        r#"drupe_image_pulls_total{outcome="up-to-date"}"#,
        "drupe_image_pull_bytes_total",
    ] {
        assert_eq!(value(&metrics, sample), Some(0.0), "{sample}");
    }
    let version = env!("CARGO_PKG_VERSION");
    let build = format!(r#"drupe_build_info{{version="{version}"}}"#);
    assert_eq!(value(&metrics, &build), Some(1.0));
}

#[test]
fn starts_are_counted_with_their_phases() {
    let metrics = metrics();
    let steps = [
        (Step::Netns, Duration::from_millis(4)),
        (Step::Boot, Duration::from_millis(80)),
    ];
    metrics.pod_started("microvm", &steps, Duration::from_millis(140));
    metrics.pod_started("microvm", &steps, Duration::from_millis(160));
    metrics.pod_not_started("microvm", NotStarted::Failed);
    metrics.pod_not_started("host", NotStarted::Stopped);
    let of = |sample: &str| value(&metrics, sample);
    let boot = r#"{phase="boot",handler="microvm"}"#;
    assert_eq!(
        of(&format!("drupe_pod_start_phase_seconds_count{boot}")),
        Some(2.0)
    );
    assert_eq!(
        of(&format!("drupe_pod_start_phase_seconds_sum{boot}")),
        Some(0.16)
    );
    assert_eq!(
        of(r#"drupe_pod_start_phase_seconds_sum{phase="total",handler="microvm"}"#)
            .map(|sum| (sum * 1000.0).round()),
        Some(300.0)
    );
    let within = |le: &str| {
        format!(
            r#"drupe_pod_start_phase_seconds_bucket{{le="{le}",phase="total",handler="microvm"}}"#
        )
    };
    assert_eq!(of(&within("0.1")), Some(0.0));
    assert_eq!(of(&within("0.15")), Some(1.0));
    assert_eq!(of(&within("0.2")), Some(2.0));
    assert_eq!(of(&within("+Inf")), Some(2.0));
    for (handler, outcome, count) in [
        ("microvm", "started", 2.0),
        ("microvm", "failed", 1.0),
        ("microvm", "stopped", 0.0),
        ("host", "stopped", 1.0),
    ] {
        let sample =
            format!(r#"drupe_pod_starts_total{{handler="{handler}",outcome="{outcome}"}}"#);
        assert_eq!(of(&sample), Some(count), "{sample}");
    }
}

#[test]
fn ends_errors_and_pulls_are_counted_apart() {
    let metrics = metrics();
    metrics.machine_ended(MachineEnd::GuestPanic);
    metrics.machine_ended(MachineEnd::Stopped);
    metrics.machine_ended(MachineEnd::Stopped);
    metrics.agent_failed(Code::DeadlineExceeded);
    metrics.pull_ended(PullOutcome::Pulled);
    metrics.pull_ended(PullOutcome::Failed(ErrorKind::NotFound));
    metrics.layer_bytes(4096);
    metrics.layer_bytes(1);
    for (sample, count) in [
        (r#"drupe_machine_exits_total{reason="guest-panic"}"#, 1.0),
        (r#"drupe_machine_exits_total{reason="stopped"}"#, 2.0),
        (r#"drupe_machine_exits_total{reason="killed"}"#, 0.0),
        (r#"drupe_agent_errors_total{code="DeadlineExceeded"}"#, 1.0),
        (r#"drupe_image_pulls_total{outcome="pulled"}"#, 1.0),
        (r#"drupe_image_pulls_total{outcome="not-found"}"#, 1.0),
        (r#"drupe_image_pulls_total{outcome="corrupt"}"#, 0.0),
        ("drupe_image_pull_bytes_total", 4097.0),
    ] {
        assert_eq!(value(&metrics, sample), Some(count), "{sample}");
    }
}

#[derive(Debug)]
struct Machinery;

impl Collector for Machinery {
    fn encode(&self, mut encoder: DescriptorEncoder) -> std::fmt::Result {
        let mut machines = Machines::default();
        machines.handler("microvm", "kvm", true);
        machines.handler("old", "kvm", false);
        machines.pod("microvm", "kvm");
        // Started before its handler had kvm.
        machines.pod("microvm", "uml");
        machines.pod("microvm", "uml");
        machines.encode(&mut encoder)
    }
}

#[test]
fn machines_are_shown_by_handler() {
    let mut registry = Registry::with_prefix("drupe");
    registry.register_collector(Box::new(Machinery));
    let text = scraped(&registry);
    for line in [
        r#"drupe_handler_usable{handler="microvm",machine="kvm"} 1"#,
        r#"drupe_handler_usable{handler="old",machine="kvm"} 0"#,
        r#"drupe_machine_pods{handler="microvm",machine="kvm"} 1"#,
        r#"drupe_machine_pods{handler="microvm",machine="uml"} 2"#,
        r#"drupe_machine_pods{handler="old",machine="kvm"} 0"#,
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[derive(Debug)]
struct Now;

impl Collector for Now {
    fn encode(&self, encoder: DescriptorEncoder) -> std::fmt::Result {
        let mut tally = Tally::new(&["microvm".to_owned()]);
        tally.pod("ready", "microvm");
        tally.pod("ready", "microvm");
        // Of a handler that was configured once.
        tally.pod("stopped", "old \"one\"");
        tally.container("running");
        tally.encode(encoder)
    }
}

#[test]
fn pods_and_containers_are_shown_as_they_are() {
    let mut registry = Registry::with_prefix("drupe");
    registry.register_collector(Box::new(Now));
    let text = scraped(&registry);
    for line in [
        "# TYPE drupe_pods gauge",
        r#"drupe_pods{phase="ready",handler="microvm"} 2"#,
        r#"drupe_pods{phase="lost",handler="microvm"} 0"#,
        r#"drupe_pods{phase="stopped",handler="old \"one\""} 1"#,
        r#"drupe_containers{state="running"} 1"#,
        r#"drupe_containers{state="exited"} 0"#,
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_is_counted_by_method_and_code() {
    let metrics = metrics();
    let call = async |path: &'static str| {
        let work = service_fn(async |request: Request<()>| {
            Ok::<_, Infallible>(match request.uri().path() {
                "/runtime.v1.RuntimeService/Version" => Response::new(String::new()),
                "/runtime.v1.RuntimeService/StopPodSandbox" => std::future::pending().await,
                _ => Status::not_found("no such pod").into_http(),
            })
        });
        let request = Request::get(path).body(()).unwrap();
        let call = Requests::new(work, Arc::clone(&metrics)).call(request);
        // A caller that goes away.
        drop(tokio::time::timeout(Duration::from_secs(1), call).await);
    };
    call("/runtime.v1.RuntimeService/Version").await;
    call("/runtime.v1.RuntimeService/Version").await;
    call("/runtime.v1.RuntimeService/PodSandboxStatus").await;
    call("/runtime.v1.RuntimeService/StopPodSandbox").await;
    call("/of/a/client's/own").await;
    for (method, code, count) in [
        ("Version", "OK", 2.0),
        ("PodSandboxStatus", "NotFound", 1.0),
        ("StopPodSandbox", "Cancelled", 1.0),
        ("unknown", "NotFound", 1.0),
    ] {
        let sample =
            format!(r#"drupe_cri_requests_seconds_count{{method="{method}",code="{code}"}}"#);
        assert_eq!(value(&metrics, &sample), Some(count), "{sample}");
    }
}

async fn ask(request: &str) -> String {
    let registry = metrics().counted();
    let (mut client, server) = tokio::io::duplex(64 << 10);
    let serving = tokio::spawn(async move { server::serve(server, &registry).await });
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    serving.await.unwrap();
    answer
}

#[tokio::test]
async fn connections_that_ask_for_nothing_keep_no_scraper_out() {
    let loopback = "127.0.0.1:0".parse().unwrap();
    let config = super::MetricsConfig {
        address: Some(loopback),
    };
    let listener = server::listen(&config).await.unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    let _serving = server::Server::start(listener, metrics().counted());
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let begun = std::time::Instant::now();
    let mut scraper = TcpStream::connect(address).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n";
    scraper.write_all(request).await.unwrap();
    let mut answer = String::new();
    scraper.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("# EOF\n"), "{answer}");
    // The others have ten seconds each.
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[tokio::test]
async fn only_metrics_are_served_and_only_to_be_read() {
    let answer = ask("GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.contains("content-type: application/openmetrics-text; version=1.0.0"),
        "{answer}"
    );
    assert!(answer.ends_with("# EOF\n"), "{answer}");
    let head = ask("HEAD /metrics HTTP/1.1\r\nHost: node\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.ends_with("\r\n\r\n"), "{head}");
    let post = ask("POST /metrics HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\n\r\n").await;
    assert!(post.starts_with("HTTP/1.1 405 "), "{post}");
    assert!(post.contains("allow: GET, HEAD"), "{post}");
    let other = ask("GET / HTTP/1.1\r\nHost: node\r\n\r\n").await;
    assert!(other.starts_with("HTTP/1.1 404 "), "{other}");
    let broken = ask("\0\0\0\0\r\n\r\n").await;
    assert!(broken.starts_with("HTTP/1.1 400 "), "{broken}");
}
