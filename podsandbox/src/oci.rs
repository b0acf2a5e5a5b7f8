//! The OCI runtime spec of a container, from what CRI asked for and what its
//! image says (OCI runtime spec 1.2; OCI image spec, "Conversion to OCI
//! runtime configuration").

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use agent_api::{GUEST_PIDS, PID_OF};
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder,
    LinuxDeviceCgroupBuilder, LinuxHugepageLimitBuilder, LinuxMemoryBuilder, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, LinuxResourcesBuilder, Mount,
    MountBuilder, ProcessBuilder, RootBuilder, Spec, SpecBuilder,
};

use crate::seccomp::{self, Profile};
use crate::spec::{ContainerSpec, PidNamespace, Propagation, Resources, Seccomp};
use crate::volumes::Bind;
use crate::{Error, Result};

/// What containerd and CRI-O search when neither image nor pod sets PATH.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The capabilities every runtime of the field grants by default.
const DEFAULT_CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

const ALL_CAPABILITIES: [Capability; 41] = [
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::AuditWrite,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Kill,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::Mknod,
    Capability::NetAdmin,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetRaw,
    Capability::Perfmon,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysChroot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

pub fn runtime_spec(
    spec: &ContainerSpec,
    image: &ImageConfiguration,
    hostname: &str,
    volumes: Vec<Mount>,
    profile: Option<&Profile>,
) -> Result<Spec> {
    let config = image.config().clone().unwrap_or_default();
    let args = command_line(
        spec,
        config.entrypoint().as_deref().unwrap_or_default(),
        config.cmd().as_deref().unwrap_or_default(),
    )?;
    let cwd = [
        spec.working_dir.as_str(),
        config.working_dir().as_deref().unwrap_or_default(),
    ]
    .into_iter()
    .find(|dir| !dir.is_empty())
    .unwrap_or("/");
    let held = capabilities(spec)?;
    let process = ProcessBuilder::default()
        .terminal(spec.tty)
        .args(args)
        .env(environment(
            spec,
            config.env().as_deref().unwrap_or_default(),
            hostname,
        ))
        .cwd(cwd)
        .no_new_privileges(spec.security.no_new_privileges)
        .oom_score_adj(spec.resources.oom_score_adj)
        .capabilities(capability_sets(&held, &ambient_capabilities(spec)?)?)
        .build()?;

    // The kubelet's lists follow ProcMount alone; for a privileged container
    // they hold with no runtime of the field.
    let restricted = |paths: &[PathBuf]| match spec.security.privileged {
        true => Vec::new(),
        false => text(paths),
    };
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces(spec)?)
        .resources(container_resources(spec)?)
        .masked_paths(restricted(&spec.security.masked_paths))
        .readonly_paths(restricted(&spec.security.readonly_paths))
        .build()?;
    if !spec.security.privileged {
        linux.set_seccomp(match (&spec.security.seccomp, profile) {
            (Seccomp::Unconfined, _) => None,
            (Seccomp::RuntimeDefault, _) => Some(seccomp::runtime_default(&held)?),
            (Seccomp::Localhost(_), Some(profile)) => Some(profile.for_container(&held)?),
            (Seccomp::Localhost(path), None) => {
                return Err(Error::Invalid {
                    field: "linux.security_context.seccomp".to_owned(),
                    why: format!("profile {path:?} was not read"),
                });
            }
        });
    }
    linux.set_rootfs_propagation(Some(root_propagation(spec).to_owned()));

    Ok(SpecBuilder::default()
        .version("1.2.0")
        .hostname(hostname)
        .root(
            RootBuilder::default()
                .path("rootfs")
                .readonly(spec.security.read_only_root)
                .build()?,
        )
        .process(process)
        .mounts(mounts(spec, volumes)?)
        .linux(linux)
        .build()?)
}

/// Those that are the container's own, and the process ids of another one;
/// without any for these it has the pod's.
fn namespaces(spec: &ContainerSpec) -> Result<Vec<LinuxNamespace>> {
    let of = |kind| LinuxNamespaceBuilder::default().typ(kind);
    let mut all = vec![of(LinuxNamespaceType::Mount).build()?];
    if spec.debug {
        // All processes of the guest, and all control groups.
        all.push(of(LinuxNamespaceType::Pid).path(GUEST_PIDS).build()?);
        return Ok(all);
    }
    all.push(of(LinuxNamespaceType::Cgroup).build()?);
    match spec.security.pid_namespace() {
        PidNamespace::Own => all.push(of(LinuxNamespaceType::Pid).build()?),
        PidNamespace::Of(target) => {
            let path = format!("{PID_OF}{target}");
            all.push(of(LinuxNamespaceType::Pid).path(path).build()?);
        }
        PidNamespace::Pods => {}
    }
    Ok(all)
}

fn text(paths: &[PathBuf]) -> Vec<String> {
    paths
        .iter()
        .map(|path| path.to_string_lossy().into_owned())
        .collect()
}

/// CRI's `command` replaces the image's entrypoint and, with it, its cmd;
/// `args` replaces only the cmd.
fn command_line(
    spec: &ContainerSpec,
    entrypoint: &[String],
    cmd: &[String],
) -> Result<Vec<String>> {
    let (head, tail) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (true, true) => (entrypoint, cmd),
        (true, false) => (entrypoint, spec.args.as_slice()),
        (false, _) => (spec.command.as_slice(), spec.args.as_slice()),
    };
    let line: Vec<String> = head.iter().chain(tail).cloned().collect();
    if line.is_empty() {
        return Err(Error::Invalid {
            field: "config.command".to_owned(),
            why: format!(
                "is empty and image {:?} has neither entrypoint nor cmd",
                spec.user_image
            ),
        });
    }
    Ok(line)
}

fn environment(spec: &ContainerSpec, image: &[String], hostname: &str) -> Vec<String> {
    let mut names: HashMap<String, usize> = HashMap::new();
    let mut variables: Vec<String> = Vec::new();
    let mut set = |entry: String| {
        let name = entry.split('=').next().unwrap_or_default().to_owned();
        match names.get(&name) {
            Some(&index) => variables[index] = entry,
            None => {
                names.insert(name, variables.len());
                variables.push(entry);
            }
        }
    };
    set(DEFAULT_PATH.to_owned());
    set(format!("HOSTNAME={hostname}"));
    if spec.tty {
        set("TERM=xterm".to_owned());
    }
    for entry in image {
        set(entry.clone());
    }
    for (name, value) in &spec.env {
        set(format!("{name}={value}"));
    }
    variables
}

/// What the container's processes may hold.
fn capabilities(spec: &ContainerSpec) -> Result<HashSet<Capability>> {
    let security = &spec.security;
    let is_all = |name: &&String| name.eq_ignore_ascii_case("ALL");
    let mut set = HashSet::from(DEFAULT_CAPABILITIES);
    if security.privileged || security.add_capabilities.iter().any(|name| is_all(&name)) {
        set = HashSet::from(ALL_CAPABILITIES);
    }
    if security.drop_capabilities.iter().any(|name| is_all(&name)) {
        set.clear();
    }
    for name in security
        .add_capabilities
        .iter()
        .filter(|name| !is_all(name))
    {
        set.insert(known_capability(name, "add")?);
    }
    for name in security
        .drop_capabilities
        .iter()
        .filter(|name| !is_all(name))
    {
        set.remove(&known_capability(name, "drop")?);
    }
    // Whoever names one as ambient means it to be held.
    set.extend(ambient_capabilities(spec)?);
    Ok(set)
}

/// What a process keeps that runs as another user than root. One that is
/// dropped by its name as well is dropped.
fn ambient_capabilities(spec: &ContainerSpec) -> Result<HashSet<Capability>> {
    let security = &spec.security;
    let mut set = HashSet::new();
    for name in &security.ambient_capabilities {
        if name.eq_ignore_ascii_case("ALL") {
            set.extend(ALL_CAPABILITIES);
        } else {
            set.insert(known_capability(name, "add_ambient")?);
        }
    }
    for name in &security.drop_capabilities {
        if !name.eq_ignore_ascii_case("ALL") {
            set.remove(&known_capability(name, "drop")?);
        }
    }
    Ok(set)
}

/// An ambient capability has to be inheritable (capabilities(7)); without one
/// nothing is.
fn capability_sets(
    held: &HashSet<Capability>,
    ambient: &HashSet<Capability>,
) -> Result<oci_spec::runtime::LinuxCapabilities> {
    let set: Capabilities = held.iter().copied().collect();
    let ambient: Capabilities = ambient.iter().copied().collect();
    Ok(LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(ambient.clone())
        .ambient(ambient)
        .build()?)
}

fn known_capability(name: &str, list: &str) -> Result<Capability> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    serde_json::from_value(serde_json::Value::String(format!("CAP_{short}"))).map_err(|_| {
        Error::Invalid {
            field: format!("linux.security_context.capabilities.{list}_capabilities"),
            why: format!("{name:?} is no capability of Linux"),
        }
    })
}

/// The kernel's file systems a container finds, then its volumes, parents
/// before children.
fn mounts(spec: &ContainerSpec, mut volumes: Vec<Mount>) -> Result<Vec<Mount>> {
    let sys_mode = if spec.security.privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        kernel_mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        kernel_mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        )?,
        kernel_mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        )?,
        kernel_mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        )?,
        kernel_mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", sys_mode],
        )?,
        kernel_mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", sys_mode],
        )?,
    ];
    volumes.sort_by_key(|volume| volume.destination().components().count());
    for volume in volumes {
        mounts.retain(|mount| mount.destination() != volume.destination());
        mounts.push(volume);
    }
    Ok(mounts)
}

/// What the agent is to mount for `spec`, whose volumes of the node are `binds`.
pub fn guest_volumes(spec: &ContainerSpec, binds: &[Bind]) -> Result<Vec<Mount>> {
    let (mut binds, mut images) = (binds.iter(), 0);
    let mut volumes = Vec::with_capacity(spec.mounts.len());
    for volume in &spec.mounts {
        if volume.image.is_some() {
            volumes.push(image_mount(volume, images)?);
            images += 1;
        } else {
            let bind = binds.next().ok_or_else(|| Error::MountSource {
                path: volume.host_path.clone(),
                source: std::io::ErrorKind::NotFound.into(),
            })?;
            let source = Path::new(agent_api::SHARED_DIR).join(&bind.name);
            volumes.push(bind_mount(volume, &source, bind.guest_option(volume))?);
        }
    }
    Ok(volumes)
}

/// `access`: the option that says what of it may be written.
pub fn bind_mount(volume: &crate::spec::Mount, source: &Path, access: &str) -> Result<Mount> {
    let propagation = match volume.propagation {
        Propagation::Private => "rprivate",
        Propagation::HostToContainer => "rslave",
        Propagation::Bidirectional => "rshared",
    };
    Ok(MountBuilder::default()
        .destination(&volume.container_path)
        .source(source)
        .typ("bind")
        .options(vec![
            "rbind".to_owned(),
            propagation.to_owned(),
            access.to_owned(),
        ])
        .build()?)
}

/// The agent has the image's files by the volume's number.
fn image_mount(volume: &crate::spec::Mount, number: usize) -> Result<Mount> {
    Ok(MountBuilder::default()
        .destination(&volume.container_path)
        .typ("image")
        .source(number.to_string())
        .options(vec!["ro".to_owned()])
        .build()?)
}

fn kernel_mount(at: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount> {
    Ok(MountBuilder::default()
        .destination(at)
        .typ(kind)
        .source(source)
        .options(options.iter().map(|&o| o.to_owned()).collect::<Vec<_>>())
        .build()?)
}

fn root_propagation(spec: &ContainerSpec) -> &'static str {
    let has = |wanted| spec.mounts.iter().any(|mount| mount.propagation == wanted);
    if has(Propagation::Bidirectional) {
        "rshared"
    } else if has(Propagation::HostToContainer) {
        "rslave"
    } else {
        "rprivate"
    }
}

/// A privileged container may use every device of its guest, and this one rule
/// without a number tells the agent to give it the files of them; others those
/// that the agent grants to all.
fn container_resources(spec: &ContainerSpec) -> Result<LinuxResources> {
    let mut resources = linux_resources(&spec.resources)?;
    if spec.security.privileged {
        let all = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .access("rwm")
            .build()?;
        resources.set_devices(Some(vec![all]));
    }
    Ok(resources)
}

/// CRI's resources in the terms of the OCI runtime spec.
pub fn linux_resources(resources: &Resources) -> Result<LinuxResources> {
    let mut cpu = LinuxCpuBuilder::default();
    if let Some(shares) = resources.cpu_shares {
        cpu = cpu.shares(shares);
    }
    if let Some(quota) = resources.cpu_quota_us {
        cpu = cpu.quota(i64::try_from(quota).unwrap_or(i64::MAX));
    }
    if let Some(period) = resources.cpu_period_us {
        cpu = cpu.period(period);
    }
    let mut memory = LinuxMemoryBuilder::default();
    if let Some(limit) = resources.memory_limit_bytes {
        memory = memory.limit(i64::try_from(limit).unwrap_or(i64::MAX));
    }
    let mut builder = LinuxResourcesBuilder::default()
        .cpu(cpu.build()?)
        .memory(memory.build()?);
    if !resources.unified.is_empty() {
        builder = builder.unified(
            resources
                .unified
                .clone()
                .into_iter()
                .collect::<HashMap<_, _>>(),
        );
    }
    if !resources.hugepage_limits.is_empty() {
        let limits = resources.hugepage_limits.iter().map(|(size, &bytes)| {
            LinuxHugepageLimitBuilder::default()
                .page_size(size.clone())
                .limit(i64::try_from(bytes).unwrap_or(i64::MAX))
                .build()
        });
        builder = builder.hugepage_limits(limits.collect::<std::result::Result<Vec<_>, _>>()?);
    }
    Ok(builder.build()?)
}

#[cfg(test)]
#[path = "oci_tests.rs"]
pub(crate) mod tests;
