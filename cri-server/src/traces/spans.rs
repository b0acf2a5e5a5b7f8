//! One start as spans: the request's, below it each step's and the undoing's.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use podsandbox::record::PhaseTime;
use podsandbox::{Machine, NotStarted, StartOver, TraceParent};

/// As OpenTelemetry's conventions name the spans of RPCs.
const REQUEST: &str = "runtime.v1.RuntimeService/RunPodSandbox";
const UNDO: &str = "undo";
/// Names come from clients, errors may quote a guest.
const MAX_TEXT: usize = 1024;

pub(super) fn record(tracer: &SdkTracer, start: &StartOver<'_>) {
    let parent = caller(start.parent);
    let request = tracer
        .span_builder(REQUEST)
        .with_kind(SpanKind::Server)
        .with_start_time(start.began)
        .with_attributes(attributes(start))
        .start_with_context(tracer, &parent);
    let request = parent.with_span(request);
    let at = |since: Duration| start.began.checked_add(since).unwrap_or(start.began);
    let child = |name: String, from: Duration| {
        let builder = tracer.span_builder(name).with_start_time(at(from));
        builder.start_with_context(tracer, &request)
    };

    let failure = start.failure.as_ref();
    let failed = failure.and_then(|failure| {
        let mut timeline = start.record.timeline.iter();
        timeline.rposition(|part| Some(part.phase) == failure.step)
    });
    for (index, part) in start.record.timeline.iter().enumerate() {
        let (from, to) = bounds(part);
        let mut span = child(part.phase.to_string(), from);
        if let (Some(failure), true) = (failure, failed == Some(index)) {
            span.set_status(error(failure.error));
        }
        span.end_with_timestamp(at(to));
    }
    let over: SystemTime = at(start.took);
    if let Some(failure) = failure {
        let mut undo = child(UNDO.to_owned(), failure.undone_from);
        undo.end_with_timestamp(over);
        request.span().set_status(error(failure.error));
    }
    request.span().end_with_timestamp(over);
}

/// A context that is not what W3C Trace Context says is none: the start is a
/// trace of its own.
fn caller(parent: Option<&TraceParent>) -> Context {
    let none = Context::new();
    let Some(parent) = parent else {
        return none;
    };
    let mut headers = HashMap::from([("traceparent".to_owned(), parent.traceparent.clone())]);
    if !parent.tracestate.is_empty() {
        headers.insert("tracestate".to_owned(), parent.tracestate.clone());
    }
    TraceContextPropagator::new().extract_with_context(&none, &headers)
}

fn bounds(part: &PhaseTime) -> (Duration, Duration) {
    let from = Duration::from_micros(part.start_us);
    (
        from,
        from.saturating_add(Duration::from_micros(part.duration_us)),
    )
}

fn attributes(start: &StartOver<'_>) -> Vec<KeyValue> {
    let (pod, name) = (start.record, &start.record.spec.name);
    let outcome = match &start.failure {
        None => "started",
        Some(failure) => match failure.why {
            NotStarted::Failed => "failed",
            NotStarted::Stopped => "stopped",
        },
    };
    let machine = match start.machine {
        Some(Machine::Kvm) => "kvm",
        Some(Machine::Uml(_)) => "uml",
        None => "host",
    };
    let text = |key: &'static str, value: &str| KeyValue::new(key, bounded(value));
    let mut attributes = vec![
        text("rpc.system", "grpc"),
        text("rpc.service", "runtime.v1.RuntimeService"),
        text("rpc.method", "RunPodSandbox"),
        text("k8s.namespace.name", &name.namespace),
        text("k8s.pod.name", &name.name),
        text("k8s.pod.uid", &name.uid),
        text("drupe.pod.id", &pod.id),
        KeyValue::new("drupe.pod.attempt", i64::from(name.attempt)),
        text("drupe.handler", &pod.handler),
        text("drupe.machine", machine),
        text("drupe.outcome", outcome),
    ];
    if let Some(step) = start.failure.as_ref().and_then(|failure| failure.step) {
        attributes.push(text("drupe.failed_step", &step.to_string()));
    }
    attributes
}

fn error(error: &podsandbox::Error) -> Status {
    Status::error(bounded(&error.sentence()))
}

fn bounded(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}
