//! What the command line asks of the daemon that serves, over its CRI socket,
//! and how it says that it could not.

mod console;
pub mod debug;
pub mod documents;
pub mod logs;
pub mod overhead;
pub mod pods;
pub mod runtimeclass;
mod table;
mod terminal;
pub mod top;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cri_api::v1::runtime_service_client::RuntimeServiceClient;
use cri_api::v1::{
    ListPodSandboxRequest, ListPodSandboxStatsRequest, PodSandbox, PodSandboxFilter,
    PodSandboxMetadata, PodSandboxState, PodSandboxStats, PodSandboxStatusRequest,
};
use cri_server::config::Config;
use hyper_util::rt::TokioIo;
use podsandbox::record::{PhaseTime, PodKind, PodPhase};
use serde::Deserialize;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// The daemon answers these from memory.
const CALL_WITHIN: Duration = Duration::from_secs(10);
/// Some thousands of pods with all their labels.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// Digits of a pod's id that people are shown.
const SHORT_ID: usize = 13;
/// Pods that an error names.
const NAMED_PODS: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(
        "no daemon answers on {}: {source}; start it (systemctl start drupe), or name its configuration by --config",
        socket.display()
    )]
    NotServed { socket: PathBuf, source: io::Error },
    #[error("the socket {} is root's: run this as root", socket.display())]
    NotAllowed { socket: PathBuf },
    #[error("cannot speak to the daemon: {0}; its log says more (journalctl -u drupe)")]
    Connection(#[source] tonic::transport::Error),
    #[error("the daemon failed at {call}: {}", status.message())]
    Call { call: &'static str, status: Status },
    #[error("the daemon's answer about pod {pod} is not one of this version; restart the daemon")]
    Answer {
        pod: String,
        source: serde_json::Error,
    },
    #[error("there is no pod {wanted:?}: `drupe pods` lists ids and namespace/name")]
    NoSuchPod { wanted: String },
    #[error("{wanted:?} means more than one pod: {found}; give one's id")]
    Ambiguous { wanted: String, found: String },
    #[error(
        "pod {pod} runs on the node's kernel and has no console: its containers' logs are shown by `crictl logs`"
    )]
    NodesKernel { pod: String },
    #[error("pod {pod} is {state} and has no console: only a pod whose machine runs has one")]
    NoMachine { pod: String, state: &'static str },
    #[error("cannot read the console {}", path.display())]
    Console { path: PathBuf, source: io::Error },
    #[error("cannot follow the console {}", path.display())]
    Follow { path: PathBuf, source: io::Error },
    #[error("handler {handler:?} is not configured; there are: {known}")]
    NoHandler { handler: String, known: String },
    #[error(
        "pods of handler {handler:?} share the node's kernel: they cost nothing beyond their containers but a supervisor"
    )]
    NoOverhead { handler: String },
    #[error("no pod of handler {handler:?} runs: without --running some are started")]
    NothingRuns { handler: String },
    #[error(
        "pod {pod} cannot be measured: it ended, its guest does not answer, or the node has no memory control group; the daemon's log tells more"
    )]
    Ended { pod: String },
    #[error("interrupted; the pods that were started are removed")]
    Interrupted,
    #[error("cannot reach the cluster; name its configuration by --kubeconfig or KUBECONFIG")]
    Kubeconfig(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the cluster did not take RuntimeClass {name}")]
    Apply {
        name: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{}", status.message())]
    Refused { status: Status },
    #[error(
        "the daemon that serves knows no debug shells: it is older than this command; restart it \
         (systemctl restart drupe), pods run on"
    )]
    OldDaemon,
    #[error("the shell broke off: {why}")]
    BrokeOff { why: String },
    #[error("cannot use the terminal")]
    Terminal(#[source] io::Error),
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    #[error("cannot start")]
    Start(#[source] io::Error),
}

impl CliError {
    /// Whoever read the output has enough.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl CliError {
    fn no_handler(handler: &str, config: &Config) -> Self {
        let known: Vec<_> = config.runtimes.keys().map(String::as_str).collect();
        Self::NoHandler {
            handler: handler.to_owned(),
            known: known.join(", "),
        }
    }
}

/// What a verbose PodSandboxStatus tells beside the protocol's fields, as far
/// as it is shown.
#[derive(Debug, Deserialize)]
struct Details {
    pid: Option<u32>,
    handler: String,
    kind: PodKind,
    machine: String,
    phase: PodPhase,
    console: PathBuf,
    timeline: Vec<PhaseTime>,
    /// Absent unless its machine runs.
    overhead: Option<Measured>,
    #[serde(rename = "memoryMiB")]
    memory_mib: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Measured {
    #[serde(flatten)]
    overhead: podsandbox::Overhead,
    proportional_bytes: Option<u64>,
}

/// A pod in full.
struct Pod {
    listed: PodSandbox,
    ips: Vec<String>,
    details: Details,
}

impl Pod {
    fn is_ready(&self) -> bool {
        self.listed.state() == PodSandboxState::SandboxReady
    }

    /// In one word.
    fn state(&self) -> &'static str {
        match self.details.phase {
            PodPhase::Reserved | PodPhase::Starting => "starting",
            PodPhase::Ready if self.is_ready() => "ready",
            PodPhase::Ready => "failed",
            PodPhase::Stopping => "stopping",
            PodPhase::Stopped => "stopped",
            PodPhase::Removing => "removing",
        }
    }

    /// Whether its machine may run: none is started for a pod a second time.
    fn may_run(&self) -> bool {
        matches!(self.state(), "starting" | "ready")
    }
}

struct Daemon {
    client: RuntimeServiceClient<Channel>,
    channel: Channel,
}

impl Daemon {
    async fn connect(socket: &Path) -> Result<Self, CliError> {
        let stream = UnixStream::connect(socket).await.map_err(|source| {
            let socket = socket.to_owned();
            match source.kind() {
                io::ErrorKind::PermissionDenied => CliError::NotAllowed { socket },
                _ => CliError::NotServed { socket, source },
            }
        })?;
        let mut stream = Some(stream);
        let connector = tower::service_fn(move |_| {
            let stream = stream.take();
            async move {
                let stream = stream.ok_or_else(|| io::Error::other("the connection is gone"))?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        // A unix socket needs none, HTTP/2 does.
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connector).await;
        let channel = channel.map_err(CliError::Connection)?;
        let client = RuntimeServiceClient::new(channel.clone());
        Ok(Self {
            channel,
            client: client.max_decoding_message_size(MAX_ANSWER_BYTES),
        })
    }

    /// All pods, the newest first.
    async fn list(&mut self) -> Result<Vec<PodSandbox>, CliError> {
        self.list_labelled(HashMap::new()).await
    }

    /// Those that have these labels.
    async fn list_labelled(
        &mut self,
        label_selector: HashMap<String, String>,
    ) -> Result<Vec<PodSandbox>, CliError> {
        let filter = PodSandboxFilter {
            label_selector,
            ..Default::default()
        };
        let request = within(ListPodSandboxRequest {
            filter: Some(filter),
        });
        let answer = self.client.list_pod_sandbox(request).await;
        let answer = answer.map_err(|status| CliError::Call {
            call: "ListPodSandbox",
            status,
        })?;
        let mut pods = answer.into_inner().items;
        pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
        Ok(pods)
    }

    /// Of all pods; without figures where a guest did not answer.
    async fn stats(&mut self) -> Result<Vec<PodSandboxStats>, CliError> {
        let request = within(ListPodSandboxStatsRequest { filter: None });
        let answer = self.client.list_pod_sandbox_stats(request).await;
        let answer = answer.map_err(|status| CliError::Call {
            call: "ListPodSandboxStats",
            status,
        })?;
        Ok(answer.into_inner().stats)
    }

    /// None: it is gone.
    async fn show(&mut self, mut listed: PodSandbox) -> Result<Option<Pod>, CliError> {
        let request = within(PodSandboxStatusRequest {
            pod_sandbox_id: listed.id.clone(),
            verbose: true,
        });
        let answer = match self.client.pod_sandbox_status(request).await {
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            answer => answer.map_err(|status| CliError::Call {
                call: "PodSandboxStatus",
                status,
            })?,
        };
        let answer = answer.into_inner();
        let info = answer.info.get("info").map_or("", String::as_str);
        let details = serde_json::from_str(info).map_err(|source| CliError::Answer {
            pod: short(&listed.id).to_owned(),
            source,
        })?;
        let status = answer.status.unwrap_or_default();
        listed.state = status.state;
        let ips = status.network.map(|network| {
            let more = network.additional_ips.into_iter().map(|ip| ip.ip);
            std::iter::once(network.ip).chain(more).collect()
        });
        let mut ips: Vec<String> = ips.unwrap_or_default();
        ips.retain(|ip| !ip.is_empty());
        Ok(Some(Pod {
            listed,
            ips,
            details,
        }))
    }
}

fn within<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_WITHIN);
    request
}

fn short(id: &str) -> &str {
    id.get(..SHORT_ID).unwrap_or(id)
}

fn full_name(pod: &PodSandbox) -> String {
    let none = PodSandboxMetadata::default();
    let name = pod.metadata.as_ref().unwrap_or(&none);
    format!("{}/{}", name.namespace, name.name)
}

/// The pod that is meant by the beginning of an id or by `namespace/name`. Of
/// those with one name, which a restarted pod has, the one that is ready.
fn choose(pods: Vec<PodSandbox>, wanted: &str) -> Result<PodSandbox, CliError> {
    let by_name = wanted.contains('/');
    let is_meant = |pod: &PodSandbox| {
        if by_name {
            full_name(pod) == wanted
        } else {
            pod.id.starts_with(wanted)
        }
    };
    let mut found: Vec<_> = pods.into_iter().filter(is_meant).collect();
    if by_name && found.len() > 1 {
        let ready = |pod: &PodSandbox| pod.state() == PodSandboxState::SandboxReady;
        if found.iter().filter(|pod| ready(pod)).count() == 1 {
            found.retain(ready);
        }
    }
    match found.pop() {
        None => Err(CliError::NoSuchPod {
            wanted: wanted.to_owned(),
        }),
        Some(pod) if found.is_empty() => Ok(pod),
        Some(last) => {
            found.push(last);
            let named = found.iter().take(NAMED_PODS);
            let named = named.map(|pod| format!("{} ({})", short(&pod.id), full_name(pod)));
            let mut named: Vec<_> = named.collect();
            if found.len() > NAMED_PODS {
                named.push(format!("and {} more", found.len() - NAMED_PODS));
            }
            Err(CliError::Ambiguous {
                wanted: wanted.to_owned(),
                found: named.join(", "),
            })
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::Start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, name: &str, state: PodSandboxState) -> PodSandbox {
        PodSandbox {
            id: id.to_owned(),
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                namespace: "shop".to_owned(),
                ..Default::default()
            }),
            state: state.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_is_found_by_the_beginning_of_its_id_or_by_its_name() {
        use PodSandboxState::{SandboxNotready as Gone, SandboxReady as Ready};
        let pods = || {
            vec![
                pod("aa11", "web", Gone),
                pod("aa22", "web", Ready),
                pod("bb33", "db", Gone),
                pod("bb44", "db", Gone),
            ]
        };
        let found = |wanted: &str| choose(pods(), wanted).map(|pod| pod.id);
        assert_eq!(found("aa1").unwrap(), "aa11");
        assert_eq!(found("shop/web").unwrap(), "aa22");
        assert!(matches!(found("web"), Err(CliError::NoSuchPod { .. })));
        assert!(matches!(found("/web"), Err(CliError::NoSuchPod { .. })));
        for wanted in ["aa", "shop/db"] {
            let error = found(wanted).unwrap_err();
            assert!(matches!(error, CliError::Ambiguous { .. }), "{error}");
        }
        let many = (0..20)
            .map(|n| pod(&format!("cc{n}"), "x", Ready))
            .collect();
        let error = choose(many, "cc").unwrap_err().to_string();
        assert!(error.contains("and 15 more"), "{error}");
    }
}
