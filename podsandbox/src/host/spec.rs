//! The OCI runtime spec of a container on the host's kernel: the guest's, with
//! everything in it that is the host's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_api::{PID_OF, PID_OF_POD};
use oci_spec::runtime::{
    Capabilities, Capability, LinuxDeviceCgroupBuilder, LinuxMemoryBuilder, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResources, LinuxSeccomp, Mount, MountBuilder, RootBuilder, Spec,
};

use super::{devices, propagation};
use crate::oci::bind_mount;
use crate::resize::explicit;
use crate::seccomp::{self, Profile};
use crate::spec::{ContainerSpec, HostNamespaces, PidNamespace, Resources, Seccomp};
use crate::volumes::find_source;
use crate::{Error, Result, cgroup};

/// What older runtimes take as well; nothing newer is used.
const VERSION: &str = "1.0.2";
/// Of a pod in the host's IPC namespace.
const HOST_SHM: &str = "/dev/shm";
const ETC_FILES: [&str; 3] = ["hosts", "resolv.conf", "hostname"];
const CAP_SYS_RESOURCE: u32 = 24;

/// What the host says about what may be granted.
#[derive(Clone, Debug, Default)]
pub struct Host {
    pub unified_cgroups: bool,
    /// Bits of capabilities(7) that this process has.
    pub capabilities: u64,
    pub oom_score_adj: i32,
    pub limits_swap: bool,
    pub limits_huge_pages: bool,
}

impl Host {
    #[must_use]
    pub fn read() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let held = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
        let adj = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        Self {
            unified_cgroups: cgroup::is_unified(),
            capabilities: held.unwrap_or(0),
            oom_score_adj: adj.trim().parse().unwrap_or(0),
            limits_swap: cgroup::limits_swap(),
            limits_huge_pages: cgroup::has_controller("hugetlb"),
        }
    }

    /// What of this can be given. Lowering it takes a capability; a process that
    /// is killed sooner than asked for is better than none.
    #[must_use]
    pub fn oom_score(&self, asked: i32) -> i32 {
        if self.has(CAP_SYS_RESOURCE) {
            asked
        } else {
            asked.max(self.oom_score_adj)
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities & (1 << capability) != 0
    }
}

/// The pod that a container is put into.
pub struct Pod<'a> {
    /// With the files of /etc that its containers share.
    pub etc: &'a Path,
    pub shm: &'a Path,
    pub namespaces: HostNamespaces,
    /// Its control group, from the hierarchy's root.
    pub cgroup: &'a Path,
}

/// The mounts of a container's volumes: the node's own paths, and the places
/// where its image volumes are mounted, in their order.
pub fn volumes(container: &ContainerSpec, images: &[PathBuf]) -> Result<Vec<Mount>> {
    propagation::check(&container.mounts)?;
    let mut images = images.iter();
    let mount = |volume: &crate::spec::Mount| {
        let missing = || Error::MountSource {
            path: volume.container_path.clone(),
            source: io::ErrorKind::NotFound.into(),
        };
        if volume.image.is_some() {
            return bind_mount(volume, images.next().ok_or_else(missing)?, "ro");
        }
        let path = &volume.host_path;
        let found = find_source(path)?;
        let access = match (volume.read_only, volume.recursive_read_only) {
            (false, _) => "rw",
            (true, false) => "ro",
            (true, true) => "rro",
        };
        bind_mount(volume, &found, access)
    };
    container.mounts.iter().map(mount).collect()
}

/// Makes of `spec`, as it is for a guest but with [`volumes`] of the host, the
/// one for the host.
pub fn for_host(
    mut spec: Spec,
    id: &str,
    container: &ContainerSpec,
    root: PathBuf,
    profile: Option<&Profile>,
    pod: &Pod<'_>,
    host: &Host,
) -> Result<Spec> {
    spec.set_version(VERSION.to_owned());
    // The supervisor has set it, in the namespace that is inherited.
    spec.set_hostname(None);
    spec.set_root(Some(
        RootBuilder::default()
            .path(root)
            .readonly(container.security.read_only_root)
            .build()?,
    ));
    let mounts = spec.mounts().clone().unwrap_or_default();
    spec.set_mounts(Some(host_mounts(mounts, container, pod)?));
    limit_process(&mut spec, host);
    let mut linux = spec.linux().clone().unwrap_or_default();
    linux.set_namespaces(Some(namespaces(container, pod, host)?));
    linux.set_cgroups_path(Some(pod.cgroup.join(id)));
    let resources = linux.resources().clone().unwrap_or_default();
    linux.set_resources(Some(host_resources(resources, container, host)?));
    if container.security.privileged {
        linux.set_devices(Some(devices::of_host()?));
    }
    let process = spec.process().as_ref();
    let sets = process.and_then(|process| process.capabilities().as_ref());
    let held = sets.and_then(|sets| sets.bounding().clone());
    linux.set_seccomp(filter(container, profile, &held.unwrap_or_default())?);
    spec.set_linux(Some(linux));
    Ok(spec)
}

fn filter(
    container: &ContainerSpec,
    profile: Option<&Profile>,
    held: &Capabilities,
) -> Result<Option<LinuxSeccomp>> {
    if container.security.privileged {
        return Ok(None);
    }
    match (&container.security.seccomp, profile) {
        (Seccomp::RuntimeDefault, _) => Ok(Some(seccomp::host_default(held)?)),
        (Seccomp::Localhost(_), Some(profile)) => Ok(Some(profile.for_host(held)?)),
        // Without its profile it was refused before.
        (Seccomp::Localhost(_) | Seccomp::Unconfined, _) => Ok(None),
    }
}

/// Network, IPC and host name are inherited from the supervisor, and the host's
/// PID namespace where none is listed.
fn namespaces(
    container: &ContainerSpec,
    pod: &Pod<'_>,
    host: &Host,
) -> Result<Vec<oci_spec::runtime::LinuxNamespace>> {
    let of = |typ| LinuxNamespaceBuilder::default().typ(typ);
    let mut all = vec![of(LinuxNamespaceType::Mount).build()?];
    // As the field's runtimes: v1 shows the host's, and privileged
    // containers look after the host.
    if host.unified_cgroups && !container.security.privileged {
        all.push(of(LinuxNamespaceType::Cgroup).build()?);
    }
    match container.security.pid_namespace() {
        PidNamespace::Own => all.push(of(LinuxNamespaceType::Pid).build()?),
        PidNamespace::Of(target) => {
            let path = format!("{PID_OF}{target}");
            all.push(of(LinuxNamespaceType::Pid).path(path).build()?);
        }
        PidNamespace::Pods if pod.namespaces.pid => {}
        PidNamespace::Pods => {
            all.push(of(LinuxNamespaceType::Pid).path(PID_OF_POD).build()?);
        }
    }
    Ok(all)
}

fn host_mounts(mounts: Vec<Mount>, container: &ContainerSpec, pod: &Pod<'_>) -> Result<Vec<Mount>> {
    let is_volume = |mount: &Mount| mount.typ().as_deref() == Some("bind");
    let (volumes, mut kernel): (Vec<Mount>, Vec<Mount>) = mounts.into_iter().partition(is_volume);
    let shm = if pod.namespaces.ipc {
        Path::new(HOST_SHM)
    } else {
        pod.shm
    };
    let mode = if container.security.read_only_root {
        "ro"
    } else {
        "rw"
    };
    let mut shared = vec![bind(
        shm,
        Path::new(HOST_SHM),
        &["nosuid", "nodev", "noexec", "rw"],
    )?];
    for name in ETC_FILES {
        let (from, to) = (pod.etc.join(name), Path::new("/etc").join(name));
        shared.push(bind(&from, &to, &[mode])?);
    }
    // A volume in their place is what was asked for.
    shared.retain(|mount| {
        volumes
            .iter()
            .all(|v| v.destination() != mount.destination())
    });
    kernel.extend(shared);
    kernel.extend(volumes);
    // A mount hides what is mounted below it before: a volume at /dev or /etc
    // must come before what the pod has there.
    kernel.sort_by_key(|mount| mount.destination().components().count());
    Ok(kernel)
}

fn bind(from: &Path, to: &Path, options: &[&str]) -> Result<Mount> {
    let options = ["rbind", "rprivate"].iter().chain(options);
    Ok(MountBuilder::default()
        .destination(to)
        .source(from)
        .typ("bind")
        .options(options.map(|&o| o.to_owned()).collect::<Vec<_>>())
        .build()?)
}

/// Nobody can be given more than this process has, in a container perhaps.
fn limit_process(spec: &mut Spec, host: &Host) {
    let Some(mut process) = spec.process().clone() else {
        return;
    };
    if let Some(mut sets) = process.capabilities().clone() {
        let limit = |set: &Option<Capabilities>| -> Option<Capabilities> {
            let held = set.iter().flatten().copied();
            Some(held.filter(|c| host.has(number(*c))).collect())
        };
        sets.set_bounding(limit(sets.bounding()));
        sets.set_effective(limit(sets.effective()));
        sets.set_permitted(limit(sets.permitted()));
        sets.set_inheritable(limit(sets.inheritable()));
        sets.set_ambient(limit(sets.ambient()));
        process.set_capabilities(Some(sets));
    }
    let asked = process.oom_score_adj().unwrap_or(0);
    process.set_oom_score_adj(Some(host.oom_score(asked)));
    spec.set_process(Some(process));
}

fn host_resources(
    mut resources: LinuxResources,
    container: &ContainerSpec,
    host: &Host,
) -> Result<LinuxResources> {
    if !container.security.privileged {
        // The runtime allows those that every container has.
        let none = LinuxDeviceCgroupBuilder::default()
            .allow(false)
            .access("rwm");
        resources.set_devices(Some(vec![none.build()?]));
    }
    limits(resources, &container.resources, host)
}

/// The limits of a container that has others, all of them: one that is not
/// asked for is lifted.
pub fn changed_resources(asked: &Resources, host: &Host) -> Result<LinuxResources> {
    let mut resources = limits(explicit(asked)?, asked, host)?;
    if asked.memory_limit_bytes.is_none()
        && host.limits_swap
        && let Some(memory) = resources.memory_mut()
    {
        memory.set_swap(memory.limit());
    }
    Ok(resources)
}

/// `resources` with what a guest has no use for, and what this host can keep.
fn limits(mut resources: LinuxResources, asked: &Resources, host: &Host) -> Result<LinuxResources> {
    if let Some(limit) = asked.memory_limit_bytes {
        let bytes = |value| i64::try_from(value).unwrap_or(i64::MAX);
        let mut memory = LinuxMemoryBuilder::default().limit(bytes(limit));
        if host.limits_swap {
            // No swap beyond the limit, unless it was asked for.
            let both = asked.memory_swap_limit_bytes.unwrap_or(limit).max(limit);
            memory = memory.swap(bytes(both));
        }
        resources.set_memory(Some(memory.build()?));
    }
    if let Some(mut cpu) = resources.cpu().clone() {
        let list = |text: &String| (!text.is_empty()).then(|| text.clone());
        cpu.set_cpus(list(&asked.cpuset_cpus));
        cpu.set_mems(list(&asked.cpuset_mems));
        resources.set_cpu(Some(cpu));
    }
    if !host.limits_huge_pages
        && let Some(limits) = resources.hugepage_limits().clone()
    {
        // A host without them keeps to a limit of none.
        let kept: Vec<_> = limits.into_iter().filter(|l| l.limit() != 0).collect();
        resources.set_hugepage_limits((!kept.is_empty()).then_some(kept));
    }
    Ok(resources)
}

/// capability.h's numbers.
fn number(capability: Capability) -> u32 {
    const ORDER: [Capability; 41] = [
        Capability::Chown,
        Capability::DacOverride,
        Capability::DacReadSearch,
        Capability::Fowner,
        Capability::Fsetid,
        Capability::Kill,
        Capability::Setgid,
        Capability::Setuid,
        Capability::Setpcap,
        Capability::LinuxImmutable,
        Capability::NetBindService,
        Capability::NetBroadcast,
        Capability::NetAdmin,
        Capability::NetRaw,
        Capability::IpcLock,
        Capability::IpcOwner,
        Capability::SysModule,
        Capability::SysRawio,
        Capability::SysChroot,
        Capability::SysPtrace,
        Capability::SysPacct,
        Capability::SysAdmin,
        Capability::SysBoot,
        Capability::SysNice,
        Capability::SysResource,
        Capability::SysTime,
        Capability::SysTtyConfig,
        Capability::Mknod,
        Capability::Lease,
        Capability::AuditWrite,
        Capability::AuditControl,
        Capability::Setfcap,
        Capability::MacOverride,
        Capability::MacAdmin,
        Capability::Syslog,
        Capability::WakeAlarm,
        Capability::BlockSuspend,
        Capability::AuditRead,
        Capability::Perfmon,
        Capability::Bpf,
        Capability::CheckpointRestore,
    ];
    let at = ORDER.iter().position(|&known| known == capability);
    at.and_then(|at| u32::try_from(at).ok()).unwrap_or(63)
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
