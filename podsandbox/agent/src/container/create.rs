//! CreateContainer: root mounted, process made, set up, and waiting.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_api::{ContainerState, CreateContainerRequest, SHARED_DIR, User};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::fstat;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_vsock::VsockStream;

use super::devices::{self, Guard};
use super::instance::{Phase, State};
use super::launch::{self, PidNamespace};
use super::mounts::MountError;
use super::plan::{Entry, Plan, SeccompFilter, Stdio};
use super::spec::{self, ContainerSpec, Pids};
use super::stdin::Stdin;
use super::stdio::{self, LogToken, Source, StdioError};
use super::supervise::{Vigil, supervise};
use super::user::Resolved;
use super::volumes::Held;
use super::{
    Container, Containers, Error, MAX_CONTAINERS, Outputs, Slot, check_id, node_devices, seccomp,
    user,
};
use crate::cgroup::{Cgroup, POD};
use crate::rootfs::{Rootfs, SCRATCH, Trees};
use crate::stats::FsUsage;
use crate::userns::UserNamespace;

/// A child that sets itself up takes milliseconds; one that hangs in a mount
/// of the shared directory takes for ever.
pub const SETUP_TIMEOUT: Duration = Duration::from_secs(15);

/// Where a place in the guest has the guest's own files: as a link, since a mount
/// of them would hold what the agent has long unmounted, other containers'
/// volumes above all, and would not show what it mounts later.
const GUEST_FILES: [&CStr; 2] = [c"/proc/1/root", c"/guest"];

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
        drop(slots);
        self.containers.inner.settled.notify_waiters();
    }
}

impl Containers {
    /// Runs to its end even when the caller gives up.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<ContainerState, Error> {
        check_id(&request.id)?;
        let reservation = self.reserve(&request.id)?;
        let containers = self.clone();
        tokio::spawn(async move {
            let container = containers.build(request).await?;
            let state = container.to_api();
            let slot = Slot::Ready(container);
            containers.slots().insert(reservation.id.clone(), slot);
            drop(reservation);
            Ok(state)
        })
        .await?
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

    async fn build(&self, request: CreateContainerRequest) -> Result<Arc<Container>, Error> {
        let mut spec = ContainerSpec::parse(&request.oci_spec)?;
        let user = self.user_for(request.guest).map(Arc::as_ref);
        let (mut rootfs, trees) = Rootfs::mount(
            &request.id,
            request.root.as_ref(),
            &request.image_volumes,
            user,
        )
        .await?;
        let mut made = None;
        let result = match node_devices::resolve(&request.devices, &mut rootfs).await {
            Ok(devices) => {
                spec.add_devices(devices);
                self.build_on(&request, &spec, &rootfs, trees, &mut made)
                    .await
            }
            Err(error) => Err(error.into()),
        };
        let failed = match result {
            Ok(parts) => return Ok(self.follow(request.id, parts, rootfs)),
            Err(error) => error,
        };
        // Last made, first undone; each is tried whatever became of the other.
        if let Some(cgroup) = made
            && let Err(error) = cgroup.kill().await.and_then(|()| cgroup.remove())
        {
            eprintln!("drupe-agent: container {}: {error}", request.id);
        }
        if let Err(error) = rootfs.remove().await {
            eprintln!("drupe-agent: container {}: {error}", request.id);
        }
        Err(failed)
    }

    /// Leaves the cgroup, which has every process in it, in `made` when it
    /// fails.
    async fn build_on(
        &self,
        request: &CreateContainerRequest,
        spec: &ContainerSpec,
        rootfs: &Rootfs,
        trees: Trees,
        made: &mut Option<Cgroup>,
    ) -> Result<Parts, Error> {
        let id = &request.id;
        let users = self.user_for(request.guest);
        let user = user::resolve_in(trees.root.as_fd(), &requested_user(request, spec))?;
        let owner = owner(&user, users)?;
        let identity = spec.identity(&user, self.seccomp_filter(spec)?)?;
        let envp = Arc::new(spec.environment(&user)?);

        let cgroup = made.insert(Cgroup::create(PathBuf::from(POD).join(id))?);
        cgroup.prepare(spec.resources())?;
        if let Some(users) = users.filter(|_| spec.has_writable_cgroup()) {
            cgroup.delegate(users.ids().root())?;
        }
        self.device_guard(spec)?.attach(cgroup.dir().as_fd())?;
        self.inner
            .oom
            .add(id, cgroup.path())
            .map_err(|source| Error::Oom {
                id: id.clone(),
                source,
            })?;

        let terminal = spec.terminal();
        let reads = request.stdin || request.stdin_once;
        let (stdio, stdin, outputs) = match terminal {
            Some((rows, columns)) => {
                let console = true;
                let stdio = Stdio::Terminal {
                    rows,
                    columns,
                    console,
                };
                (stdio, None, Vec::new())
            }
            None => {
                let streams = stdio::streams(owner, reads)?;
                (Stdio::Files(streams.child), streams.stdin, streams.outputs)
            }
        };
        let (ours, theirs) = launch::channel()?;
        let shared = Path::new(SHARED_DIR);
        let (sources, propagates) = spec.volumes();
        let root = match propagates {
            true => Some(fstat(&trees.root).map_err(MountError::Root)?.st_dev),
            false => None,
        };
        let volumes = self.inner.volumes.hold(shared, sources, root);
        let ids = users.map(|users| users.ids());
        let mut setup = spec.root_setup(trees, shared, request.provide_etc_files, ids)?;
        if request.guest {
            setup.symlinks.push(GUEST_FILES.map(CStr::to_owned).into());
        }
        let plan = Plan {
            user: users.cloned(),
            entry: Entry::Create(Box::new(setup)),
            identity: identity.clone(),
            program: spec::program(spec.args(), envp.clone())?,
            stdio,
            channel: theirs,
            wait: true,
        };
        let namespaces = spec.namespaces();
        let (mut pause, mut target) = (None, None);
        let pid = match &namespaces.pid {
            Pids::Own => PidNamespace::New,
            // The process itself is what is joined: no number of it could have
            // been given to another one meanwhile.
            Pids::Of(id) => {
                let target = target.insert(self.get(id)?);
                target.check_running()?;
                PidNamespace::Join(target.process.pidfd.as_fd())
            }
            Pids::Guest if users.is_none() => PidNamespace::Guest,
            // In a user namespace the guest's own will not do: it could not
            // mount a proc of it.
            Pids::Shared | Pids::Guest => {
                let pause = pause.insert(self.share_pid_namespace()?);
                PidNamespace::Join(pause.pidfd())
            }
        };
        let launched = launch::launch(plan, ours, pid, true, cgroup.dir().as_fd());
        let process = launched.map_err(|error| {
            // A target that has ended meanwhile takes its namespace along.
            let ended = target.and_then(|target| target.check_running().err());
            ended.unwrap_or(error.into())
        })?;
        let exit = self.inner.reaper.watch(process.pid);

        // The child sets itself up while the host is called.
        let setup = async {
            timeout(SETUP_TIMEOUT, process.ready())
                .await
                .map_err(|_| Error::SetupTimeout)?
                .map_err(Error::from)
        };
        let (log, token) = (request.log, LogToken::parse(&request.log_token)?);
        let streams: Vec<&'static str> = match terminal {
            Some(_) => vec!["stdout"],
            None => outputs.iter().map(|(stream, _)| *stream).collect(),
        };
        let (master, hosts) = tokio::try_join!(setup, connect_all(id, &streams, log, token))?;

        let mut outputs = outputs;
        let mut stdin = stdin;
        let once = request.stdin_once && terminal.is_none();
        let mut terminal = None;
        if let Some(master) = master {
            let failed = |errno: nix::errno::Errno| StdioError::Create(errno.into());
            fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(failed)?;
            let copy = || master.try_clone().map_err(StdioError::Create);
            stdin = reads.then(copy).transpose()?;
            terminal = Some(Arc::new(copy()?));
            outputs.push(("stdout", master));
        }
        let stdin = stdin
            .map(|stdin| Stdin::new(stdin, once).map(Arc::new))
            .transpose()
            .map_err(StdioError::Create)?;
        let tees = Outputs::default();
        let ended = watch::Sender::new(false);
        let mut pumps = Vec::new();
        let mut hosts = hosts.into_iter();
        for (stream, fd) in outputs {
            let source = Source::new(fd, ended.subscribe()).map_err(StdioError::Create)?;
            let (id, host) = (id.clone(), hosts.next());
            let tee = match stream {
                "stdout" => tees.stdout.clone(),
                _ => tees.stderr.clone(),
            };
            pumps.push(tokio::spawn(async move {
                stdio::pump(&id, stream, source, host, &tee).await;
            }));
        }
        let Some(cgroup) = made.take() else {
            // Put there above and taken only here.
            return Err(Error::Unknown { id: id.clone() });
        };
        Ok(Parts {
            container: Draft {
                guest: request.guest,
                cgroup,
                namespaces,
                identity,
                envp,
                process,
                stdin,
                terminal,
                outputs: tees,
                ended,
                upper: rootfs.upper(),
                volumes,
            },
            vigil: Vigil { exit, pumps },
        })
    }

    /// From here on the container is followed to its end by a task.
    fn follow(&self, id: String, parts: Parts, rootfs: Rootfs) -> Arc<Container> {
        let Draft {
            guest,
            cgroup,
            namespaces,
            identity,
            envp,
            process,
            stdin,
            terminal,
            outputs,
            ended,
            upper,
            volumes,
        } = parts.container;
        let container = Arc::new(Container {
            id,
            guest,
            cgroup,
            namespaces,
            identity,
            oom_score: Mutex::default(),
            envp,
            process,
            stdin,
            terminal,
            outputs,
            ended,
            published: watch::Sender::new(false),
            state: Mutex::new(State {
                phase: Phase::Created,
                started_at: 0,
                start_error: None,
                exit: None,
            }),
            starting: tokio::sync::Mutex::default(),
            rootfs: tokio::sync::Mutex::new(rootfs),
            supervisor: Mutex::default(),
            execs: AtomicU64::new(0),
            fs_usage: FsUsage::new(upper, SCRATCH.into()),
            volumes: Mutex::new(Some(volumes)),
        });
        let task = tokio::spawn(supervise(self.clone(), container.clone(), parts.vigil));
        *container
            .supervisor
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(task);
        container
    }

    fn device_guard(&self, spec: &ContainerSpec) -> Result<Arc<Guard>, Error> {
        let (rules, files) = spec.devices();
        let rules = devices::rules(rules, files)?;
        let mut last = self
            .inner
            .guard
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(guard) = last.as_ref().filter(|guard| guard.rules() == rules) {
            return Ok(guard.clone());
        }
        Ok(last.insert(Arc::new(Guard::load(rules)?)).clone())
    }

    fn seccomp_filter(&self, spec: &ContainerSpec) -> Result<Option<Arc<SeccompFilter>>, Error> {
        let Some(profile) = spec.seccomp() else {
            return Ok(None);
        };
        let mut last = self
            .inner
            .seccomp
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((known, filter)) = &*last
            && known == profile
        {
            return Ok(Some(filter.clone()));
        }
        let filter = Arc::new(seccomp::compile(profile)?);
        *last = Some((profile.clone(), filter.clone()));
        Ok(Some(filter))
    }
}

/// A container whose process waits, before anybody else knows of it.
struct Draft {
    guest: bool,
    cgroup: Cgroup,
    namespaces: spec::OwnNamespaces,
    identity: super::plan::Identity,
    envp: Arc<super::plan::StringArray>,
    process: launch::Launched,
    stdin: Option<Arc<Stdin>>,
    terminal: Option<Arc<std::os::fd::OwnedFd>>,
    outputs: Outputs,
    ended: watch::Sender<bool>,
    upper: PathBuf,
    volumes: Held,
}

struct Parts {
    container: Draft,
    vigil: Vigil,
}

/// The id in the guest of the user that a process is to run as, all of whose
/// ids must be there in the container's user namespace.
fn owner(user: &Resolved, users: Option<&Arc<UserNamespace>>) -> Result<u32, Error> {
    let Some(ids) = users.map(|users| users.ids()) else {
        return Ok(user.uid);
    };
    let mapped = |what, id| {
        ids.in_guest(id).ok_or(Error::Unmapped {
            what,
            id,
            length: ids.length(),
        })
    };
    for &gid in user.groups.iter().chain([&user.gid]) {
        mapped("group", gid)?;
    }
    mapped("user", user.uid)
}

/// The request's user, with what it leaves open taken from the spec.
fn requested_user(request: &CreateContainerRequest, spec: &ContainerSpec) -> User {
    match &request.user {
        Some(user) => user.clone(),
        None => {
            let (uid, gid, groups) = spec.default_uid();
            User {
                uid: Some(uid.into()),
                gid: Some(gid.into()),
                supplemental_groups: groups.iter().map(|&gid| gid.into()).collect(),
                ..User::default()
            }
        }
    }
}

async fn connect_all(
    id: &str,
    streams: &[&'static str],
    log: bool,
    token: Option<LogToken>,
) -> Result<Vec<VsockStream>, Error> {
    let mut hosts = Vec::new();
    for stream in streams.iter().copied().filter(|_| log) {
        hosts.push(stdio::connect(id, stream, token).await?);
    }
    Ok(hosts)
}
