//! A collector of traces, as OpenTelemetry's: OTLP over gRPC, in a node's
//! network.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
pub use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::netns::NetNs;
use crate::patient;

/// Spans are sent once a second; after a failure the connection is made anew
/// with the next ones.
const ARRIVE_WITHIN: Duration = Duration::from_secs(20);

/// Serves until it is dropped.
pub struct Collector {
    _tokio: Runtime,
    arrived: Receiver<ExportTraceServiceRequest>,
}

/// A span with what its sender says of itself.
pub struct Received {
    pub span: Span,
    resource: Vec<KeyValue>,
}

impl Received {
    /// A text among its attributes.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        text(&self.span.attributes, key)
    }

    /// A text among its sender's.
    #[must_use]
    pub fn of_sender(&self, key: &str) -> Option<&str> {
        text(&self.resource, key)
    }
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text),
        _ => None,
    }
}

struct Taker(Mutex<Sender<ExportTraceServiceRequest>>);

#[tonic::async_trait]
impl TraceService for Taker {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let taken = match self.0.lock() {
            Ok(sender) => sender.send(request.into_inner()).is_ok(),
            Err(_) => false,
        };
        match taken {
            true => Ok(Response::new(ExportTraceServiceResponse::default())),
            false => Err(Status::unavailable("the test is over")),
        }
    }
}

impl Collector {
    pub fn start(netns: &NetNs, address: SocketAddr) -> Result<Self> {
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start tokio")?;
        let listener = netns.run(|| {
            let listener = std::net::TcpListener::bind(address).context("collector")?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let listener = {
            let _inside = tokio.enter();
            TcpListener::from_std(listener)?
        };
        let (sender, arrived) = channel();
        let service = TraceServiceServer::new(Taker(Mutex::new(sender)));
        tokio.spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener)),
        );
        Ok(Self {
            _tokio: tokio,
            arrived,
        })
    }

    /// What is known of the start of a pod: the request's span first. The
    /// others were sent before it or with it. Spans of other pods that arrive
    /// meanwhile are passed over.
    pub fn start_of(&self, pod: &str) -> Result<Vec<Received>> {
        let until = Instant::now() + patient(ARRIVE_WITHIN);
        let mut spans: Vec<Received> = Vec::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(request) = self.arrived.recv_timeout(left) else {
                bail!("no trace of the start of {pod} has arrived");
            };
            for of_sender in request.resource_spans {
                let resource = of_sender.resource.unwrap_or_default().attributes;
                let all = of_sender.scope_spans.into_iter().flat_map(|of| of.spans);
                spans.extend(all.map(|span| Received {
                    span,
                    resource: resource.clone(),
                }));
            }
            let of_pod = |received: &Received| received.text("k8s.pod.name") == Some(pod);
            if let Some(index) = spans.iter().position(of_pod) {
                let request = spans.swap_remove(index);
                spans.retain(|below| below.span.parent_span_id == request.span.span_id);
                spans.insert(0, request);
                return Ok(spans);
            }
        }
    }
}
