//! Root shells in pods' guests for the operator of the node: the service
//! `drupe.v1.Debug` beside CRI on the daemon's socket, which `drupe debug` calls.
//! Whoever may open the socket is root of the node and could have all that by
//! other ways; the configuration says whether the daemon offers this one.

mod session;

use std::pin::Pin;

use drupe_api::v1::debug_server::Debug;
use drupe_api::v1::shell_request::Request as Asked;
use drupe_api::v1::{ShellBegin, ShellRequest, ShellResponse, TerminalSize};
use drupe_api::{MAX_MESSAGE_BYTES, QUEUE};
use podsandbox::{PodManager, ShellOptions};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, Streaming};

use session::{Caller, Client};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DebugConfig {
    /// Whether `drupe debug` is served.
    pub shells: bool,
}

pub type DebugServer = drupe_api::v1::debug_server::DebugServer<Shells>;

pub struct Shells {
    config: DebugConfig,
    pods: PodManager,
    stopping: CancellationToken,
}

impl Shells {
    pub fn server(
        config: &DebugConfig,
        pods: PodManager,
        stopping: CancellationToken,
    ) -> DebugServer {
        let shells = Self {
            config: config.clone(),
            pods,
            stopping,
        };
        DebugServer::new(shells)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn check_allowed(&self) -> Result<(), Status> {
        if self.config.shells {
            return Ok(());
        }
        Err(Status::failed_precondition(
            "debug shells are off on this node: set debug.shells to true in the daemon's \
             configuration and restart it (systemctl restart drupe); pods run on",
        ))
    }
}

#[tonic::async_trait]
impl Debug for Shells {
    type ShellStream = Pin<Box<ReceiverStream<Result<ShellResponse, Status>>>>;

    async fn shell(
        &self,
        request: Request<Streaming<ShellRequest>>,
    ) -> Result<Response<Self::ShellStream>, Status> {
        self.check_allowed()?;
        let peer = request.extensions().get::<UdsConnectInfo>();
        let caller = Caller::of(peer.and_then(|peer| peer.peer_cred));
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let options = match first.and_then(|first| first.request) {
            Some(Asked::Begin(begin)) => options(begin)?,
            _ => return Err(Status::invalid_argument("the first request is not `begin`")),
        };
        let (answers, receiver) = mpsc::channel(QUEUE);
        // A task of its own: what it makes is removed when the client has gone,
        // with whom this call goes.
        tokio::spawn(session::serve(
            self.pods.clone(),
            options,
            caller,
            Client { requests, answers },
            self.stopping.clone(),
        ));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

fn options(begin: ShellBegin) -> Result<ShellOptions, Status> {
    if begin.pod_id.is_empty() {
        return Err(Status::invalid_argument("begin.pod_id is missing"));
    }
    Ok(ShellOptions {
        pod: begin.pod_id,
        image: Some(begin.image).filter(|image| !image.is_empty()),
        command: begin.command,
        terminal: begin.terminal.map(size),
    })
}

/// Width and height.
fn size(size: TerminalSize) -> (u16, u16) {
    let cut = |size| u16::try_from(size).unwrap_or(u16::MAX);
    (cut(size.width), cut(size.height))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_open_is_the_daemons_to_choose() {
        let begin = ShellBegin {
            pod_id: "p".to_owned(),
            ..ShellBegin::default()
        };
        let open = ShellOptions {
            pod: "p".to_owned(),
            ..ShellOptions::default()
        };
        assert_eq!(options(begin).unwrap(), open);
        let terminal = Some(TerminalSize {
            width: 80,
            height: 1 << 20,
        });
        let begin = ShellBegin {
            pod_id: "p".to_owned(),
            image: "tools".to_owned(),
            command: vec!["ps".to_owned()],
            terminal,
        };
        let all = ShellOptions {
            pod: "p".to_owned(),
            image: Some("tools".to_owned()),
            command: vec!["ps".to_owned()],
            terminal: Some((80, u16::MAX)),
        };
        assert_eq!(options(begin).unwrap(), all);
        let error = options(ShellBegin::default()).unwrap_err();
        assert!(error.message().contains("pod_id"), "{error}");
    }
}
