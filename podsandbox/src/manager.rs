//! All pods of the node.
//!
//! Names and ids live here; everything about one pod lives in its driver. The
//! map's lock is held for look-ups and inserts only, never across an await.

mod containers;
mod recover;
mod shells;
mod streams;
mod uids;
mod updates;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use disk_usage::Cached;
use imagesvc::ImageService;

use crate::agent::budget::Shared;
use crate::config::{Config, Engine, UIDS};
use crate::context::{Context, later_nanos, now_nanos};
use crate::driver::{Command, Driver, Handle, max_vcpus};
use crate::events::Events;
use crate::faults::{Ledger, Posture};
use crate::network::Network;
use crate::observer::{Observer, TraceParent};
use crate::record::{ContainerRecord, PodKind, PodPhase, PodRecord};
use crate::sizing::Bounds;
use crate::snapshot::PodSnapshot;
use crate::spec::PodSpec;
use crate::store::Store;
use crate::{Error, Result, cgroup, host, ids, sizing, trash};
pub use streams::ExecOutput;
use uids::Uids;

/// How long a request waits for what pods on the host's kernel have written to
/// be measured; beyond, it gets the number before.
const TREES_PATIENCE: Duration = Duration::from_secs(1);

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
    /// What pods on the host's kernel have written.
    trees: Cached,
    pods: Arc<Mutex<HashMap<String, Handle>>>,
    /// Locked while the pods are.
    uids: Arc<Mutex<Uids>>,
}

impl PodManager {
    /// Opens the records and takes up, finishes or undoes what they tell of.
    /// Returns when the pods that run were taken up. What has to be undone is
    /// undone in the background: CNI plugins may take long over it.
    pub async fn open(
        config: Config,
        images: ImageService,
        network: Network,
        observer: Arc<dyn Observer>,
    ) -> Result<Self> {
        let faults = Ledger::open(config.root.join("faults"));
        let store = Store::open(&config.root.join("state.redb"))?;
        let found = store.load()?;
        let uids = Uids::new(config.uid_base, found.last_uid);
        let context = Arc::new(Context {
            config,
            store,
            images,
            network,
            events: Events::default(),
            observer,
            shared: Shared::default(),
            faults,
        });
        // What a predecessor had no time for.
        trash::empty(&crate::paths::trash(&context.config));
        let manager = Self {
            context,
            trees: Cached::default(),
            pods: Arc::default(),
            uids: Arc::new(Mutex::new(uids)),
        };
        manager.recover(found).await?;
        Ok(manager)
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
    /// A name whose half-made pod is still being undone is waited for. `parent`
    /// is what a start that is begun here is told of as a part of.
    pub async fn run(&self, spec: PodSpec, parent: Option<TraceParent>) -> Result<String> {
        let since = Instant::now();
        let (id, mut handle) = loop {
            match self.join_or_begin(&spec, since, parent.as_ref())? {
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
    fn join_or_begin(
        &self,
        spec: &PodSpec,
        since: Instant,
        parent: Option<&TraceParent>,
    ) -> Result<Claim> {
        let faults = &self.context.faults;
        if let Posture::Avoid(ends) | Posture::Leave(ends) = faults.posture(&spec.name) {
            return Err(faults.refusal(&spec.name, ends));
        }
        let config = &self.context.config;
        let (handler, runtime) = config.runtime_for(&spec.handler, spec.host_namespaces)?;
        let (kind, machine, size) = match &runtime.engine {
            Engine::Machine(decision) => {
                config.check_confinement(&runtime.settings)?;
                if let Some(now) = runtime.settings.still_withheld(decision) {
                    return Err(Error::MachineWithheld {
                        handler: handler.to_owned(),
                        why: now.why,
                        remedy: now.remedy.unwrap_or_default(),
                    });
                }
                let bounds = Bounds::of_this_node(max_vcpus(decision));
                let (asked, overhead) = (&spec.resources, &spec.overhead);
                let size = sizing::size(&runtime.settings, asked, overhead, bounds);
                (PodKind::MicroVm, Some(decision.machine), size)
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
                Some(_) => (PodKind::Host, None, sizing::VmSize::default()),
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
                name: spec.name.to_string(),
                id: id.clone(),
            });
        }
        // The kubelet takes the sandbox that was made last for the pod's.
        let earlier = pods.values().filter_map(|handle| {
            let other = &handle.snapshot.borrow().pod;
            let (a, b) = (&other.spec.name, &spec.name);
            let same = a.namespace == b.namespace && a.name == b.name && a.uid == b.uid;
            same.then_some(other.created_at_nanos)
        });
        let created_at_nanos = later_nanos(now_nanos(), earlier);
        let id = ids::new_id();
        let record = PodRecord {
            id: id.clone(),
            handler: handler.to_owned(),
            kind,
            machine,
            phase: PodPhase::Reserved,
            created_at_nanos,
            uid: self.give_uid(&pods)?,
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
        let context = Arc::clone(&self.context);
        let handle = Driver::begin(context, record, since, parent.cloned());
        pods.insert(id.clone(), handle.clone());
        Ok(Claim::Ours(id, handle))
    }

    fn give_uid(&self, pods: &HashMap<String, Handle>) -> Result<u32> {
        let taken = pods.values().map(|pod| pod.snapshot.borrow().pod.uid);
        let mut uids = self.uids.lock().unwrap_or_else(PoisonError::into_inner);
        uids.give(&taken.collect()).ok_or_else(|| Error::Shared {
            kind: crate::ErrorKind::ResourceExhausted,
            message: format!("all {UIDS} uids for pods are in use"),
        })
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

    /// All pods, those that are being started too, in no order.
    #[must_use]
    pub fn snapshots(&self) -> Vec<PodSnapshot> {
        let pods = self.pods();
        let all = pods.values().map(|handle| handle.snapshot.borrow().clone());
        all.filter(|snapshot| !snapshot.gone).collect()
    }

    /// The pods that CRI lists.
    #[must_use]
    pub fn list(&self) -> Vec<PodSnapshot> {
        let mut list = self.snapshots();
        list.retain(PodSnapshot::is_listed);
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

    /// How often a record was written to disk since the daemon's start.
    #[must_use]
    pub fn record_writes(&self) -> u64 {
        self.context.store.writes()
    }

    /// Where the node's CNI configuration stands: ready, or why not.
    pub fn network_state(&self) -> std::result::Result<(), String> {
        self.context.network.state()
    }

    #[must_use]
    pub fn scratch_dir(&self) -> std::path::PathBuf {
        self.context.config.root.join("scratch")
    }

    /// Bytes and files that what pods have written takes on the host.
    pub async fn scratch_usage(&self) -> Result<(u64, u64)> {
        let dir = self.scratch_dir();
        let dirs = vec![dir.clone(), crate::paths::trash(&self.context.config)];
        let disks = tokio::task::spawn_blocking(move || crate::scratch::disks(&dir)).await;
        let disks = disks.map_err(|_| Error::Stopping)??;
        let walk = move || crate::scratch::trees(&dirs);
        let all = disks + self.trees.get(TREES_PATIENCE, walk).await;
        Ok((all.bytes, all.inodes))
    }

    #[must_use]
    pub fn console_path(&self, pod: &PodSnapshot) -> std::path::PathBuf {
        let paths = crate::paths::PodPaths::new(&self.context.config, &pod.pod.id);
        Path::new(&paths.console).to_owned()
    }
}

/// Work that goes on when its caller goes away.
async fn detached(work: impl Future<Output = Result<()>> + Send + 'static) -> Result<()> {
    tokio::spawn(work).await.map_err(|_| Error::Stopping)?
}
