//! What is told of starts.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cri_api::v1;
use opentelemetry::trace::{SpanId, Status};
use opentelemetry::{Key, Value};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use podsandbox::record::{PhaseTime, PodKind, PodPhase, PodRecord};
use podsandbox::{
    Error, Machine, NotStarted, Observer as _, StartFailure, StartOver, Step, TraceParent,
};
use tonic::metadata::MetadataMap;

use super::exporter::Exporter;
use super::{Observers, Traces, check, parent};
use crate::prometheus::Metrics;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

#[derive(Clone, Debug, Default)]
struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

fn traceparent(flags: &str) -> TraceParent {
    TraceParent {
        traceparent: format!("00-{TRACE}-{CALLER}-{flags}"),
        tracestate: "vendor=opaque".to_owned(),
    }
}

fn record(timeline: &[(Step, u64, u64)]) -> PodRecord {
    let config = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            uid: "u-1".to_owned(),
            attempt: 2,
        }),
        ..Default::default()
    };
    let timeline = timeline
        .iter()
        .map(|&(phase, start_us, duration_us)| PhaseTime {
            phase,
            start_us,
            duration_us,
        });
    PodRecord {
        id: "0123abcd".to_owned(),
        spec: crate::convert::pod::parse(config, String::new()).unwrap(),
        handler: "microvm".to_owned(),
        kind: PodKind::MicroVm,
        machine: Some(Machine::Kvm),
        phase: PodPhase::Ready,
        created_at_nanos: 0,
        uid: 1,
        vcpus: 1,
        memory_mib: 512,
        machine_mib: 512,
        cgroup: None,
        network: None,
        vmm_pid: None,
        failure: None,
        timeline: timeline.collect(),
    }
}

/// The request's span, then the others in the order in which they began.
fn told(
    record: &PodRecord,
    parent: Option<&TraceParent>,
    failure: Option<StartFailure<'_>>,
) -> Vec<SpanData> {
    let kept = Kept::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(kept.clone())
        .build();
    let observers = Observers {
        metrics: Arc::new(Metrics::new(&[])),
        traces: Some(Traces::of(provider)),
    };
    observers.start_over(&StartOver {
        record,
        machine: Some(Machine::Kvm),
        parent,
        began: began(),
        took: Duration::from_micros(900),
        failure,
    });
    let mut spans = kept.0.lock().unwrap().clone();
    spans.sort_by_key(|span| {
        let is_below = span.name != "runtime.v1.RuntimeService/RunPodSandbox";
        (is_below, span.start_time)
    });
    spans
}

fn began() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_000_000)
}

fn micros(time: SystemTime) -> u128 {
    time.duration_since(began()).unwrap().as_micros()
}

fn attribute<'a>(span: &'a SpanData, key: &'static str) -> Option<&'a Value> {
    let mut all = span.attributes.iter();
    let found = all.find(|attribute| attribute.key == Key::from_static_str(key));
    found.map(|attribute| &attribute.value)
}

#[test]
fn a_start_is_a_span_and_each_of_its_steps_one_below_it() {
    let record = record(&[
        (Step::Netns, 100, 50),
        (Step::Boot, 200, 500),
        (Step::Cni, 200, 300),
    ]);
    let spans = told(&record, None, None);
    let [request, steps @ ..] = &spans[..] else {
        panic!("no spans");
    };
    assert_eq!(request.parent_span_id, SpanId::INVALID);
    assert_eq!(request.status, Status::Unset);
    assert_eq!(
        (micros(request.start_time), micros(request.end_time)),
        (0, 900)
    );
    for (key, value) in [
        ("k8s.namespace.name", "shop"),
        ("k8s.pod.name", "web"),
        ("k8s.pod.uid", "u-1"),
        ("drupe.pod.id", "0123abcd"),
        ("drupe.handler", "microvm"),
        ("drupe.machine", "kvm"),
        ("drupe.outcome", "started"),
    ] {
        assert_eq!(attribute(request, key), Some(&Value::from(value)), "{key}");
    }
    assert_eq!(attribute(request, "drupe.failed_step"), None);
    let mut shown: Vec<_> = steps
        .iter()
        .map(|step| {
            assert_eq!(step.parent_span_id, request.span_context.span_id());
            assert_eq!(
                step.span_context.trace_id(),
                request.span_context.trace_id()
            );
            assert_eq!(step.status, Status::Unset);
            (&*step.name, micros(step.start_time), micros(step.end_time))
        })
        .collect();
    shown.sort_unstable();
    assert_eq!(
        shown,
        [("boot", 200, 700), ("cni", 200, 500), ("netns", 100, 150)]
    );
}

#[test]
fn the_caller_is_the_parent_if_it_wants_the_trace() {
    let record = record(&[(Step::Boot, 0, 1)]);
    let spans = told(&record, Some(&traceparent("01")), None);
    assert_eq!(spans.len(), 2);
    assert_eq!(spans[0].parent_span_id.to_string(), CALLER);
    assert!(spans[0].parent_span_is_remote && !spans[1].parent_span_is_remote);
    for span in &spans {
        assert_eq!(span.span_context.trace_id().to_string(), TRACE);
        assert_eq!(
            span.span_context.trace_state().get("vendor"),
            Some("opaque")
        );
    }
    // The caller's sampler has left it out.
    assert!(told(&record, Some(&traceparent("00")), None).is_empty());
    // What is not one is none.
    let nonsense = TraceParent {
        traceparent: "00-zz".to_owned(),
        tracestate: String::new(),
    };
    let spans = told(&record, Some(&nonsense), None);
    assert_eq!(spans[0].parent_span_id, SpanId::INVALID);
}

#[test]
fn a_failed_start_names_its_step_and_the_undoing() {
    // A step in two parts of which the second failed.
    let record = record(&[
        (Step::Netns, 0, 10),
        (Step::Scratch, 10, 10),
        (Step::Netns, 20, 30),
    ]);
    let long = "x".repeat(5000);
    let error = Error::Shared {
        kind: podsandbox::ErrorKind::Internal,
        message: format!("no tap: ä{long}"),
    };
    let failure = StartFailure {
        why: NotStarted::Failed,
        step: Some(Step::Netns),
        error: &error,
        undone_from: Duration::from_micros(60),
    };
    let spans = told(&record, None, Some(failure));
    let request = &spans[0];
    let value = |key| attribute(request, key).cloned();
    assert_eq!(value("drupe.outcome"), Some("failed".into()));
    assert_eq!(value("drupe.failed_step"), Some("netns".into()));
    let failed: Vec<_> = spans
        .iter()
        .filter(|span| match &span.status {
            Status::Error { description } => {
                assert!(description.starts_with("no tap: ä"), "{description}");
                assert!(description.len() <= 1024);
                true
            }
            _ => false,
        })
        .map(|span| (&*span.name, micros(span.start_time)))
        .collect();
    assert_eq!(failed, [(&*request.name, 0), ("netns", 20)]);
    let undo = spans.iter().find(|span| span.name == "undo").unwrap();
    assert_eq!((micros(undo.start_time), micros(undo.end_time)), (60, 900));
    assert_eq!(undo.parent_span_id, request.span_context.span_id());
}

#[test]
fn an_unreachable_collector_is_news_once() {
    let exporter = Exporter::new(Kept::default(), "http://nowhere:1".to_owned());
    let said: Vec<bool> = [false, true, true, true, false, false, true]
        .map(|fails| exporter.learn(fails))
        .into();
    assert_eq!(said, [false, true, false, false, true, false, true]);
}

#[test]
fn a_requests_place_in_a_trace_has_a_bounded_length() {
    let mut metadata = MetadataMap::new();
    assert_eq!(parent(&metadata), None);
    metadata.insert("tracestate", "vendor=opaque".parse().unwrap());
    assert_eq!(parent(&metadata), None);
    let wanted = traceparent("01");
    metadata.insert("traceparent", wanted.traceparent.parse().unwrap());
    assert_eq!(parent(&metadata), Some(wanted.clone()));
    metadata.insert("tracestate", "x".repeat(513).parse().unwrap());
    assert_eq!(parent(&metadata).unwrap().tracestate, "");
    metadata.insert("traceparent", "0".repeat(129).parse().unwrap());
    assert_eq!(parent(&metadata), None);
}

#[test]
fn an_endpoint_is_an_address_of_http() {
    for fine in ["http://127.0.0.1:4317", "http://[::1]:4317", "http://otel"] {
        assert_eq!(check(fine), Ok(()), "{fine}");
    }
    for bad in ["", "127.0.0.1:4317", "unix:///x", "http://", "a b"] {
        let why = check(bad).unwrap_err();
        assert!(why.contains("http://127.0.0.1:4317"), "{why}");
    }
    assert!(check("https://otel:4317").unwrap_err().contains("TLS"));
}
