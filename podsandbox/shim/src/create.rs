//! CreateContainer: the bundle that the runtime is given at the start. The
//! daemon has mounted its root file system.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};

use agent_api::{ContainerState, CreateContainerRequest, PID_OF, PID_OF_POD, User};
use drupe_agent::container::user::{self, Resolved};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec, UserBuilder};
use tokio::sync::watch;

use crate::container::{Container, Phase, State};
use crate::error::Error;
use crate::layer::Layer;
use crate::pod::{Containers, MAX_CONTAINERS, Slot, write};

/// What the runtime reads.
pub const CONFIG: &str = "config.json";

/// Takes its id for as long as a container is being created.
struct Reservation {
    containers: Containers,
    id: String,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut slots = self.containers.slots();
        if let Some(Slot::Creating) = slots.get(&self.id) {
            slots.remove(&self.id);
        }
    }
}

impl Containers {
    pub async fn create(&self, request: CreateContainerRequest) -> Result<ContainerState, Error> {
        check_id(&request.id)?;
        let reservation = self.reserve(&request.id)?;
        let container = Arc::new(self.build(request).await?);
        let state = container.to_api();
        let slot = Slot::Ready(container);
        self.slots().insert(reservation.id.clone(), slot);
        Ok(state)
    }

    fn reserve(&self, id: &str) -> Result<Reservation, Error> {
        let mut slots = self.slots();
        if slots.contains_key(id) {
            return Err(Error::Exists { id: id.to_owned() });
        }
        if slots.len() >= MAX_CONTAINERS {
            return Err(Error::TooMany);
        }
        slots.insert(id.to_owned(), Slot::Creating);
        Ok(Reservation {
            containers: self.clone(),
            id: id.to_owned(),
        })
    }

    async fn build(&self, request: CreateContainerRequest) -> Result<Container, Error> {
        let mut spec: Spec = serde_json::from_slice(&request.oci_spec)?;
        let process = spec.process().clone();
        let mut process = process.ok_or(Error::Missing { field: "process" })?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(Error::Missing {
                field: "process.args",
            });
        }
        let root = spec.root().as_ref().map(|root| root.path().clone());
        let root = root.ok_or(Error::Missing { field: "root" })?;
        let bundle = root.parent().unwrap_or(Path::new("/")).to_owned();
        let opened = File::open(&root).map_err(|source| Error::File {
            action: "open",
            path: root.clone(),
            source,
        })?;
        let user = user::resolve_in(opened.as_fd(), &requested(&request))?;
        become_user(&mut process, &user)?;
        spec.set_process(Some(process.clone()));
        let joined = self.place_pid_namespace(&mut spec).await?;
        write(&bundle.join(CONFIG), &serde_json::to_vec(&spec)?)?;
        // The layer that it writes to, for its size.
        let link = bundle.join(agent_api::UPPER_LINK);
        let upper = fs::read_link(&link).map_err(|source| Error::File {
            action: "read",
            path: link,
            source,
        })?;
        Ok(Container {
            cgroup: self.inner.cgroup.below(&request.id),
            id: request.id,
            process,
            user,
            stdin: request.stdin || request.stdin_once,
            stdin_once: request.stdin_once,
            log: request.log,
            terminals: OnceLock::new(),
            outputs: Default::default(),
            ended: watch::Sender::new(false),
            published: watch::Sender::new(false),
            state: Mutex::new(State {
                phase: Phase::Created,
                pid: 0,
                started_at: 0,
                exit: None,
            }),
            starting: tokio::sync::Mutex::default(),
            removing: tokio::sync::Mutex::default(),
            supervisor: Mutex::default(),
            execs: AtomicU64::new(0),
            oom_score: Mutex::default(),
            layer: Layer::new(upper),
            _joined: joined,
            namespace: OnceLock::new(),
            bundle,
        })
    }

    /// The PID namespace of a spec may be the one that the pod's containers
    /// share, or another container's. The one that is joined comes back, for
    /// the path in the spec to be good until the start: a process's id may be
    /// another's by then.
    async fn place_pid_namespace(&self, spec: &mut Spec) -> Result<Option<OwnedFd>, Error> {
        let mut linux = spec.linux().clone().unwrap_or_default();
        let mut all = linux.namespaces().clone().unwrap_or_default();
        let listed = all.iter_mut().find(|n| n.typ() == LinuxNamespaceType::Pid);
        let Some(namespace) = listed else {
            return Ok(None);
        };
        let named = namespace.path().as_ref().and_then(|path| path.to_str());
        let joined = match named {
            Some(PID_OF_POD) => self.share_pid_namespace().await?,
            Some(path) => {
                let unknown = || Error::Unknown {
                    id: path.to_owned(),
                };
                let target = self.get(path.strip_prefix(PID_OF).ok_or_else(unknown)?)?;
                target.check_running()?;
                let of_target = target.namespace.get();
                // One that ended at once has none to join.
                let of_target =
                    of_target.ok_or_else(|| target.in_phase(Phase::Exited, Phase::Running))?;
                of_target.try_clone().map_err(|source| Error::File {
                    action: "join the PID namespace of",
                    path: target.id.clone().into(),
                    source,
                })?
            }
            None => return Ok(None),
        };
        namespace.set_path(Some(by_fd(&joined)));
        linux.set_namespaces(Some(all));
        spec.set_linux(Some(linux));
        Ok(Some(joined))
    }
}

/// For other processes, the runtime's.
fn by_fd(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/{}/fd/{}", process::id(), fd.as_raw_fd()))
}

fn requested(request: &CreateContainerRequest) -> User {
    request.user.clone().unwrap_or_default()
}

fn become_user(process: &mut Process, user: &Resolved) -> Result<(), Error> {
    let resolved = UserBuilder::default()
        .uid(user.uid)
        .gid(user.gid)
        .additional_gids(user.groups.clone())
        .build()?;
    process.set_user(resolved);
    let mut env = process.env().clone().unwrap_or_default();
    if let Some(home) = &user.home
        && !env.iter().any(|entry| entry.starts_with("HOME="))
    {
        env.push(format!("HOME={home}"));
        process.set_env(Some(env));
    }
    Ok(())
}

/// Ids become names of files and directories, and words on the log port.
fn check_id(id: &str) -> Result<(), Error> {
    const MAX_ID: usize = 128;
    let fine = (1..=MAX_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric());
    if fine {
        Ok(())
    } else {
        Err(Error::Id { id: id.to_owned() })
    }
}
