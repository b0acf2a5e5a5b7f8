//! What the protocols need from the pods: a process's streams, its end, and a
//! dialled port.

use tokio::io::{AsyncRead, AsyncWrite};

pub use podsandbox::Session;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ExecRequest {
    pub container_id: String,
    pub argv: Vec<String>,
    pub wanted: Wanted,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AttachRequest {
    pub container_id: String,
    pub wanted: Wanted,
}

#[derive(Clone, Debug, PartialEq)]
pub struct PortForwardRequest {
    pub pod_id: String,
    /// Those that a client of the WebSocket channels gets; others name theirs
    /// as they go.
    pub ports: Vec<u16>,
}

/// A connection to a port inside a pod.
pub trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// The pods. An error is one sentence for the client.
#[tonic::async_trait]
pub trait Backend: Send + Sync + 'static {
    async fn exec(&self, request: ExecRequest) -> Result<Session, String>;
    async fn attach(&self, request: AttachRequest) -> Result<Session, String>;
    async fn port_forward(&self, pod_id: &str, port: u16) -> Result<Box<dyn Socket>, String>;
}
