//! ConfigureSandbox: turns a booted guest into one pod.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agent_api::{ConfigureSandboxRequest, Dns};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::unistd::chown;
use tokio::sync::Mutex;

use crate::clock;
use crate::container::{self, Containers, ETC_DIR, ETC_FILES, SHM, sysctl_path};
use crate::network::{self, Interface, NetworkError};
use crate::sys;
use crate::userns::{Holder, IdRange, UserNamespace, UserNsError};

/// What a container finds in /dev/shm when the pod does not say.
pub const DEFAULT_SHM_BYTES: u64 = 64 * 1024 * 1024;

/// `HOST_NAME_MAX` of Linux.
const MAX_HOSTNAME: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("the pod was configured already, otherwise")]
    Changed,
    #[error("cannot set the clock to {nanos} ns")]
    Clock { nanos: i64, source: Errno },
    #[error("{name:?} is no host name")]
    Hostname { name: String },
    #[error("cannot set the host name {name:?}")]
    SetHostname { name: String, source: Errno },
    #[error("{field} {value:?} contains a line break")]
    LineBreak { field: &'static str, value: String },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("kernel parameter {name:?} is not a name with dots")]
    SysctlName { name: String },
    #[error("cannot set the kernel parameter {name} to {value:?}")]
    Sysctl {
        name: String,
        value: String,
        source: io::Error,
    },
    #[error("cannot size /dev/shm to {bytes} bytes")]
    Shm { bytes: u64, source: Errno },
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("cannot share a PID namespace")]
    Pid(#[source] Box<container::Error>),
    #[error(transparent)]
    User(#[from] UserNsError),
    #[error("cannot give {path} to root of the pod's containers")]
    Own { path: PathBuf, source: Errno },
}

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
    ) -> Result<(), SandboxError> {
        let mut configured = self.configured.lock().await;
        let nanos = std::mem::take(&mut request.time_unix_nanos);
        if let Some(known) = &*configured {
            return if *known == request {
                Ok(())
            } else {
                Err(SandboxError::Changed)
            };
        }
        set_time(nanos)?;
        let interface = request
            .interface
            .as_ref()
            .map(Interface::parse)
            .transpose()?;
        let ids = request.user_namespace.as_ref().map(IdRange::parse);
        let ids = ids.transpose()?;
        // One that a configuration has made which failed later is still there.
        if let Some(ids) = ids.filter(|_| !containers.has_user_namespace()) {
            let user = make_user_namespace(ids, interface.as_ref()).await?;
            containers.use_user_namespace(user);
        }
        set_hostname(&request.hostname)?;
        write_etc(&request)?;
        set_shm(request.shm_bytes)?;
        if let Some(ids) = ids {
            own_files(ids)?;
        }
        match interface {
            Some(interface) => network::configure(interface, || set_sysctls(&request, ids)).await?,
            None => set_sysctls(&request, ids)?,
        }
        if request.share_process_namespace {
            containers
                .share_pid_namespace()
                .map_err(|e| SandboxError::Pid(Box::new(e)))?;
        }
        *configured = Some(request);
        Ok(())
    }

    pub async fn is_configured(&self) -> bool {
        self.configured.lock().await.is_some()
    }
}

/// From here on the agent stands in the pod's network, IPC and UTS namespaces.
async fn make_user_namespace(
    ids: IdRange,
    interface: Option<&Interface>,
) -> Result<UserNamespace, SandboxError> {
    let holder = Holder::start(ids)?;
    if let Some(interface) = interface {
        network::move_to(interface, holder.pid()).await?;
    }
    let user = holder.enter()?;
    network::loopback_up().await?;
    Ok(user)
}

/// What all containers get of the agent's is theirs, as it is without a user
/// namespace.
fn own_files(ids: IdRange) -> Result<(), SandboxError> {
    let root = ids.root();
    let etc = ETC_FILES.map(|name| Path::new(ETC_DIR).join(name));
    let shm = PathBuf::from(OsStr::from_bytes(SHM.to_bytes()));
    for path in etc.into_iter().chain([shm]) {
        let own = chown(&path, Some(root.into()), Some(root.into()));
        own.map_err(|source| SandboxError::Own { path, source })?;
    }
    Ok(())
}

pub fn set_time(nanos: i64) -> Result<(), SandboxError> {
    clock::set(nanos).map_err(|source| SandboxError::Clock { nanos, source })
}

pub fn set_hostname(name: &str) -> Result<(), SandboxError> {
    let fine = (1..=MAX_HOSTNAME).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if !fine {
        return Err(SandboxError::Hostname {
            name: name.to_owned(),
        });
    }
    nix::unistd::sethostname(name).map_err(|source| SandboxError::SetHostname {
        name: name.to_owned(),
        source,
    })
}

fn set_shm(bytes: u64) -> Result<(), SandboxError> {
    if bytes == 0 || bytes == DEFAULT_SHM_BYTES {
        return Ok(());
    }
    let options = format!("size={bytes}");
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        None::<&str>,
        SHM,
        None::<&str>,
        flags,
        Some(options.as_str()),
    )
    .map_err(|source| SandboxError::Shm { bytes, source })
}

pub fn set_sysctls(
    request: &ConfigureSandboxRequest,
    ids: Option<IdRange>,
) -> Result<(), SandboxError> {
    // Sorted, so that a failure is the same one each time.
    let mut sysctls: Vec<_> = request.sysctls.iter().collect();
    sysctls.sort();
    for (name, value) in sysctls {
        let path =
            sysctl_path(name).ok_or_else(|| SandboxError::SysctlName { name: name.clone() })?;
        let written = match (fs::write(&path, value), ids) {
            // Those of an IPC namespace are its root's, whatever capabilities
            // another has (ipc/ipc_sysctl.c, `ipc_permissions`).
            (Err(error), Some(ids)) if error.kind() == io::ErrorKind::PermissionDenied => {
                sys::with_effective_uid(ids.root(), || fs::write(&path, value))
            }
            (written, _) => written,
        };
        written.map_err(|source| SandboxError::Sysctl {
            name: name.clone(),
            value: value.clone(),
            source,
        })?;
    }
    Ok(())
}

fn write_etc(request: &ConfigureSandboxRequest) -> Result<(), SandboxError> {
    for (name, text) in etc_files(request)? {
        let path = Path::new(ETC_DIR).join(name);
        fs::write(&path, text).map_err(|source| SandboxError::Write { path, source })?;
    }
    Ok(())
}

/// The files of /etc that containers are given.
pub fn etc_files(
    request: &ConfigureSandboxRequest,
) -> Result<[(&'static str, String); 3], SandboxError> {
    let dns = request.dns.clone().unwrap_or_default();
    let addresses = request
        .interface
        .iter()
        .flat_map(|interface| &interface.addresses);
    Ok([
        (
            "hosts",
            hosts(&request.hostname, addresses.map(String::as_str)),
        ),
        ("resolv.conf", resolv_conf(&dns)?),
        ("hostname", format!("{}\n", request.hostname)),
    ])
}

fn hosts<'a>(hostname: &str, addresses: impl Iterator<Item = &'a str>) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    let mut own = 0;
    for address in addresses {
        // Checked again, and told about, where the interface is set up.
        let address = address.split('/').next().unwrap_or_default();
        if let Ok(address) = address.parse::<IpAddr>() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{address}\t{hostname}");
            own += 1;
        }
    }
    if own == 0 {
        let _ = writeln!(text, "127.0.0.1\t{hostname}");
    }
    text
}

/// resolv.conf(5).
fn resolv_conf(dns: &Dns) -> Result<String, SandboxError> {
    for (field, values) in [
        ("DNS server", &dns.servers),
        ("DNS search domain", &dns.searches),
        ("DNS option", &dns.options),
    ] {
        if let Some(value) = values.iter().find(|value| value.contains(['\n', '\r'])) {
            return Err(SandboxError::LineBreak {
                field,
                value: value.clone(),
            });
        }
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_finds_itself_in_hosts() {
        let text = hosts("web-0", ["10.1.0.5/24", "fd00::5/64"].into_iter());
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.1.0.5\tweb-0\nfd00::5\tweb-0\n"));
        assert!(hosts("web-0", [].into_iter()).ends_with("127.0.0.1\tweb-0\n"));
    }

    #[test]
    fn resolv_conf_has_search_servers_and_options() {
        let dns = Dns {
            servers: vec!["10.96.0.10".into(), "fd00::10".into()],
            searches: vec!["default.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "search default.svc svc\nnameserver 10.96.0.10\nnameserver fd00::10\noptions ndots:5\n"
        );
        let dns = Dns {
            servers: vec!["1.1.1.1\nnameserver 6.6.6.6".into()],
            ..Dns::default()
        };
        assert!(matches!(
            resolv_conf(&dns),
            Err(SandboxError::LineBreak { .. })
        ));
    }

    #[test]
    fn host_names_are_words() {
        for bad in ["", "a b", "a\n", &"x".repeat(65)] {
            assert!(
                matches!(set_hostname(bad), Err(SandboxError::Hostname { .. })),
                "{bad}"
            );
        }
    }
}
