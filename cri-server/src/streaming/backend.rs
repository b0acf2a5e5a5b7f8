//! The real pods.

use podsandbox::{AttachOptions, ExecOptions, PodManager, Session};

use super::session::{AttachRequest, Backend, ExecRequest, Socket};

#[tonic::async_trait]
impl Backend for PodManager {
    async fn exec(&self, request: ExecRequest) -> Result<Session, String> {
        let options = ExecOptions {
            container_id: request.container_id,
            argv: request.argv,
            tty: request.wanted.tty,
            size: None,
            stdin: request.wanted.stdin,
            stdout: request.wanted.stdout,
            stderr: request.wanted.stderr,
        };
        Self::exec(self, options).await.map_err(|e| e.sentence())
    }

    async fn attach(&self, request: AttachRequest) -> Result<Session, String> {
        let options = AttachOptions {
            container_id: request.container_id,
            stdin: request.wanted.stdin,
            stdout: request.wanted.stdout,
            stderr: request.wanted.stderr,
        };
        Self::attach(self, options).await.map_err(|e| e.sentence())
    }

    async fn port_forward(&self, pod_id: &str, port: u16) -> Result<Box<dyn Socket>, String> {
        let socket = Self::port_forward(self, pod_id, port).await;
        Ok(Box::new(socket.map_err(|e| e.sentence())?))
    }
}
