//! ConfigureSandbox: host name, name resolution and kernel parameters of the
//! pod, in the namespaces that this process stands in.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use agent_api::ConfigureSandboxRequest;
use drupe_agent::sandbox::{SandboxError, etc_files, set_hostname, set_sysctls};
use drupe_agent::server::sentence;
use tokio::sync::Mutex;
use tonic::{Code, Status};

use crate::pod::Containers;

const HOSTS: &str = "/etc/hosts";

/// What the pod was configured with, once it was.
#[derive(Default)]
pub struct Sandbox {
    /// Held while it is being configured, so that it happens once.
    configured: Mutex<Option<ConfigureSandboxRequest>>,
}

impl Sandbox {
    pub async fn configure(
        &self,
        mut request: ConfigureSandboxRequest,
        containers: &Containers,
    ) -> Result<(), Status> {
        let mut configured = self.configured.lock().await;
        // The clock is the host's.
        request.time_unix_nanos = 0;
        if let Some(known) = &*configured {
            return if *known == request {
                Ok(())
            } else {
                Err(status(&SandboxError::Changed))
            };
        }
        set_up(&request, containers).map_err(|error| status(&error))?;
        if request.share_process_namespace {
            containers.share_pid_namespace()?;
        }
        *configured = Some(request);
        Ok(())
    }

    pub async fn is_configured(&self) -> bool {
        self.configured.lock().await.is_some()
    }
}

fn set_up(request: &ConfigureSandboxRequest, containers: &Containers) -> Result<(), SandboxError> {
    let host_network = containers.inner.host_network;
    if !host_network {
        set_hostname(&request.hostname)?;
    }
    let dir = containers.inner.dir.join(agent_api::POD_ETC);
    let write = |path: PathBuf, text: &str| {
        // For every user of every container, whatever the umask.
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)))
            .map_err(|source| SandboxError::Write { path, source })
    };
    match fs::create_dir(&dir) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(SandboxError::Write { path: dir, source });
        }
        _ => {}
    }
    for (name, text) in etc_files(request)? {
        // In the host's network its names are the host's.
        let of_host = (name == "hosts" && host_network)
            .then(|| fs::read_to_string(HOSTS).ok())
            .flatten();
        write(dir.join(name), of_host.as_deref().unwrap_or(&text))?;
    }
    set_sysctls(request, None)
}

fn status(error: &SandboxError) -> Status {
    let code = match error {
        SandboxError::Changed => Code::FailedPrecondition,
        SandboxError::Hostname { .. }
        | SandboxError::LineBreak { .. }
        | SandboxError::SysctlName { .. }
        | SandboxError::Sysctl { .. } => Code::InvalidArgument,
        _ => Code::Internal,
    };
    Status::new(code, sentence(error))
}
