//! The server as clients see it, over loopback, with pods made up here.

mod crowd;
mod http;
mod port_forward;
mod remote_command;
mod spdy;
mod websocket;

use std::time::Duration;

use tokio::time::timeout;

use super::hostile::Pods;
use super::session::{ExecRequest, PortForwardRequest, Wanted};
use super::{Streaming, StreamingConfig};

const LONG: Duration = Duration::from_secs(20);

/// A test's step that hangs is a failure.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(LONG, work).await.expect("in time")
}

async fn server(pods: &Pods) -> Streaming {
    Streaming::start(&StreamingConfig::default(), pods.clone())
        .await
        .unwrap()
}

fn exec(argv: &[&str], streams: &str) -> ExecRequest {
    ExecRequest {
        container_id: "c".to_owned(),
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        wanted: Wanted {
            tty: streams.contains('t'),
            stdin: streams.contains('i'),
            stdout: streams.contains('o'),
            stderr: streams.contains('e'),
        },
    }
}

fn forward(ports: &[u16]) -> PortForwardRequest {
    PortForwardRequest {
        pod_id: "p".to_owned(),
        ports: ports.to_vec(),
    }
}
