use super::*;
use crate::spec::{ContainerName, Security, User};
use crate::volumes::{Access, Source, View};

pub(crate) fn container() -> ContainerSpec {
    ContainerSpec {
        name: ContainerName {
            name: "c".into(),
            attempt: 0,
        },
        user_image: "busybox".into(),
        image: "sha256:x".into(),
        command: Vec::new(),
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
        security: Security::default(),
        resources: Resources::default(),
        debug: false,
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&w| w.to_owned()).collect()
}

#[test]
fn command_and_args_replace_entrypoint_and_cmd_as_kubernetes_documents() {
    let (entrypoint, cmd) = (words(&["/entry"]), words(&["a", "b"]));
    let line = |command: &[&str], args: &[&str]| {
        let spec = ContainerSpec {
            command: words(command),
            args: words(args),
            ..container()
        };
        command_line(&spec, &entrypoint, &cmd).unwrap()
    };
    assert_eq!(line(&[], &[]), ["/entry", "a", "b"]);
    assert_eq!(line(&[], &["x"]), ["/entry", "x"]);
    assert_eq!(line(&["/cmd"], &[]), ["/cmd"]);
    assert_eq!(line(&["/cmd"], &["x"]), ["/cmd", "x"]);
    assert!(matches!(
        command_line(&container(), &[], &[]),
        Err(Error::Invalid { .. })
    ));
}

#[test]
fn the_pods_variables_win_over_the_images() {
    let spec = ContainerSpec {
        env: vec![
            ("A".into(), "pod".into()),
            ("A".into(), "last".into()),
            ("PATH".into(), "/p".into()),
        ],
        ..container()
    };
    let env = environment(&spec, &words(&["A=image", "B=image"]), "web");
    assert_eq!(env, ["PATH=/p", "HOSTNAME=web", "A=last", "B=image"]);
}

#[test]
fn capabilities_are_added_and_dropped_by_name_or_all() {
    let held = |add: &[&str], drop: &[&str]| {
        let security = Security {
            add_capabilities: words(add),
            drop_capabilities: words(drop),
            ..Security::default()
        };
        capabilities(&ContainerSpec {
            security,
            ..container()
        })
        .unwrap()
    };
    assert_eq!(
        held(&["net_admin"], &["ALL"]),
        HashSet::from([Capability::NetAdmin])
    );
    assert!(held(&["ALL"], &["CAP_SYS_ADMIN"]).len() == 40);
    assert!(!held(&[], &["NET_RAW"]).contains(&Capability::NetRaw));
    let security = Security {
        add_capabilities: words(&["FLY"]),
        ..Security::default()
    };
    let error = capabilities(&ContainerSpec {
        security,
        ..container()
    })
    .unwrap_err();
    assert!(
        error.to_string().contains("\"FLY\" is no capability"),
        "{error}"
    );
}

fn bind(name: &str) -> Bind {
    Bind {
        name: name.to_owned(),
        source: Source {
            device: 1,
            inode: 1,
            flags: 0,
            view: View::Alone,
        },
        access: Access::Write,
    }
}

#[test]
fn a_volume_replaces_what_is_mounted_at_its_place_and_parents_come_first() {
    let volume = |at: &str| crate::spec::Mount {
        host_path: "/h".into(),
        container_path: at.into(),
        read_only: false,
        recursive_read_only: false,
        propagation: Propagation::Private,
        id_mapping: None,
        image: None,
    };
    let spec = ContainerSpec {
        mounts: vec![volume("/a/b"), volume("/a"), volume("/dev/mqueue")],
        ..container()
    };
    let mounts = mounts(
        &spec,
        guest_volumes(&spec, &[bind("b"), bind("a"), bind("m")]).unwrap(),
    )
    .unwrap();
    let at = |path: &str| {
        mounts
            .iter()
            .position(|m| m.destination() == Path::new(path))
            .unwrap()
    };
    assert!(at("/a") < at("/a/b"));
    assert_eq!(
        mounts
            .iter()
            .filter(|m| m.destination() == Path::new("/dev/mqueue"))
            .count(),
        1
    );
    assert_eq!(
        mounts[at("/a/b")].source().as_deref(),
        Some(Path::new("/run/drupe/shared/b"))
    );
}

#[test]
fn image_volumes_are_numbered_apart_from_the_nodes() {
    let volume = |at: &str, image: Option<&str>| crate::spec::Mount {
        host_path: "/h".into(),
        container_path: at.into(),
        read_only: image.is_some(),
        recursive_read_only: false,
        propagation: Propagation::Private,
        id_mapping: None,
        image: image.map(|image| crate::spec::ImageVolume {
            image: image.to_owned(),
            sub_path: String::new(),
        }),
    };
    let spec = ContainerSpec {
        mounts: vec![
            volume("/a/b", Some("i")),
            volume("/c", None),
            volume("/a", Some("j")),
        ],
        ..container()
    };
    let mounts = mounts(&spec, guest_volumes(&spec, &[bind("b")]).unwrap()).unwrap();
    let at = |path: &str| {
        let mount = mounts.iter().find(|m| m.destination() == Path::new(path));
        let mount = mount.unwrap();
        (
            mount.typ().clone().unwrap(),
            mount.source().clone().unwrap(),
        )
    };
    assert_eq!(at("/a/b"), ("image".to_owned(), "0".into()));
    assert_eq!(at("/a"), ("image".to_owned(), "1".into()));
    assert_eq!(
        at("/c"),
        (
            "bind".to_owned(),
            Path::new(agent_api::SHARED_DIR).join("b")
        )
    );
}

#[test]
fn a_profile_of_the_node_holds_unless_the_container_is_privileged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("profile.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW",
        "syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(&path, text).unwrap();
    let profile = Profile::read(&path).unwrap();
    let seccomp = |privileged| {
        let security = Security {
            privileged,
            seccomp: Seccomp::Localhost(path.clone()),
            ..Security::default()
        };
        let spec = ContainerSpec {
            security,
            command: words(&["true"]),
            ..container()
        };
        let profile = (!privileged).then_some(&profile);
        let image = ImageConfiguration::default();
        let oci = runtime_spec(&spec, &image, "h", Vec::new(), profile).unwrap();
        oci.linux().clone().unwrap().seccomp().clone()
    };
    let rules = seccomp(false).unwrap().syscalls().clone().unwrap();
    assert_eq!(rules[0].names(), &words(&["chmod"]));
    assert_eq!(seccomp(true), None);
}

fn linux_of(security: Security) -> oci_spec::runtime::Spec {
    let spec = ContainerSpec {
        security,
        command: words(&["true"]),
        ..container()
    };
    runtime_spec(&spec, &ImageConfiguration::default(), "h", Vec::new(), None).unwrap()
}

#[test]
fn nothing_is_masked_in_a_privileged_container() {
    let paths = |privileged| {
        let security = Security {
            privileged,
            masked_paths: vec!["/proc/keys".into()],
            readonly_paths: vec!["/proc/sys".into()],
            ..Security::default()
        };
        let linux = linux_of(security).linux().clone().unwrap();
        let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default().join(" ");
        (list(linux.masked_paths()), list(linux.readonly_paths()))
    };
    assert_eq!(
        paths(false),
        ("/proc/keys".to_owned(), "/proc/sys".to_owned())
    );
    assert_eq!(paths(true), (String::new(), String::new()));
}

#[test]
fn an_ambient_capability_is_held_and_inheritable() {
    let sets = |ambient: &[&str], drop: &[&str]| {
        let security = Security {
            ambient_capabilities: words(ambient),
            drop_capabilities: words(drop),
            ..Security::default()
        };
        let process = linux_of(security).process().clone().unwrap();
        process.capabilities().clone().unwrap()
    };
    let wanted = Some(HashSet::from([Capability::NetBindService]));
    let with = sets(&["NET_BIND_SERVICE"], &["ALL"]);
    for set in [
        with.ambient(),
        with.inheritable(),
        with.permitted(),
        with.effective(),
        with.bounding(),
    ] {
        assert_eq!(*set, wanted);
    }
    for without in [sets(&[], &[]), sets(&["CAP_KILL"], &["KILL"])] {
        assert_eq!(*without.ambient(), Some(HashSet::new()));
        assert_eq!(*without.inheritable(), Some(HashSet::new()));
    }
    let unknown = Security {
        ambient_capabilities: words(&["FLY"]),
        ..Security::default()
    };
    let error = capabilities(&ContainerSpec {
        security: unknown,
        ..container()
    });
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("capabilities.add_ambient_capabilities"),
        "{error}"
    );
}

#[test]
fn process_ids_are_the_containers_the_pods_or_anothers() {
    let named = |own_pid_namespace, target: Option<&str>| {
        let security = Security {
            own_pid_namespace,
            pid_target: target.map(str::to_owned),
            ..Security::default()
        };
        let linux = linux_of(security).linux().clone().unwrap();
        let all = linux.namespaces().clone().unwrap();
        let pid = all.iter().find(|n| n.typ() == LinuxNamespaceType::Pid);
        pid.map(|pid| pid.path().clone())
    };
    assert_eq!(named(true, None), Some(None));
    assert_eq!(named(false, None), None);
    assert_eq!(named(false, Some("c1")), Some(Some("container:c1".into())));
}

#[test]
fn a_place_in_the_guest_sees_all_its_processes_and_control_groups() {
    let kinds = |debug| {
        let spec = ContainerSpec {
            debug,
            ..container()
        };
        let all = namespaces(&spec).unwrap();
        let kind = |ns: &LinuxNamespace| (ns.typ(), ns.path().clone());
        all.iter().map(kind).collect::<Vec<_>>()
    };
    use LinuxNamespaceType::{Cgroup, Mount, Pid};
    assert_eq!(
        kinds(true),
        [(Mount, None), (Pid, Some("/proc/1/ns/pid".into()))]
    );
    assert_eq!(kinds(false), [(Mount, None), (Cgroup, None)]);
}
