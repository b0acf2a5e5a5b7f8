//! What is different for a pod on the host's kernel: its start, the roots of
//! its containers, and what a supervisor that has gone leaves to be ended.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use imagesvc::Lease;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::SockType;
use tokio_util::sync::CancellationToken;
use vmm_client::Control;

use super::boot::{log_file, read_tail};
use super::create::{mounting, seccomp_profile, user};
use super::devices::Devices;
use super::disks::Disk;
use super::start::Timeline;
use super::{Driver, Machine, watch_vm};
use crate::config::Engine;
use crate::context::now_nanos;
use crate::error::Step;
use crate::host::features::mounts_read_only_recursively;
use crate::host::spec::{Host, Pod, changed_resources, for_host};
use crate::host::supervisor::{self, Request};
use crate::phase::PodEvent;
use crate::record::{ContainerRecord, PodKind, PodNetworkRecord};
use crate::spec::{ContainerSpec, Resources, image_volumes, node_volumes};
use crate::{Error, Result, cgroup, host, network, oci, sysctls, trash};

/// What a container finds in /dev/shm.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";

impl Driver {
    pub(super) fn is_on_host(&self) -> bool {
        self.record.kind == PodKind::Host
    }

    pub(super) async fn start_on_host(
        &mut self,
        timeline: &Timeline,
        program: &Path,
    ) -> Result<()> {
        let runtime = host::find_program(program).ok_or_else(|| Error::NoOciRuntime {
            handler: self.record.handler.clone(),
            program: program.to_owned(),
        })?;
        let shared = self.record.spec.host_namespaces;
        timeline
            .time(Step::Scratch, async { self.make_dirs() })
            .await?;
        let netns = match shared.network {
            true => None,
            false => {
                let (dir, name) = (&self.context.config.netns_dir, &self.paths.netns_name);
                let made = async { Ok(netns::Netns::create(dir, name).await?) };
                Some(timeline.time(Step::Netns, made).await?)
            }
        };
        self.advance(PodEvent::PartsBegin).await?;
        // A network plugin's own pods come before there is a network.
        if !shared.network {
            self.context.network.ready()?;
        }
        let cni_failed = CancellationToken::new();
        let begin = async {
            tokio::select! {
                () = cni_failed.cancelled() => Err(Error::Stopping),
                begun = self.supervise(&runtime, netns.as_ref()) => begun,
            }
        };
        let request = network::request(&self.record, &self.paths);
        let attach = async {
            if shared.network {
                return Ok(None);
            }
            let cni = timeline.time(Step::Cni, async {
                tokio::select! {
                    () = self.stopping.cancelled() => Err(Error::Stopping),
                    added = self.context.network.add(&request) => added,
                }
            });
            let added = cni.await;
            if added.is_err() {
                // The start beside it is in vain.
                cni_failed.cancel();
            }
            added.map(Some)
        };
        let (begun, added) = tokio::join!(timeline.time(Step::Supervisor, begin), attach);
        let added = added?;
        let (pid, control, events) = begun?;
        self.record.vmm_pid = pid;
        let ips = added.iter().flat_map(|added| added.pod_ips());
        self.record.network = Some(PodNetworkRecord {
            ips: ips.map(|ip| ip.to_string()).collect(),
        });

        let cni_dns = added.map(|added| added.dns).unwrap_or_default();
        let dns = network::guest_dns(self.record.spec.dns.as_ref(), &cni_dns)?;
        // Its addresses are for the pod's hosts file.
        let interface = match &netns {
            Some(netns) => {
                let read = netns::read_interface(netns, network::INTERFACE).await?;
                Some(network::guest_interface(&read))
            }
            None => None,
        };
        let spec = &self.record.spec;
        let request = agent_api::ConfigureSandboxRequest {
            time_unix_nanos: now_nanos(),
            hostname: host::hostname(spec),
            dns: Some(dns),
            interface,
            sysctls: match shared.network {
                true => spec.sysctls.clone().into_iter().collect(),
                false => sysctls::of_guest(&spec.sysctls),
            },
            share_process_namespace: spec.share_process_namespace && !shared.pid,
            shm_bytes: 0,
            user_namespace: None,
        };
        let agent = self.agent();
        timeline
            .time(Step::Configure, agent.configure(request))
            .await?;
        let events = watch_vm::watch(events, agent.clone(), self.stopping.clone());
        self.machine = Some(Machine {
            control,
            agent,
            events,
        });
        Ok(())
    }

    /// The pod's directories, and the file system behind its /dev/shm.
    fn make_dirs(&self) -> Result<()> {
        host::check_sysctls(&self.record.spec)?;
        let shm = &self.paths.shm;
        for dir in [&self.paths.dir, &self.paths.writable, shm] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|source| failed(dir, source))?;
        }
        if self.record.spec.host_namespaces.ipc {
            return Ok(());
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("shm"), shm, Some("tmpfs"), flags, Some(SHM_OPTIONS))
            .map_err(|errno| failed(shm, errno.into()))
    }

    async fn supervise(
        &self,
        runtime: &Path,
        netns: Option<&netns::Netns>,
    ) -> Result<(Option<u32>, Control, vmm_client::Events)> {
        let id = &self.record.id;
        let parent = self.cgroup_parent();
        let request = Request {
            program: self.context.config.shim.clone(),
            pod: id.clone(),
            dir: self.paths.dir.clone(),
            etc: self.paths.etc.clone(),
            runtime: runtime.to_owned(),
            cgroup: cgroup::group(parent, id)?,
            cgroup_procs: cgroup::make_for_supervisor(parent, id)?,
            host: self.record.spec.host_namespaces,
            netns: netns.map(netns::Netns::fd).transpose()?,
            control: self.listen(SockType::SeqPacket, &self.paths.control)?,
            streams: self.listen(SockType::Stream, &self.paths.vsock)?,
            log: log_file("supervisor's log", &self.paths.vmm_log)?,
        };
        let mut process = supervisor::spawn(request).await?;
        let pid = process.id();
        // Reaps it while this daemon is its parent; its end is learnt from the
        // control socket, which also works after a restart.
        tokio::spawn(async move {
            if let Err(error) = process.wait().await {
                tracing::debug!(%error, "cannot wait for a supervisor");
            }
        });
        let connected = async {
            let mut control = Control::connect(&self.paths.control).await?;
            // It has begun to serve.
            control.status().await?;
            let events = Control::connect(&self.paths.control).await?;
            Ok::<_, Error>((control, events.subscribe().await?))
        };
        let (control, events) = connected.await.map_err(|error| {
            let log = read_tail(&self.paths.vmm_log).unwrap_or_default();
            match String::from_utf8_lossy(&log).lines().last() {
                Some(line) => Error::SupervisorEnded(crate::agent::plain(line)),
                None => error,
            }
        })?;
        Ok((pid, control, events))
    }

    pub(super) fn cgroup_parent(&self) -> &Path {
        let parent = self.record.cgroup.as_deref();
        parent.unwrap_or(Path::new(cgroup::OWN_PARENT))
    }

    /// A container's root mounted and its OCI spec handed to the supervisor.
    pub(super) async fn put_together_on_host(
        &mut self,
        record: &ContainerRecord,
        root: &Disk,
        volumes: &[Disk],
        devices: &Devices,
    ) -> Result<Option<agent_api::ContainerState>> {
        let lease = &root.lease;
        let (id, spec) = (record.id.as_str(), &record.spec);
        self.check_recursive_read_only(spec).await?;
        let profile = seccomp_profile(spec).await?;
        let place = self.paths.place(id);
        let layers = layers(lease);
        let images: Vec<Vec<PathBuf>> = volumes
            .iter()
            .map(|disk| self::layers(&disk.lease))
            .collect();
        let mounts = mounting(spec, {
            let (spec, place) = (spec.clone(), place.clone());
            move || {
                place.mount(&layers)?;
                let asked = image_volumes(&spec.mounts).zip(&images).enumerate();
                let mounted = asked.map(|(number, ((mount, volume), layers))| {
                    place.mount_volume(number, layers, &mount.container_path, &volume.sub_path)
                });
                host::spec::volumes(&spec, &mounted.collect::<Result<Vec<_>>>()?)
            }
        })
        .await?;
        let hostname = host::hostname(&self.record.spec);
        let base = oci::runtime_spec(spec, &lease.config, &hostname, mounts, profile.as_ref())?;
        let group = cgroup::group(self.cgroup_parent(), &self.record.id)?;
        let mut oci = mounting(spec, {
            let (spec, id) = (spec.clone(), id.to_owned());
            let (etc, shm) = (self.paths.etc.clone(), self.paths.shm.clone());
            let namespaces = self.record.spec.host_namespaces;
            let root = place.root();
            move || {
                let pod = Pod {
                    etc: &etc,
                    shm: &shm,
                    namespaces,
                    cgroup: &group,
                };
                for_host(
                    base,
                    &id,
                    &spec,
                    root,
                    profile.as_ref(),
                    &pod,
                    &Host::read(),
                )
            }
        })
        .await?;
        let config = lease.config.config().as_ref();
        let image_user = config.and_then(|c| c.user().clone()).unwrap_or_default();
        let user = user(spec, &image_user);
        devices.add_on_host(&mut oci, &user)?;
        self.open_log(record, None).await?;
        let machine = self.machine_mut()?;
        let request = agent_api::CreateContainerRequest {
            id: id.to_owned(),
            oci_spec: serde_json::to_vec(&oci).map_err(oci_spec::OciSpecError::SerDe)?,
            root: None,
            user: Some(user),
            provide_etc_files: true,
            stdin: spec.stdin,
            stdin_once: spec.stdin_once,
            log: record.log_file.is_some(),
            log_token: Vec::new(),
            // They are mounts as any other by now.
            image_volumes: Vec::new(),
            devices: Vec::new(),
            guest: false,
        };
        machine.agent.create(request).await
    }

    /// Fails for the first volume that the runtime would leave writable in
    /// parts.
    async fn check_recursive_read_only(&self, spec: &ContainerSpec) -> Result<()> {
        // An image has nothing mounted below it.
        let mut asked = node_volumes(&spec.mounts).filter(|mount| mount.recursive_read_only);
        let Some(mount) = asked.next() else {
            return Ok(());
        };
        let (_, runtime) = self.context.config.runtime(&self.record.handler)?;
        let program = match &runtime.engine {
            Engine::Oci(program) => program.clone(),
            // The configuration has changed since the pod was started.
            Engine::Machine(_) => PathBuf::new(),
        };
        let container_path = mount.container_path.display().to_string();
        if let Some(found) = host::find_program(&program)
            && mounts_read_only_recursively(&found).await
        {
            return Ok(());
        }
        Err(Error::NoRecursiveReadOnly {
            container_path,
            program,
        })
    }

    /// Limits of a container; there is no machine that would have to grow.
    pub(super) async fn apply_on_host(
        &self,
        id: &str,
        after: &Resources,
        score: Option<i32>,
    ) -> Result<()> {
        let host = Host::read();
        let resources = changed_resources(after, &host)?;
        let score = score.map(|score| host.oom_score(score));
        match self.machine()?.agent.update(id, &resources, score).await {
            // It has ended and gone; its exit event is on the way.
            Err(Error::Agent {
                code: tonic::Code::NotFound,
                ..
            }) => Ok(()),
            other => other,
        }
    }

    /// Once nothing runs in it: its root, what it has written, its log.
    pub(super) async fn free_on_host(&mut self, id: &str) -> Result<()> {
        if let Some(machine) = &mut self.machine {
            machine.control.close_log(id).await?;
        }
        let Some(record) = self.containers.get(id) else {
            return Ok(());
        };
        let place = self.paths.place(id);
        mounting(&record.spec, move || place.remove()).await?;
        trash::empty(&self.paths.trash);
        Ok(())
    }

    /// Part of undoing: what is outside of the pod's volatile directory.
    pub(super) async fn remove_written(&self) -> Result<()> {
        trash::discard(&self.paths.trash, &self.paths.writable)?;
        trash::empty(&self.paths.trash);
        Ok(())
    }
}

fn layers(lease: &Lease) -> Vec<PathBuf> {
    lease
        .layers
        .iter()
        .map(|layer| layer.path.clone())
        .collect()
}

fn failed(path: &Path, source: std::io::Error) -> Error {
    Error::File {
        what: "pod directory",
        path: path.to_owned(),
        source,
    }
}
