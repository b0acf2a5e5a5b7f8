//! Counts and times CRI requests on their way in and out.
//!
//! The time ends when the answer begins: for a stream, which may last for ever,
//! that is its first word. A caller that goes away before that was `Cancelled`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use hyper::{Request, Response};
use tonic::{Code, Status};
use tower::Service;

use super::Metrics;

/// Paths are the client's to choose; labels are not.
const UNKNOWN_METHOD: &str = "unknown";

/// All of CRI.
const METHODS: [&str; 41] = [
    "Attach",
    "CheckpointContainer",
    "ContainerStats",
    "ContainerStatus",
    "CreateContainer",
    "Exec",
    "ExecSync",
    "GetContainerEvents",
    "ImageFsInfo",
    "ImageStatus",
    "ListContainerStats",
    "ListContainers",
    "ListImages",
    "ListMetricDescriptors",
    "ListPodSandbox",
    "ListPodSandboxMetrics",
    "ListPodSandboxStats",
    "PodSandboxStats",
    "PodSandboxStatus",
    "PortForward",
    "PullImage",
    "RemoveContainer",
    "RemoveImage",
    "RemovePodSandbox",
    "ReopenContainerLog",
    "RunPodSandbox",
    "RuntimeConfig",
    "StartContainer",
    "Status",
    "StopContainer",
    "StopPodSandbox",
    "StreamContainerStats",
    "StreamContainers",
    "StreamImages",
    "StreamPodSandboxMetrics",
    "StreamPodSandboxStats",
    "StreamPodSandboxes",
    "UpdateContainerResources",
    "UpdatePodSandboxResources",
    "UpdateRuntimeConfig",
    "Version",
];

#[derive(Clone, Debug)]
pub struct Requests<S> {
    inner: S,
    metrics: Arc<Metrics>,
}

impl<S> Requests<S> {
    pub fn new(inner: S, metrics: Arc<Metrics>) -> Self {
        Self { inner, metrics }
    }
}

type Answer<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

impl<S, B, R> Service<Request<B>> for Requests<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Answer<Response<R>, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let mut pending = Pending {
            metrics: Arc::clone(&self.metrics),
            method: method(request.uri().path()),
            since: Instant::now(),
            code: Code::Cancelled,
        };
        let work = self.inner.call(request);
        Box::pin(async move {
            let answer = work.await;
            pending.answered(match &answer {
                // An error comes in the head of the answer; what has none in it
                // has begun well.
                Ok(answer) => {
                    let status = Status::from_header_map(answer.headers());
                    status.map_or(Code::Ok, |status| status.code())
                }
                Err(_) => Code::Internal,
            });
            answer
        })
    }
}

/// Counted when it is dropped, however it ended.
struct Pending {
    metrics: Arc<Metrics>,
    method: &'static str,
    since: Instant,
    code: Code,
}

impl Pending {
    fn answered(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let took = self.since.elapsed();
        self.metrics.request(self.method, self.code, took);
    }
}

fn method(path: &str) -> &'static str {
    let services = ["/runtime.v1.RuntimeService/", "/runtime.v1.ImageService/"];
    let asked = services
        .iter()
        .find_map(|service| path.strip_prefix(service));
    let known = asked.and_then(|asked| METHODS.binary_search(&asked).ok());
    known.map_or(UNKNOWN_METHOD, |index| METHODS[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_cri_has_its_label_and_no_other_path_has() {
        let services = [
            (
                "RuntimeService",
                include_str!("../../api/proto/runtime.proto"),
            ),
            ("ImageService", include_str!("../../api/proto/image.proto")),
        ];
        let mut found = 0;
        for (service, proto) in services {
            for line in proto.lines() {
                let Some(rest) = line.trim().strip_prefix("rpc ") else {
                    continue;
                };
                let (name, _) = rest.split_once('(').unwrap();
                assert_eq!(method(&format!("/runtime.v1.{service}/{name}")), name);
                found += 1;
            }
        }
        assert_eq!(found, METHODS.len());
        for other in [
            "",
            "/",
            "/runtime.v1.RuntimeService/",
            "/runtime.v1.RuntimeService/Versio",
            "/runtime.v1alpha2.RuntimeService/Version",
            "/Version",
        ] {
            assert_eq!(method(other), UNKNOWN_METHOD, "{other}");
        }
    }
}
