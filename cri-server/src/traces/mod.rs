//! Traces of pods' starts, for OpenTelemetry; `docs/traces.md` tells what is in
//! them.
//!
//! ```text
//! podsandbox ── start_over ──▶ spans ──▶ queue (2048) ──▶ exporter's thread ──▶ OTLP
//! ```
//! Spans are made of the start's own timeline after the request was answered.
//! What the queue has no place for is dropped: no pod waits for a collector.

mod exporter;
mod spans;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use hyper::Uri;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider,
};
use podsandbox::{MachineEnd, NotStarted, StartOver, Step, TraceParent};
use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataMap;
use tonic::transport::Endpoint;

use crate::prometheus::Metrics;
use exporter::Exporter;

/// Of this library, as backends group spans.
const SCOPE: &str = "drupe";
/// About two hundred starts; a span is below a KiB.
const QUEUED_SPANS: usize = 2048;
const SPANS_A_REQUEST: usize = 512;
/// A span waits for others this long.
const SENT_EVERY: Duration = Duration::from_secs(1);
/// A collector is on the node or near it.
const CONNECTS_WITHIN: Duration = Duration::from_secs(2);
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// What is queued when the daemon stops is sent by then, or lost.
const SENDS_LAST_WITHIN: Duration = Duration::from_secs(3);
/// W3C Trace Context has 55 now and lets later versions have more.
const MAX_TRACEPARENT: usize = 128;
/// What W3C Trace Context asks everyone to hand on.
const MAX_TRACESTATE: usize = 512;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TracesConfig {
    /// None: no traces.
    pub endpoint: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    #[error("traces.endpoint {endpoint:?} is no address")]
    Endpoint {
        endpoint: String,
        source: tonic::transport::Error,
    },
    #[error("cannot prepare what sends traces")]
    Exporter(#[source] ExporterBuildError),
}

/// Why `endpoint` cannot be one.
pub fn check(endpoint: &str) -> Result<(), String> {
    let example = "write one such as http://127.0.0.1:4317";
    let uri: Uri = endpoint
        .parse()
        .map_err(|_| format!("{endpoint:?} is no URL: {example}"))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http"), Some(host)) if !host.is_empty() => Ok(()),
        (Some("https"), _) => Err(format!(
            "{endpoint:?} wants TLS, which is left to a collector on the node: {example}"
        )),
        _ => Err(format!("{endpoint:?} is no address of http: {example}")),
    }
}

/// The place in a trace that a request names, if it names one.
pub fn parent(metadata: &MetadataMap) -> Option<TraceParent> {
    let header = |name: &str, most: usize| {
        let value = metadata.get(name)?.to_str().ok()?;
        (value.len() <= most).then(|| value.to_owned())
    };
    Some(TraceParent {
        traceparent: header("traceparent", MAX_TRACEPARENT)?,
        tracestate: header("tracestate", MAX_TRACESTATE).unwrap_or_default(),
    })
}

/// Sends spans until it is stopped.
#[derive(Clone, Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// None: they are not wanted. Whether anybody listens shows when there is
    /// something to send. Called within the runtime that the connection is to
    /// live in.
    pub fn start(config: &TracesConfig) -> Result<Option<Self>, TracesError> {
        let Some(endpoint) = &config.endpoint else {
            return Ok(None);
        };
        let channel = Endpoint::from_shared(endpoint.clone())
            .map_err(|source| TracesError::Endpoint {
                endpoint: endpoint.clone(),
                source,
            })?
            .connect_timeout(CONNECTS_WITHIN)
            .timeout(ANSWERS_WITHIN)
            .connect_lazy();
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .with_timeout(ANSWERS_WITHIN)
            .build()
            .map_err(TracesError::Exporter)?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUED_SPANS)
            .with_max_export_batch_size(SPANS_A_REQUEST)
            .with_scheduled_delay(SENT_EVERY)
            .build();
        let processor = BatchSpanProcessor::builder(Exporter::new(exporter, endpoint.clone()))
            .with_batch_config(batches)
            .build();
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_span_processor(processor)
            .build();
        tracing::info!(endpoint, "traces of pods' starts are sent");
        Ok(Some(Self::of(provider)))
    }

    fn of(provider: SdkTracerProvider) -> Self {
        let tracer = provider.tracer(SCOPE);
        Self { provider, tracer }
    }

    /// Sends what is queued, if that can be done soon.
    pub async fn stop(self) {
        let sent = tokio::task::spawn_blocking(move || {
            self.provider.shutdown_with_timeout(SENDS_LAST_WITHIN)
        });
        match sent.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last traces are lost"),
            Err(error) => tracing::warn!(%error, "the last traces are lost"),
        }
    }
}

/// Who sends. What OTEL_RESOURCE_ATTRIBUTES says is added.
fn resource() -> Resource {
    let mut of = vec![
        KeyValue::new("service.name", "drupe"),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
    ];
    if let Ok(name) = nix::unistd::gethostname() {
        of.push(KeyValue::new(
            "host.name",
            name.to_string_lossy().into_owned(),
        ));
    }
    Resource::builder().with_attributes(of).build()
}

/// All who are told what happens to pods.
#[derive(Debug)]
pub struct Observers {
    pub metrics: Arc<Metrics>,
    pub traces: Option<Traces>,
}

impl podsandbox::Observer for Observers {
    fn pod_started(&self, handler: &str, steps: &[(Step, Duration)], took: Duration) {
        self.metrics.pod_started(handler, steps, took);
    }

    fn pod_not_started(&self, handler: &str, why: NotStarted) {
        self.metrics.pod_not_started(handler, why);
    }

    fn start_over(&self, start: &StartOver<'_>) {
        if let Some(traces) = &self.traces {
            spans::record(&traces.tracer, start);
        }
    }

    fn machine_ended(&self, end: MachineEnd) {
        self.metrics.machine_ended(end);
    }

    fn agent_failed(&self, code: tonic::Code) {
        self.metrics.agent_failed(code);
    }
}
