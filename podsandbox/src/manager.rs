//! All pods of the node.
//!
//! Names and ids live here; everything about one pod lives in its driver. The
//! map's lock is held for look-ups and inserts only, never across an await.

mod updates;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_api::exec_sync_event::Event as ExecEvent;
use imagesvc::ImageService;
use netns::cni::Collection;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use crate::config::{Config, Engine};
use crate::context::{Context, now_nanos};
use crate::driver::{Command, Driver, Handle, max_vcpus};
use crate::events::Events;
use crate::network::Network;
use crate::record::{ContainerPhase, ContainerRecord, PodKind, PodPhase, PodRecord};
use crate::session::{AttachOptions, ExecOptions, Session};
use crate::sizing::Bounds;
use crate::snapshot::PodSnapshot;
use crate::spec::{ContainerSpec, PodName, PodSpec};
use crate::store::Store;
use crate::{AgentClient, Error, Result, cgroup, host, ids, signals, sizing};

/// What ExecSync returns of each stream at most; the field's runtimes agree.
const EXEC_OUTPUT_LIMIT: usize = 16 << 20;
/// SIGKILL is not refused; this is for a guest that hangs.
const KILL_WAIT: Duration = Duration::from_secs(10);
/// Beyond an exec's own time-out: for the answer to travel.
const EXEC_GRACE: Duration = Duration::from_secs(5);
/// Pods that run are taken up so many at a time: a few calls to each VMM and
/// guest.
const TAKE_UPS_AT_ONCE: usize = 32;
/// What was half done is undone or finished so many pods at a time: each runs
/// CNI plugins.
const UNDOS_AT_ONCE: usize = 16;
/// Requests are served after this even if a pod's VMM hangs; it takes
/// milliseconds.
const TAKE_UP_WAIT: Duration = Duration::from_secs(10);
const UIDS: u32 = 65_536;
const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

#[derive(Debug, Default)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
    pub timed_out: bool,
}

/// What came of asking for a pod's name.
enum Claim {
    /// Its start was begun or joined.
    Ours(String, Handle),
    /// A start that failed or was cut off has it until it is undone.
    BeingUndone(Handle),
}

#[derive(Clone)]
pub struct PodManager {
    context: Arc<Context>,
    pods: Arc<Mutex<HashMap<String, Handle>>>,
}

impl PodManager {
    /// Opens the records and takes up, finishes or undoes what they tell of.
    /// Returns when the pods that run were taken up. What has to be undone is
    /// undone in the background: CNI plugins may take long over it.
    pub async fn open(config: Config, images: ImageService, network: Network) -> Result<Self> {
        let store = Store::open(&config.root.join("state.redb"))?;
        let found = store.load()?;
        let context = Arc::new(Context {
            config,
            store,
            images,
            network,
            events: Events::default(),
        });
        let manager = Self {
            context,
            pods: Arc::default(),
        };
        manager.recover(found).await?;
        Ok(manager)
    }

    async fn recover(&self, found: crate::store::Found) -> Result<()> {
        let mut of_pod: HashMap<String, BTreeMap<String, ContainerRecord>> = HashMap::new();
        let mut known: BTreeSet<String> = found.unreadable.iter().cloned().collect();
        for container in found.containers {
            known.insert(container.id.clone());
            of_pod
                .entry(container.pod_id.clone())
                .or_default()
                .insert(container.id.clone(), container);
        }
        cgroup::remove_own_parent();
        let readable = found.pods.iter().map(|pod| &pod.id);
        let ids = readable.chain(&found.unreadable).cloned();
        // Before any driver runs: attaching and detaching have to wait for it.
        match self.context.network.begin_gc(ids).await {
            Ok(collection) => drop(tokio::spawn(self.clone().collect(collection))),
            Err(error) => {
                tracing::warn!(error = %error.sentence(), "cannot look for attachments of pods that are gone");
            }
        }
        let (take_ups, undos) = (
            Arc::new(Semaphore::new(TAKE_UPS_AT_ONCE)),
            Arc::new(Semaphore::new(UNDOS_AT_ONCE)),
        );
        let mut running = Vec::new();
        for pod in found.pods {
            let containers = of_pod.remove(&pod.id).unwrap_or_default();
            let runs = matches!(pod.phase, PodPhase::Ready | PodPhase::Stopped);
            let turn = Arc::clone(if runs { &take_ups } else { &undos });
            let handle = Driver::resume(Arc::clone(&self.context), pod.clone(), containers, turn);
            if runs {
                running.push(handle.clone());
            }
            self.pods().insert(pod.id, handle);
        }
        // Nor are the containers of a pod that cannot be read touched.
        of_pod.retain(|pod, _| !known.contains(pod));
        for container in of_pod.into_values().flatten().map(|(_, c)| c) {
            self.context.images.release(&container.id).await?;
            self.context.store.delete_container(&container.id).await?;
            known.remove(&container.id);
        }
        // A lease is taken just before its container's record is written.
        for (owner, _) in self.context.images.leases() {
            if !known.contains(crate::driver::lease_holder(&owner)) {
                self.context.images.release(&owner).await?;
            }
        }
        let taken_up = async {
            for handle in &mut running {
                handle.settled().await;
            }
        };
        if tokio::time::timeout(TAKE_UP_WAIT, taken_up).await.is_err() {
            tracing::warn!(
                "some pods were not taken up within {} s; serving without waiting for them",
                TAKE_UP_WAIT.as_secs()
            );
        }
        Ok(())
    }

    /// A plugin that fails or hangs must not keep pods from being served.
    async fn collect(self, collection: Collection) {
        if let Err(error) = self.context.network.finish_gc(collection).await {
            tracing::warn!(error = %error.sentence(), "cannot collect attachments of pods that are gone");
        }
    }

    fn forget_gone(&self) {
        self.pods()
            .retain(|_, handle| !handle.snapshot.borrow().gone);
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, Handle>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn config(&self) -> &Config {
        &self.context.config
    }

    /// Starts a pod and returns its id once it serves. The work goes on when
    /// the caller goes away; asked again meanwhile, the same work is joined.
    /// A name whose half-made pod is still being undone is waited for.
    pub async fn run(&self, spec: PodSpec) -> Result<String> {
        let since = Instant::now();
        let (id, mut handle) = loop {
            match self.join_or_begin(&spec, since)? {
                Claim::Ours(id, handle) => break (id, handle),
                Claim::BeingUndone(mut handle) => {
                    let over = |snapshot: &PodSnapshot| snapshot.gone || snapshot.is_listed();
                    let waited = handle.snapshot.wait_for(over).await;
                    waited.map_err(|_| Error::Stopping)?;
                }
            }
        };
        match handle.settled().await {
            Some(Ok(())) => Ok(id),
            Some(Err(error)) => {
                self.forget_gone();
                Err(Error::Shared {
                    kind: error.kind(),
                    message: error.sentence(),
                })
            }
            None => Err(Error::PodNotFound(id)),
        }
    }

    /// One look at the names and, if the name is free, its reservation, under
    /// one lock: of two requests for a name one begins and the other joins.
    fn join_or_begin(&self, spec: &PodSpec, since: Instant) -> Result<Claim> {
        let config = &self.context.config;
        let (handler, runtime) = config.runtime_for(&spec.handler, spec.host_namespaces)?;
        let (kind, size) = match &runtime.engine {
            Engine::Machine(decision) => {
                let bounds = Bounds::of_this_node(max_vcpus(decision));
                let (asked, overhead) = (&spec.resources, &spec.overhead);
                let size = sizing::size(&runtime.settings, asked, overhead, bounds);
                (PodKind::MicroVm, size)
            }
            Engine::Oci(_) if spec.user_namespace.is_some() => {
                return Err(Error::NotOnHost {
                    field: "config.linux.security_context.namespace_options.userns_options"
                        .to_owned(),
                    what: "a user namespace of the pod's own",
                });
            }
            // Looked for each time: it may be installed any time.
            Engine::Oci(program) => match host::find_program(program) {
                Some(_) => (PodKind::Host, sizing::VmSize::default()),
                None => {
                    return Err(Error::NoOciRuntime {
                        handler: handler.to_owned(),
                        program: program.clone(),
                    });
                }
            },
        };
        let mut pods = self.pods();
        pods.retain(|_, handle| !handle.snapshot.borrow().gone);
        let taken = pods.iter().find(|(_, handle)| {
            let snapshot = handle.snapshot.borrow();
            !snapshot.gone && snapshot.pod.spec.name == spec.name
        });
        if let Some((id, handle)) = taken {
            let under_way = handle.started.borrow().is_none();
            let snapshot = handle.snapshot.borrow();
            if under_way && snapshot.pod.spec == *spec {
                return Ok(Claim::Ours(id.clone(), handle.clone()));
            }
            if !under_way && !snapshot.is_listed() {
                return Ok(Claim::BeingUndone(handle.clone()));
            }
            return Err(Error::PodNameTaken {
                name: full_name(&spec.name),
                id: id.clone(),
            });
        }
        let id = ids::new_id();
        let record = PodRecord {
            id: id.clone(),
            handler: handler.to_owned(),
            kind,
            phase: PodPhase::Reserved,
            created_at_nanos: now_nanos(),
            uid: free_uid(self.context.config.uid_base, &pods)?,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            machine_mib: size.machine_mib,
            cgroup: spec
                .cgroup_parent
                .clone()
                .or_else(|| Some(cgroup::OWN_PARENT.into())),
            network: None,
            vmm_pid: None,
            failure: None,
            timeline: Vec::new(),
            spec: spec.clone(),
        };
        let handle = Driver::begin(Arc::clone(&self.context), record, since);
        pods.insert(id.clone(), handle.clone());
        Ok(Claim::Ours(id, handle))
    }

    /// StopPodSandbox; a pod that does not exist is stopped.
    pub async fn stop(&self, id: &str) -> Result<()> {
        let Some(handle) = self.find(id)? else {
            return Ok(());
        };
        match detached(async move { handle.cancel_and_ask(|reply| Command::Stop { reply }).await })
            .await
        {
            // A start that the stop ended was undone.
            Err(Error::PodNotFound(_)) => Ok(()),
            other => other,
        }
    }

    /// RemovePodSandbox; a pod that does not exist is removed.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let Some(handle) = self.find(id)? else {
            return Ok(());
        };
        match detached(async move {
            handle
                .cancel_and_ask(|reply| Command::Remove { reply })
                .await
        })
        .await
        {
            Ok(()) | Err(Error::PodNotFound(_)) => {
                self.forget_gone();
                Ok(())
            }
            other => other,
        }
    }

    /// The pods that CRI lists.
    #[must_use]
    pub fn list(&self) -> Vec<PodSnapshot> {
        let pods = self.pods();
        let mut list: Vec<PodSnapshot> = pods
            .values()
            .map(|handle| handle.snapshot.borrow().clone())
            .filter(PodSnapshot::is_listed)
            .collect();
        list.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.pod.created_at_nanos));
        list
    }

    /// The pod of this id or unambiguous prefix.
    pub fn pod(&self, id: &str) -> Result<PodSnapshot> {
        let handle = self
            .find(id)?
            .ok_or_else(|| Error::PodNotFound(id.to_owned()))?;
        let snapshot = handle.snapshot.borrow().clone();
        if snapshot.is_listed() {
            Ok(snapshot)
        } else {
            Err(Error::PodNotFound(id.to_owned()))
        }
    }

    fn find(&self, id: &str) -> Result<Option<Handle>> {
        let pods = self.pods();
        let full = ids::resolve("pod sandbox", id, pods.keys().map(String::as_str))?;
        Ok(full.and_then(|full| pods.get(full)).cloned())
    }

    /// The container of this id or unambiguous prefix, with its pod.
    pub fn container(&self, id: &str) -> Result<(PodSnapshot, Arc<ContainerRecord>)> {
        let (_, snapshot, container) = self
            .find_container(id)?
            .ok_or_else(|| Error::ContainerNotFound(id.to_owned()))?;
        Ok((snapshot, container))
    }

    fn find_container(
        &self,
        id: &str,
    ) -> Result<Option<(Handle, PodSnapshot, Arc<ContainerRecord>)>> {
        let snapshots: Vec<(Handle, PodSnapshot)> = self
            .pods()
            .values()
            .map(|handle| (handle.clone(), handle.snapshot.borrow().clone()))
            .collect();
        let all = snapshots
            .iter()
            .flat_map(|(_, s)| s.containers.keys().map(String::as_str));
        let Some(full) = ids::resolve("container", id, all)? else {
            return Ok(None);
        };
        Ok(snapshots.iter().find_map(|(handle, snapshot)| {
            let container = snapshot.containers.get(full)?;
            Some((handle.clone(), snapshot.clone(), Arc::clone(container)))
        }))
    }

    fn existing(&self, id: &str) -> Result<(Handle, Arc<ContainerRecord>)> {
        let (handle, _, container) = self
            .find_container(id)?
            .ok_or_else(|| Error::ContainerNotFound(id.to_owned()))?;
        Ok((handle, container))
    }

    pub async fn create_container(&self, pod: &str, spec: ContainerSpec) -> Result<String> {
        let handle = self
            .find(pod)?
            .ok_or_else(|| Error::PodNotFound(pod.to_owned()))?;
        handle
            .ask(|reply| Command::Create {
                spec: Box::new(spec),
                reply,
            })
            .await
    }

    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (handle, container) = self.existing(id)?;
        handle
            .ask(|reply| Command::Start {
                id: container.id.clone(),
                reply,
            })
            .await
    }

    /// Asks the container to end, then ends it. Stopped or unknown to a pod
    /// that is gone: no error.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let Some((handle, _, container)) = self.find_container(id)? else {
            return Ok(());
        };
        if container.exit.is_some() {
            return Ok(());
        }
        let signal = |signal| {
            let (handle, id) = (handle.clone(), container.id.clone());
            async move {
                handle
                    .ask(|reply| Command::Signal { id, signal, reply })
                    .await
            }
        };
        // A process that waits for its exec as PID 1 does not hear SIGTERM.
        if !grace.is_zero() && container.phase == ContainerPhase::Running {
            signal(signals::parse(&container.stop_signal).unwrap_or(SIGTERM)).await?;
            if tokio::time::timeout(grace, over(&handle, &container.id))
                .await
                .is_ok()
            {
                return Ok(());
            }
        }
        signal(SIGKILL).await?;
        tokio::time::timeout(KILL_WAIT, over(&handle, &container.id))
            .await
            .map_err(|_| Error::Unkillable {
                id: container.id.clone(),
                seconds: KILL_WAIT.as_secs(),
            })
    }

    /// RemoveContainer, of a running one too; an unknown one is no error.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let Some((handle, _, container)) = self.find_container(id)? else {
            return Ok(());
        };
        match handle
            .ask(|reply| Command::RemoveContainer {
                id: container.id.clone(),
                reply,
            })
            .await
        {
            Err(Error::PodNotFound(_)) => Ok(()),
            other => other,
        }
    }

    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let (handle, container) = self.existing(id)?;
        handle
            .ask(|reply| Command::ReopenLog {
                id: container.id.clone(),
                reply,
            })
            .await
    }

    pub async fn exec_sync(
        &self,
        id: &str,
        argv: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        let (agent, container) = self.running(id, "exec needs a running container").await?;
        let request = agent_api::ExecSyncRequest {
            container_id: container.id.clone(),
            argv,
            timeout_millis: timeout.map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
        };
        let work = collect(&agent, request);
        match timeout {
            None => work.await,
            // The agent keeps the time; this is for one that hangs.
            Some(limit) => tokio::time::timeout(limit + EXEC_GRACE, work)
                .await
                .unwrap_or(Ok(ExecOutput {
                    timed_out: true,
                    ..ExecOutput::default()
                })),
        }
    }

    /// A container that runs, and the agent of its pod.
    async fn running(
        &self,
        id: &str,
        needed: &'static str,
    ) -> Result<(AgentClient, Arc<ContainerRecord>)> {
        let (mut handle, _) = self.existing(id)?;
        handle.settled().await;
        let (snapshot, container) = self.container(id)?;
        if container.phase != ContainerPhase::Running {
            return Err(crate::driver::state_error(&container, needed));
        }
        Ok((serving(&snapshot)?, container))
    }

    /// Runs a command with streams of its own. Returns once it runs; one that
    /// cannot be run is an error. It is killed, with all it has started, when
    /// the session is dropped before its exit.
    pub async fn exec(&self, mut options: ExecOptions) -> Result<Session> {
        let needed = "exec needs a running container";
        let (agent, container) = self.running(&options.container_id, needed).await?;
        options.container_id.clone_from(&container.id);
        agent.exec(options).await
    }

    /// Joins a container's streams: its output from now on. Dropping the
    /// session leaves the container as it is.
    pub async fn attach(&self, mut options: AttachOptions) -> Result<Session> {
        let needed = "attach needs a running container";
        let (agent, container) = self.running(&options.container_id, needed).await?;
        options.container_id.clone_from(&container.id);
        agent.attach(options).await
    }

    /// A connection to what listens on `port` of the pod's loopback: IPv4
    /// first, then IPv6. `shutdown` ends one direction.
    pub async fn port_forward(&self, pod: &str, port: u16) -> Result<UnixStream> {
        let mut handle = self
            .find(pod)?
            .ok_or_else(|| Error::PodNotFound(pod.to_owned()))?;
        handle.settled().await;
        let snapshot = self.pod(pod)?;
        let agent = serving(&snapshot)?;
        agent.port_forward(&snapshot.pod.id, port).await
    }

    /// Statistics from the pod's guest; none while it does not serve.
    pub async fn stats(&self, snapshot: &PodSnapshot) -> Result<Option<agent_api::StatsResponse>> {
        match &snapshot.agent {
            Some(agent) => agent.stats(Vec::new()).await.map(Some),
            None => Ok(None),
        }
    }

    /// Where the node's CNI configuration stands: ready, or why not.
    pub fn network_state(&self) -> std::result::Result<(), String> {
        self.context.network.state()
    }

    #[must_use]
    pub fn scratch_dir(&self) -> std::path::PathBuf {
        self.context.config.root.join("scratch")
    }

    /// Bytes and files that the pods' scratch disks take on the host.
    pub async fn scratch_usage(&self) -> Result<(u64, u64)> {
        let dir = self.scratch_dir();
        let usage = tokio::task::spawn_blocking(move || crate::scratch::usage(&dir)).await;
        usage.map_err(|_| Error::Stopping)?
    }

    #[must_use]
    pub fn console_path(&self, pod: &PodSnapshot) -> std::path::PathBuf {
        let paths = crate::paths::PodPaths::new(&self.context.config, &pod.pod.id);
        Path::new(&paths.console).to_owned()
    }
}

fn serving(snapshot: &PodSnapshot) -> Result<AgentClient> {
    snapshot.agent.clone().ok_or_else(|| Error::PodNotReady {
        id: snapshot.pod.id.clone(),
        state: snapshot.pod.failure.clone().unwrap_or_default(),
    })
}

async fn collect(agent: &AgentClient, request: agent_api::ExecSyncRequest) -> Result<ExecOutput> {
    let mut stream = agent.exec_sync(request).await?;
    let mut output = ExecOutput::default();
    // What is beyond the limit is dropped, as the field's runtimes do.
    let take = |to: &mut Vec<u8>, bytes: Vec<u8>| {
        let room = EXEC_OUTPUT_LIMIT.saturating_sub(to.len());
        to.extend_from_slice(&bytes[..bytes.len().min(room)]);
    };
    while let Some(event) = stream
        .message()
        .await
        .map_err(|status| crate::agent::refused("ExecSync", &status))?
    {
        match event.event {
            Some(ExecEvent::Stdout(bytes)) => take(&mut output.stdout, bytes),
            Some(ExecEvent::Stderr(bytes)) => take(&mut output.stderr, bytes),
            Some(ExecEvent::Exit(exit)) => {
                output.exit_code = exit.code;
                output.timed_out = exit.timed_out;
                return Ok(output);
            }
            None => {}
        }
    }
    Err(Error::VmEnded(
        "the exec's stream broke before its exit code".to_owned(),
    ))
}

/// Work that goes on when its caller goes away.
async fn detached(work: impl Future<Output = Result<()>> + Send + 'static) -> Result<()> {
    tokio::spawn(work).await.map_err(|_| Error::Stopping)?
}

/// Waits until the container has exited or is gone.
async fn over(handle: &Handle, id: &str) {
    let mut snapshot = handle.snapshot.clone();
    let done = |snapshot: &PodSnapshot| {
        snapshot.gone
            || snapshot
                .containers
                .get(id)
                .is_none_or(|container| container.exit.is_some())
    };
    if snapshot.wait_for(done).await.is_err() {
        tracing::debug!(container = id, "the pod's driver ended");
    }
}

fn full_name(name: &PodName) -> String {
    format!(
        "{}/{} (uid {}, attempt {})",
        name.namespace, name.name, name.uid, name.attempt
    )
}

fn free_uid(base: u32, pods: &HashMap<String, Handle>) -> Result<u32> {
    let taken: BTreeSet<u32> = pods
        .values()
        .map(|handle| handle.snapshot.borrow().pod.uid)
        .collect();
    (base..base.saturating_add(UIDS))
        .find(|uid| !taken.contains(uid))
        .ok_or_else(|| Error::Shared {
            kind: crate::ErrorKind::ResourceExhausted,
            message: format!("all {UIDS} uids for pods are in use"),
        })
}
