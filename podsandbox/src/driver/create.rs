//! A new container: what is asked is checked, what it needs leased, attached
//! and bound, and the guest told.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use imagesvc::Lease;

use super::Driver;
use super::containers::state_error;
use super::devices::Devices;
use super::disks::{Disk, Disks};
use crate::context::{later_nanos, now_nanos};
use crate::record::{ContainerPhase, ContainerRecord, PodPhase};
use crate::seccomp::Profile;
use crate::shell::{MAX_SHELLS, ShellError};
use crate::spec::{self, ContainerName, ContainerSpec, Mount, PidNamespace, Seccomp};
use crate::volumes::Bind;
use crate::{Error, Result, faults, host, id_mapping, ids, oci, volumes};

/// Mounting waits for nothing unless a file system of the node hangs.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(30);

impl Driver {
    pub(super) async fn create_container(&mut self, spec: ContainerSpec) -> Result<String> {
        if self.record.phase != PodPhase::Ready || self.record.failure.is_some() {
            self.machine()?;
        }
        if spec.debug {
            self.check_shells()?;
        } else if let Some(taken) = self.find_shown(&spec.name) {
            return Err(Error::ContainerNameTaken {
                name: format!("{}/{}", spec.name.name, spec.name.attempt),
                pod: self.record.id.clone(),
                id: taken.id.clone(),
            });
        }
        self.check_namespaces(&spec)?;
        self.check_pid_target(&spec)?;
        check_huge_pages(self.is_on_host(), &spec.resources.hugepage_limits)?;
        id_mapping::check(self.record.spec.user_namespace, &spec)?;
        let (spec, devices) = self.resolve_devices(spec).await?;
        let slots = self.await_slots(&spec, &devices).await?;
        let binds = self.plan_volumes(&spec).await?;
        let id = ids::new_id();
        let Disks { root, volumes } = self.lease_disks(&spec, &id, &slots).await?;
        let lease = &root.lease;
        let names = [&lease.image.repo_tags, &lease.image.repo_digests];
        let record = ContainerRecord {
            image_name: names
                .into_iter()
                .flatten()
                .next()
                .unwrap_or(&spec.user_image)
                .clone(),
            id: id.clone(),
            pod_id: self.record.id.clone(),
            image_id: lease.image.id.clone(),
            image_ref: lease
                .image
                .repo_digests
                .first()
                .unwrap_or(&lease.image.id)
                .clone(),
            phase: ContainerPhase::Creating,
            slot: Some(root.slot),
            volume_slots: volumes.iter().map(|volume| volume.slot).collect(),
            device_slots: slots.devices,
            stop_signal: spec
                .stop_signal
                .clone()
                .unwrap_or_else(|| stop_signal(lease)),
            log_file: log_file(
                self.record.spec.log_directory.as_deref(),
                spec.log_path.as_deref(),
            ),
            // The kubelet goes by the container that was made last.
            created_at_nanos: later_nanos(
                now_nanos(),
                self.containers.values().map(|other| other.created_at_nanos),
            ),
            started_at_nanos: 0,
            exit: None,
            pid: 0,
            user: None,
            binds,
            spec,
        };
        let log_file = record.log_file.clone();
        if let Some(machine) = &self.machine {
            machine.agent.budget().know(&id);
        }
        let outcome = match self.context.store.put_container(&record).await {
            Ok(()) if self.is_on_host() => {
                self.put_together_on_host(&record, &root, &volumes, &devices)
                    .await
            }
            Ok(()) => self.put_together(&record, &root, &volumes, &devices).await,
            Err(error) => Err(error.into()),
        };
        self.containers.insert(
            id.clone(),
            ContainerRecord {
                phase: ContainerPhase::Created,
                ..record
            },
        );
        let outcome = match outcome {
            Ok(state) => {
                self.learn_listing(state.into_iter().collect()).await;
                self.save_container(&id).await
            }
            Err(error) => Err(error),
        };
        if outcome.is_err()
            && let Err(left) = self.remove_container(&id).await
        {
            tracing::error!(container = id, error = %left.sentence(), "cannot undo a failed create yet");
        }
        if outcome.is_err() {
            self.remove_empty_log(log_file.as_deref());
        }
        outcome.map(|()| id)
    }

    /// Its directory is the kubelet's, so nothing depends on it.
    fn remove_empty_log(&self, path: Option<&Path>) {
        let directory = self.record.spec.log_directory.as_deref();
        if let (Some(directory), Some(path)) = (directory, path)
            && let Err(error) = crate::log_file::remove_if_empty(directory, path)
        {
            tracing::debug!(?path, %error, "cannot remove an empty log");
        }
    }

    fn find_shown(&self, name: &ContainerName) -> Option<&ContainerRecord> {
        let mut shown = self.containers.values().filter(|c| !c.spec.debug);
        shown.find(|c| c.spec.name == *name)
    }

    fn check_shells(&self) -> Result<()> {
        let id = self.record.id.clone();
        if self.is_on_host() {
            return Err(ShellError::NoGuest { id }.into());
        }
        let shells = self.containers.values().filter(|c| c.spec.debug).count();
        if shells >= MAX_SHELLS {
            let max = MAX_SHELLS;
            return Err(ShellError::TooMany { id, max }.into());
        }
        Ok(())
    }

    /// What only a pod on the host's kernel can give, and there what the pod
    /// itself has.
    fn check_namespaces(&self, spec: &ContainerSpec) -> Result<()> {
        if self.is_on_host() {
            return host::check_namespaces(spec, self.record.spec.host_namespaces);
        }
        let options = host::NAMESPACE_OPTIONS;
        let host = spec.security.host_namespaces;
        for (wanted, name, what) in [
            (host.network, "network", "the host's network"),
            (host.ipc, "ipc", "the host's IPC namespace"),
            (host.pid, "pid", "the host's PID namespace"),
        ] {
            if wanted {
                let field = format!("{options}.{name}");
                return Err(Error::NotInMicroVm { field, what });
            }
        }
        Ok(())
    }

    /// Whose processes a container is to see has to run beside it.
    fn check_pid_target(&self, spec: &ContainerSpec) -> Result<()> {
        let PidNamespace::Of(target) = spec.security.pid_namespace() else {
            return Ok(());
        };
        match self.containers.get(target) {
            None => Err(Error::Invalid {
                field: "config.linux.security_context.namespace_options.target_id".to_owned(),
                why: format!(
                    "container {target:?} is not in pod sandbox {}",
                    self.record.id
                ),
            }),
            Some(record) if record.phase != ContainerPhase::Running => Err(state_error(
                record,
                "only a running container's processes can be shared",
            )),
            Some(_) => Ok(()),
        }
    }

    async fn put_together(
        &mut self,
        record: &ContainerRecord,
        root: &Disk,
        volumes: &[Disk],
        devices: &Devices,
    ) -> Result<Option<agent_api::ContainerState>> {
        let lease = &root.lease;
        let (id, spec) = (record.id.as_str(), &record.spec);
        let profile = seccomp_profile(spec).await?;
        let mut oci = oci::runtime_spec(
            spec,
            &lease.config,
            &self.record.spec.hostname,
            oci::guest_volumes(spec, &record.binds)?,
            profile.as_ref(),
        )?;
        devices.add_extras(&mut oci)?;
        self.bind_volumes(record).await?;
        let image_user = lease
            .config
            .config()
            .as_ref()
            .and_then(|c| c.user().clone())
            .unwrap_or_default();
        let user = user(spec, &image_user);
        let devices = self.attach_devices(record, devices, &user).await?;
        let log_token = self.new_log_token(record).await?;
        self.open_log(record, log_token).await?;
        let images = self.context.images.clone();
        let machine = self.machine_mut()?;
        let root = root.attach(&images, &mut machine.control).await?;
        let mut image_volumes = Vec::with_capacity(volumes.len());
        for (disk, (mount, volume)) in volumes.iter().zip(spec::image_volumes(&spec.mounts)) {
            image_volumes.push(agent_api::ImageVolume {
                disk: Some(disk.attach(&images, &mut machine.control).await?),
                sub_path: volume.sub_path.clone(),
                container_path: mount.container_path.to_string_lossy().into_owned(),
            });
        }
        let request = agent_api::CreateContainerRequest {
            id: id.to_owned(),
            oci_spec: serde_json::to_vec(&oci).map_err(oci_spec::OciSpecError::SerDe)?,
            root: Some(root),
            user: Some(user),
            provide_etc_files: true,
            stdin: spec.stdin,
            stdin_once: spec.stdin_once,
            log: record.log_file.is_some(),
            log_token: log_token.map_or_else(Vec::new, |token| token.bytes().into()),
            image_volumes,
            devices,
            guest: spec.debug,
        };
        machine.agent.create(request).await
    }

    async fn bind_volumes(&self, record: &ContainerRecord) -> Result<()> {
        let (stage, shared) = (self.paths.stage.clone(), self.paths.shared.clone());
        let (mounts, binds) = (node_volumes(&record.spec), record.binds.clone());
        mounting(&record.spec, move || {
            volumes::bind_all(&stage, &shared, &mounts, &binds)
        })
        .await
    }

    /// Which of the pod's binds a new container's volumes are, or what new
    /// ones are to be.
    async fn plan_volumes(&self, spec: &ContainerSpec) -> Result<Vec<Bind>> {
        if spec.mounts.is_empty() || self.is_on_host() {
            return Ok(Vec::new());
        }
        let there = self.containers.values().flat_map(|c| c.binds.clone());
        let there: Vec<Bind> = there.collect();
        let (mounts, uid) = (node_volumes(spec), self.record.spec.name.uid.clone());
        mounting(spec, move || volumes::plan(&there, &mounts, &uid)).await
    }
}

/// Nothing reserves huge pages in a guest, so none could be had. The kubelet
/// limits to 0 what a pod does not ask for.
pub(super) fn check_huge_pages(on_host: bool, limits: &BTreeMap<String, u64>) -> Result<()> {
    let mut limits = limits.iter();
    match limits.find(|&(_, &bytes)| bytes > 0 && !on_host) {
        Some((size, &bytes)) => Err(Error::HugePages {
            size: size.clone(),
            bytes,
        }),
        None => Ok(()),
    }
}

/// Those that are bound into the pod's directory.
fn node_volumes(spec: &ContainerSpec) -> Vec<Mount> {
    spec::node_volumes(&spec.mounts).cloned().collect()
}

/// A host path may be on a file system that hangs: not on a worker of the
/// runtime, and not for ever.
pub(super) async fn mounting<T: Send + 'static>(
    spec: &ContainerSpec,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let work = faults::spawn_blocking(work);
    match tokio::time::timeout(MOUNT_TIMEOUT, work).await {
        Ok(joined) => joined.map_err(|_| Error::Stopping)?,
        Err(_) => Err(Error::MountTimeout {
            container: spec.name.name.clone(),
            seconds: MOUNT_TIMEOUT.as_secs(),
        }),
    }
}

/// The profile of the node that a container names, unless it is privileged:
/// then no filter applies.
pub(super) async fn seccomp_profile(spec: &ContainerSpec) -> Result<Option<Profile>> {
    let path = match &spec.security.seccomp {
        Seccomp::Localhost(path) if !spec.security.privileged => path.clone(),
        _ => return Ok(None),
    };
    let file = path.clone();
    let work = faults::spawn_blocking(move || Profile::read(&file));
    match tokio::time::timeout(MOUNT_TIMEOUT, work).await {
        Ok(joined) => joined
            .map_err(|_| Error::Stopping)?
            .map(Some)
            .map_err(|source| Error::SeccompProfile { path, source }),
        Err(_) => Err(Error::SeccompProfileTimeout {
            path,
            seconds: MOUNT_TIMEOUT.as_secs(),
        }),
    }
}

fn log_file(directory: Option<&Path>, path: Option<&Path>) -> Option<PathBuf> {
    Some(directory?.join(path?))
}

/// The image's.
fn stop_signal(lease: &Lease) -> String {
    let signal = lease
        .config
        .config()
        .as_ref()
        .and_then(|config| config.stop_signal().clone());
    signal
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "SIGTERM".to_owned())
}

/// CRI's wish, else what the image's `user[:group]` says.
pub(super) fn user(spec: &ContainerSpec, image_user: &str) -> agent_api::User {
    let asked = &spec.user;
    let from_image = asked.username.is_empty() && asked.uid.is_none();
    let (name, group) = image_user.split_once(':').unwrap_or((image_user, ""));
    agent_api::User {
        username: if from_image {
            name.to_owned()
        } else {
            asked.username.clone()
        },
        uid: asked.uid,
        gid: asked.gid,
        groupname: if from_image && asked.gid.is_none() {
            group.to_owned()
        } else {
            String::new()
        },
        supplemental_groups: asked.supplemental_groups.clone(),
        strict_groups: asked.strict_groups,
    }
}
