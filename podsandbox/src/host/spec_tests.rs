use std::fs;

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::LinuxDeviceType;

use super::*;
use crate::spec::{ContainerName, Propagation, Resources, Security, User};

fn container() -> ContainerSpec {
    ContainerSpec {
        name: ContainerName {
            name: "c".into(),
            attempt: 0,
        },
        user_image: "image".into(),
        image: "image".into(),
        command: vec!["run".into()],
        args: Vec::new(),
        working_dir: String::new(),
        env: Vec::new(),
        mounts: Vec::new(),
        devices: Vec::new(),
        cdi_devices: Vec::new(),
        labels: Default::default(),
        annotations: Default::default(),
        log_path: None,
        stdin: false,
        stdin_once: false,
        tty: false,
        stop_signal: None,
        user: User::default(),
        user_namespace: None,
        security: Security {
            own_pid_namespace: true,
            ..Security::default()
        },
        resources: Resources::default(),
        debug: false,
    }
}

fn all_capabilities() -> Host {
    Host {
        capabilities: u64::MAX,
        ..Host::default()
    }
}

fn made(container: &ContainerSpec, namespaces: HostNamespaces, host: &Host) -> Spec {
    let image = ImageConfiguration::default();
    let volumes = volumes(container, &[PathBuf::from("/run/images/0/etc")]).unwrap();
    let base = crate::oci::runtime_spec(container, &image, "web", volumes, None).unwrap();
    let pod = Pod {
        etc: Path::new("/lib/pod/etc"),
        shm: Path::new("/run/pod/shm"),
        namespaces,
        cgroup: Path::new("/kubepods/drupe-p"),
    };
    for_host(base, "id", container, "/run/root".into(), None, &pod, host).unwrap()
}

fn kinds(spec: &Spec) -> Vec<LinuxNamespaceType> {
    let linux = spec.linux().as_ref().unwrap();
    let all = linux.namespaces().as_ref().unwrap();
    all.iter().map(|namespace| namespace.typ()).collect()
}

fn source_at<'a>(spec: &'a Spec, at: &str) -> Option<&'a Path> {
    let mounts = spec.mounts().as_ref().unwrap();
    let mount = mounts.iter().find(|m| m.destination() == Path::new(at))?;
    mount.source().as_deref()
}

#[test]
fn a_container_has_what_is_its_own_and_inherits_the_rest() {
    let own = HostNamespaces::default();
    let spec = made(&container(), own, &all_capabilities());
    assert_eq!(
        kinds(&spec),
        [LinuxNamespaceType::Mount, LinuxNamespaceType::Pid]
    );
    assert_eq!(*spec.hostname(), None, "a name needs a namespace");
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(
        linux.cgroups_path().as_deref(),
        Some(Path::new("/kubepods/drupe-p/id"))
    );
    let rules = linux
        .resources()
        .as_ref()
        .unwrap()
        .devices()
        .clone()
        .unwrap();
    assert!(!rules[0].allow() && rules.len() == 1, "{rules:?}");
    assert_eq!(
        source_at(&spec, "/dev/shm"),
        Some(Path::new("/run/pod/shm"))
    );
    assert_eq!(
        source_at(&spec, "/etc/hosts"),
        Some(Path::new("/lib/pod/etc/hosts"))
    );

    let unified = Host {
        unified_cgroups: true,
        ..all_capabilities()
    };
    assert!(kinds(&made(&container(), own, &unified)).contains(&LinuxNamespaceType::Cgroup));
}

#[test]
fn processes_are_seen_where_it_was_asked_for() {
    let mut container = container();
    container.security.own_pid_namespace = false;
    let own = HostNamespaces::default();
    let hosts = HostNamespaces { pid: true, ..own };
    let spec = made(&container, hosts, &all_capabilities());
    assert_eq!(kinds(&spec), [LinuxNamespaceType::Mount], "the host's");
    let joined = |container: &ContainerSpec| {
        let spec = made(container, own, &all_capabilities());
        let linux = spec.linux().as_ref().unwrap();
        let pid = &linux.namespaces().as_ref().unwrap()[1];
        pid.path().clone().unwrap()
    };
    assert_eq!(joined(&container), Path::new("pod"));
    container.security.pid_target = Some("other".into());
    assert_eq!(joined(&container), Path::new("container:other"));
}

#[test]
fn the_hosts_ipc_namespace_comes_with_its_shared_memory() {
    let shared = HostNamespaces {
        ipc: true,
        ..HostNamespaces::default()
    };
    let spec = made(&container(), shared, &all_capabilities());
    assert_eq!(source_at(&spec, "/dev/shm"), Some(Path::new("/dev/shm")));
}

#[test]
fn volumes_are_the_hosts_own_paths_and_win_over_what_the_pod_has() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hosts");
    fs::write(&file, "").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let mut container = container();
    container.mounts = vec![crate::spec::Mount {
        host_path: link,
        container_path: "/etc/hosts".into(),
        read_only: true,
        recursive_read_only: false,
        propagation: Propagation::Private,
        id_mapping: None,
        image: None,
    }];
    let own = HostNamespaces::default();
    let spec = made(&container, own, &all_capabilities());
    let real = fs::canonicalize(&file).unwrap();
    assert_eq!(source_at(&spec, "/etc/hosts"), Some(real.as_path()));
    let mounts = spec.mounts().as_ref().unwrap();
    let at = |mount: &&Mount| mount.destination() == Path::new("/etc/hosts");
    assert_eq!(mounts.iter().filter(at).count(), 1);
}

#[test]
fn volumes_say_what_of_them_may_be_written() {
    let mut container = container();
    let volume = |at: &str, read_only, recursive_read_only| crate::spec::Mount {
        host_path: "/proc".into(),
        container_path: at.into(),
        read_only,
        recursive_read_only,
        propagation: Propagation::Private,
        id_mapping: None,
        image: None,
    };
    let image = crate::spec::Mount {
        host_path: PathBuf::new(),
        image: Some(crate::spec::ImageVolume {
            image: "image".into(),
            sub_path: "etc".into(),
        }),
        ..volume("/image", true, false)
    };
    container.mounts = vec![
        volume("/all", true, true),
        image,
        volume("/top", true, false),
        volume("/none", false, false),
    ];
    let spec = made(&container, HostNamespaces::default(), &all_capabilities());
    let mounts = spec.mounts().as_ref().unwrap();
    for (at, access) in [
        ("/all", "rro"),
        ("/image", "ro"),
        ("/top", "ro"),
        ("/none", "rw"),
    ] {
        let mount = mounts.iter().find(|m| m.destination() == Path::new(at));
        let options = mount.unwrap().options().clone().unwrap();
        assert_eq!(options, ["rbind", "rprivate", access], "{at}");
    }
    assert_eq!(
        source_at(&spec, "/image"),
        Some(Path::new("/run/images/0/etc"))
    );
}

#[test]
fn a_privileged_container_has_the_hosts_devices() {
    let mut container = container();
    container.security.privileged = true;
    let host = Host {
        unified_cgroups: true,
        ..all_capabilities()
    };
    let spec = made(&container, HostNamespaces::default(), &host);
    let linux = spec.linux().as_ref().unwrap();
    let devices = linux.devices().as_ref().unwrap();
    let null = devices.iter().find(|d| d.path() == Path::new("/dev/null"));
    assert_eq!(null.unwrap().typ(), LinuxDeviceType::C);
    let rules = linux
        .resources()
        .as_ref()
        .unwrap()
        .devices()
        .clone()
        .unwrap();
    assert!(rules[0].allow(), "{rules:?}");
    assert!(!kinds(&spec).contains(&LinuxNamespaceType::Cgroup));
}

#[test]
fn nothing_is_granted_that_this_process_lacks() {
    let host = Host {
        // CAP_CHOWN and CAP_KILL.
        capabilities: 0b10_0001,
        oom_score_adj: 100,
        ..Host::default()
    };
    let mut wanted = container();
    wanted.security.privileged = true;
    wanted.resources.oom_score_adj = -998;
    let spec = made(&wanted, HostNamespaces::default(), &host);
    let process = spec.process().as_ref().unwrap();
    let held = process.capabilities().as_ref().unwrap().bounding().clone();
    let expected: Capabilities = [Capability::Chown, Capability::Kill].into_iter().collect();
    assert_eq!(held, Some(expected));
    assert_eq!(process.oom_score_adj(), Some(100));
    let spec = made(&wanted, HostNamespaces::default(), &all_capabilities());
    let adj = spec.process().as_ref().unwrap().oom_score_adj();
    assert_eq!(adj, Some(-998));
}

#[test]
fn limits_are_those_that_the_host_can_keep() {
    let mut limited = container();
    limited.resources = Resources {
        memory_limit_bytes: Some(1 << 20),
        cpuset_cpus: "0-1".into(),
        hugepage_limits: [("2MB".to_owned(), 0)].into(),
        ..Resources::default()
    };
    let resources = |host: &Host| {
        let spec = made(&limited, HostNamespaces::default(), host);
        let linux = spec.linux().clone().unwrap();
        linux.resources().clone().unwrap()
    };
    let plain = resources(&all_capabilities());
    let memory = plain.memory().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(1 << 20), None));
    assert_eq!(plain.cpu().as_ref().unwrap().cpus().as_deref(), Some("0-1"));
    assert!(plain.hugepage_limits().is_none());
    let able = resources(&Host {
        limits_swap: true,
        limits_huge_pages: true,
        ..all_capabilities()
    });
    assert_eq!(able.memory().unwrap().swap(), Some(1 << 20));
    let changed = |asked: &Resources| {
        let host = Host {
            limits_swap: true,
            ..all_capabilities()
        };
        changed_resources(asked, &host).unwrap()
    };
    let kept = changed(&limited.resources);
    let memory = kept.memory().unwrap();
    assert_eq!(
        (memory.limit(), memory.swap()),
        (Some(1 << 20), Some(1 << 20))
    );
    let cpu = kept.cpu().clone().unwrap();
    assert_eq!(
        (cpu.cpus().as_deref(), cpu.quota()),
        (Some("0-1"), Some(-1))
    );
    assert!(kept.hugepage_limits().is_none());
    let memory = changed(&Resources::default()).memory().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(-1), Some(-1)));
    assert_eq!(able.hugepage_limits().as_ref().unwrap().len(), 1);
}

#[test]
fn a_volume_comes_before_what_the_pod_mounts_below_it() {
    let mut container = container();
    let volume = |at: &str| crate::spec::Mount {
        host_path: "/proc".into(),
        container_path: at.into(),
        read_only: false,
        recursive_read_only: false,
        propagation: Propagation::Private,
        id_mapping: None,
        image: None,
    };
    container.mounts = vec![volume("/etc/hosts/deep"), volume("/etc"), volume("/dev")];
    let spec = made(&container, HostNamespaces::default(), &all_capabilities());
    let mounts = spec.mounts().clone().unwrap();
    let at = |path: &str| {
        let is = |mount: &Mount| mount.destination() == Path::new(path);
        mounts.iter().position(is).unwrap()
    };
    for (first, then) in [
        ("/etc", "/etc/hosts"),
        ("/etc/hosts", "/etc/hosts/deep"),
        ("/dev", "/dev/shm"),
        ("/dev", "/dev/pts"),
        ("/sys", "/sys/fs/cgroup"),
    ] {
        assert!(at(first) < at(then), "{first} {then}");
    }
}

#[test]
fn the_default_filter_is_the_hosts_and_follows_what_is_held() {
    let mut container = container();
    container.security.seccomp = Seccomp::RuntimeDefault;
    container.security.add_capabilities = vec!["SYS_ADMIN".into()];
    let filter = |container: &ContainerSpec, host: &Host| {
        let spec = made(container, HostNamespaces::default(), host);
        spec.linux().as_ref().unwrap().seccomp().clone()
    };
    let allows = |filter: &LinuxSeccomp, name: &str| {
        let rules = filter.syscalls().clone().unwrap();
        rules
            .iter()
            .any(|rule| rule.names().iter().any(|n| n == name))
    };
    let held = filter(&container, &all_capabilities()).unwrap();
    assert_eq!(
        held.default_action(),
        oci_spec::runtime::LinuxSeccompAction::ScmpActErrno
    );
    assert!(allows(&held, "mount") && !allows(&held, "keyctl"));
    // What this host cannot grant is not held.
    let none = filter(&container, &Host::default()).unwrap();
    assert!(!allows(&none, "mount"));
    container.security.privileged = true;
    assert!(filter(&container, &all_capabilities()).is_none());
}
