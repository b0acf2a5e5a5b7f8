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

use crate::error::Error;
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
        // In the host's network its names are the host's.
        let hosts = match containers.inner.host_network {
            true => hosts_of_host()?,
            false => None,
        };
        set_up(&request, hosts, containers).map_err(|error| status(&error))?;
        if request.share_process_namespace {
            drop(containers.share_pid_namespace().await?);
        }
        *configured = Some(request);
        Ok(())
    }

    pub async fn is_configured(&self) -> bool {
        self.configured.lock().await.is_some()
    }
}

fn set_up(
    request: &ConfigureSandboxRequest,
    mut hosts: Option<String>,
    containers: &Containers,
) -> Result<(), SandboxError> {
    if !containers.inner.host_network {
        set_hostname(&request.hostname)?;
    }
    let dir = &containers.inner.etc;
    let write = |path: PathBuf, text: &str| {
        // For every user of every container, whatever the umask.
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)))
            .map_err(|source| SandboxError::Write { path, source })
    };
    match fs::create_dir(dir) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            let path = dir.clone();
            return Err(SandboxError::Write { path, source });
        }
        _ => {}
    }
    for (name, text) in etc_files(request)? {
        let text = match name {
            "hosts" => hosts.take().unwrap_or(text),
            _ => text,
        };
        write(dir.join(name), &text)?;
    }
    set_sysctls(request, None)
}

/// None on a node without the file.
fn hosts_of_host() -> Result<Option<String>, Error> {
    match fs::read(HOSTS) {
        // Names of another encoding are of no use to anyone in there.
        Ok(text) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::File {
            action: "read",
            path: HOSTS.into(),
            source,
        }),
    }
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
