//! Sends spans, and says once that it cannot.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

#[derive(Debug)]
pub(super) struct Exporter<E> {
    inner: E,
    endpoint: String,
    /// The last spans could not be sent, which was said.
    is_failing: AtomicBool,
}

impl<E> Exporter<E> {
    pub(super) fn new(inner: E, endpoint: String) -> Self {
        Self {
            inner,
            endpoint,
            is_failing: AtomicBool::new(false),
        }
    }

    /// Whether it is news.
    pub(super) fn learn(&self, fails: bool) -> bool {
        self.is_failing.swap(fails, Ordering::Relaxed) != fails
    }
}

impl<E: SpanExporter> SpanExporter for Exporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let sent = self.inner.export(batch).await;
        let is_news = self.learn(sent.is_err());
        match &sent {
            Err(error) if is_news => {
                tracing::warn!(
                    endpoint = self.endpoint,
                    %error,
                    "traces cannot be sent and are dropped until they can; is a collector of OTLP over gRPC there?"
                );
            }
            Ok(()) if is_news => {
                tracing::info!(endpoint = self.endpoint, "traces are sent again");
            }
            _ => {}
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
