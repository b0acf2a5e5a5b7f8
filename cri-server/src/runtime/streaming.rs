//! Exec, Attach and PortForward: checked here, carried out when the client
//! comes to the address that is the answer.

use cri_api::v1;
use podsandbox::record::ContainerPhase;
use tonic::Status;

use super::Runtime;
use crate::convert::{error, invalid};
use crate::streaming::{AttachRequest, ExecRequest, PortForwardRequest, TooManyTokens, Wanted};

impl Runtime {
    pub(super) fn exec_address(&self, request: v1::ExecRequest) -> Result<String, Status> {
        let wanted = Wanted {
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        check(wanted)?;
        if request.cmd.is_empty() {
            return Err(invalid("cmd", "is empty"));
        }
        let exec = ExecRequest {
            container_id: self.running_container(&request.container_id)?,
            argv: request.cmd,
            wanted,
        };
        self.streaming.exec(exec).map_err(too_many)
    }

    pub(super) fn attach_address(&self, request: v1::AttachRequest) -> Result<String, Status> {
        let wanted = Wanted {
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        check(wanted)?;
        let attach = AttachRequest {
            container_id: self.running_container(&request.container_id)?,
            wanted,
        };
        self.streaming.attach(attach).map_err(too_many)
    }

    pub(super) fn port_forward_address(
        &self,
        request: v1::PortForwardRequest,
    ) -> Result<String, Status> {
        let ports = request.port.into_iter().map(|port| {
            let port = u16::try_from(port).ok().filter(|port| *port != 0);
            port.ok_or_else(|| invalid("port", "is not in 1 to 65535"))
        });
        let ports = ports.collect::<Result<_, _>>()?;
        if request.pod_sandbox_id.is_empty() {
            return Err(invalid("pod_sandbox_id", "is missing"));
        }
        let pod = self.pods.pod(&request.pod_sandbox_id).map_err(error::pod)?;
        if !pod.is_ready() {
            return Err(Status::failed_precondition(format!(
                "pod {} is not ready",
                pod.pod.id
            )));
        }
        let forward = PortForwardRequest {
            pod_id: pod.pod.id.clone(),
            ports,
        };
        self.streaming.port_forward(forward).map_err(too_many)
    }

    /// Its full id.
    fn running_container(&self, id: &str) -> Result<String, Status> {
        if id.is_empty() {
            return Err(invalid("container_id", "is missing"));
        }
        let (_, container) = self.pods.container(id).map_err(error::pod)?;
        if container.phase != ContainerPhase::Running {
            return Err(Status::failed_precondition(format!(
                "container {} is not running",
                container.id
            )));
        }
        Ok(container.id.clone())
    }
}

fn check(wanted: Wanted) -> Result<(), Status> {
    if wanted.tty && wanted.stderr {
        return Err(invalid(
            "stderr",
            "a terminal has no separate standard error",
        ));
    }
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return Err(invalid("stdin, stdout, stderr", "one must be asked for"));
    }
    Ok(())
}

fn too_many(error: TooManyTokens) -> Status {
    Status::resource_exhausted(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_that_cannot_be_are_refused() {
        let wanted = |tty, stdin, stdout, stderr| Wanted {
            tty,
            stdin,
            stdout,
            stderr,
        };
        assert!(check(wanted(true, true, true, false)).is_ok());
        assert!(check(wanted(false, false, false, true)).is_ok());
        for bad in [
            wanted(true, true, true, true),
            wanted(false, false, false, false),
            wanted(true, false, false, false),
        ] {
            let code = check(bad).unwrap_err().code();
            assert_eq!(code, tonic::Code::InvalidArgument, "{bad:?}");
        }
    }
}
