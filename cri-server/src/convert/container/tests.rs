use podsandbox::spec::Seccomp;

use super::*;
use crate::convert::security::check_privileged;

fn config() -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: "c".into(),
            attempt: 1,
        }),
        image: Some(v1::ImageSpec {
            image: "busybox".into(),
            ..Default::default()
        }),
        ..v1::ContainerConfig::default()
    }
}

#[test]
fn a_log_path_cannot_leave_its_directory() {
    for path in ["../x", "a/../../x", "/etc/passwd"] {
        let refused = parse(v1::ContainerConfig {
            log_path: path.into(),
            ..config()
        })
        .unwrap_err();
        assert!(refused.message().starts_with("config.log_path"), "{path}");
    }
    let taken = parse(v1::ContainerConfig {
        log_path: "c/1.log".into(),
        ..config()
    })
    .unwrap();
    assert_eq!(taken.log_path, Some(PathBuf::from("c/1.log")));
}

#[test]
fn a_variable_that_cannot_be_handed_on_is_refused_by_name() {
    let parse = |key: &str, value: &[u8]| {
        parse(v1::ContainerConfig {
            envs: vec![v1::KeyValue {
                key: key.into(),
                value: value.into(),
            }],
            ..config()
        })
    };
    let given = parse("NAME", "a=ü\n".as_bytes()).unwrap();
    assert_eq!(given.env, [("NAME".to_owned(), "a=ü\n".to_owned())]);
    for (key, value, why) in [
        (
            "SECRET",
            b"ab\xff".as_slice(),
            "config.envs[SECRET]: the value is not UTF-8 at byte 2",
        ),
        (
            "SECRET",
            b"a\0b",
            "config.envs[SECRET]: the value has a null byte",
        ),
        ("A=B", b"", "config.envs: \"A=B\" is no variable name"),
        ("", b"", "config.envs: \"\" is no variable name"),
    ] {
        let refused = parse(key, value).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert_eq!(refused.message(), why);
    }
}

fn with_security(context: v1::LinuxContainerSecurityContext) -> v1::ContainerConfig {
    v1::ContainerConfig {
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(context),
            resources: None,
        }),
        ..config()
    }
}

#[test]
fn absent_namespace_options_mean_the_pods_processes() {
    let own = |options| {
        let context = v1::LinuxContainerSecurityContext {
            namespace_options: options,
            ..Default::default()
        };
        let spec = parse(with_security(context)).unwrap();
        spec.security.own_pid_namespace
    };
    assert!(!own(None) && !own(Some(v1::NamespaceOption::default())));
    assert!(own(Some(v1::NamespaceOption {
        pid: v1::NamespaceMode::Container.into(),
        ..Default::default()
    })));
    assert!(!parse(config()).unwrap().security.own_pid_namespace);
}

#[test]
#[expect(deprecated, reason = "older clients say it so")]
fn a_seccomp_profile_is_named_in_two_ways() {
    use v1::security_profile::ProfileType;
    let parse = |seccomp: Option<(ProfileType, &str)>, words: &str| {
        let context = v1::LinuxContainerSecurityContext {
            seccomp: seccomp.map(|(kind, path)| v1::SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: path.to_owned(),
            }),
            seccomp_profile_path: words.to_owned(),
            ..Default::default()
        };
        parse(with_security(context)).map(|spec| spec.security.seccomp)
    };
    let file = Seccomp::Localhost("/p/a.json".into());
    for (seccomp, words, meant) in [
        (None, "", Seccomp::Unconfined),
        (None, "unconfined", Seccomp::Unconfined),
        (None, "runtime/default", Seccomp::RuntimeDefault),
        (None, "docker/default", Seccomp::RuntimeDefault),
        (None, "localhost//p/a.json", file.clone()),
        (Some((ProfileType::Localhost, "/p/a.json")), "", file),
        (
            Some((ProfileType::RuntimeDefault, "")),
            "unconfined",
            Seccomp::RuntimeDefault,
        ),
        (
            Some((ProfileType::Unconfined, "")),
            "runtime/default",
            Seccomp::Unconfined,
        ),
    ] {
        assert_eq!(parse(seccomp, words).unwrap(), meant, "{words}");
    }
    for (seccomp, words, field) in [
        (None, "localhost/a.json", "seccomp_profile_path"),
        (None, "strict", "seccomp_profile_path"),
        (Some((ProfileType::Localhost, "")), "", "localhost_ref"),
        (
            Some((ProfileType::Localhost, "a.json")),
            "",
            "localhost_ref",
        ),
    ] {
        let refused = parse(seccomp, words).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert!(refused.message().contains(field), "{refused:?}");
    }
}

#[test]
fn a_recursively_read_only_mount_is_read_only_and_private() {
    let parse = |readonly, propagation: v1::MountPropagation| {
        parse(v1::ContainerConfig {
            mounts: vec![v1::Mount {
                host_path: "/h".into(),
                container_path: "/c".into(),
                readonly,
                recursive_read_only: true,
                propagation: propagation.into(),
                ..Default::default()
            }],
            ..config()
        })
    };
    let spec = parse(true, v1::MountPropagation::PropagationPrivate).unwrap();
    assert!(show_mount(&spec.mounts[0]).recursive_read_only);
    for (readonly, propagation) in [
        (false, v1::MountPropagation::PropagationPrivate),
        (true, v1::MountPropagation::PropagationHostToContainer),
        (true, v1::MountPropagation::PropagationBidirectional),
    ] {
        let refused = parse(readonly, propagation).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        let field = "config.mounts[/c].recursive_read_only";
        assert!(refused.message().starts_with(field), "{refused:?}");
    }
}

#[test]
fn an_image_volume_has_nothing_of_the_nodes() {
    let volume = || v1::Mount {
        container_path: "/model".into(),
        image: Some(v1::ImageSpec {
            image: "sha256:0".into(),
            ..Default::default()
        }),
        image_sub_path: "weights".into(),
        readonly: true,
        ..v1::Mount::default()
    };
    let taken = mount(volume()).unwrap();
    assert_eq!(
        taken.image,
        Some(ImageVolume {
            image: "sha256:0".into(),
            sub_path: "weights".into()
        })
    );
    let shown = show_mount(&taken);
    assert_eq!(shown, volume());

    let refused = |change: fn(&mut v1::Mount)| {
        let mut volume = volume();
        change(&mut volume);
        let refused = mount(volume).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        let message = refused.message().to_owned();
        let field = message.strip_prefix("config.mounts[/model].").unwrap();
        field.split_once(':').unwrap().0.to_owned()
    };
    assert_eq!(refused(|m| m.host_path = "/srv".into()), "host_path");
    assert_eq!(refused(|m| m.readonly = false), "readonly");
    assert_eq!(
        refused(|m| m.set_propagation(v1::MountPropagation::PropagationBidirectional)),
        "propagation"
    );
    assert_eq!(
        refused(|m| m.image_sub_path = "a\0b".into()),
        "image_sub_path"
    );
    assert_eq!(
        refused(|m| m.image = Some(v1::ImageSpec::default())),
        "image.image"
    );
    assert_eq!(refused(|m| m.image = None), "image_sub_path");
}

#[test]
fn a_privileged_container_needs_a_pod_that_may_have_one() {
    let container = |privileged| {
        with_security(v1::LinuxContainerSecurityContext {
            privileged,
            ..Default::default()
        })
    };
    let pod = |privileged| v1::PodSandboxConfig {
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                privileged,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    check_privileged(&container(true), Some(&pod(true))).unwrap();
    check_privileged(&container(false), Some(&pod(true))).unwrap();
    check_privileged(&container(false), None).unwrap();
    for pod in [None, Some(pod(false))] {
        let refused = check_privileged(&container(true), pod.as_ref()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        let message = refused.message();
        assert!(message.contains("sandbox_config.linux.security_context.privileged"));
    }
}

#[test]
#[expect(deprecated, reason = "older clients say it so")]
fn a_profile_of_apparmor_is_refused_in_either_field() {
    use v1::security_profile::ProfileType;
    let parse = |kind: Option<ProfileType>, words: &str| {
        parse(with_security(v1::LinuxContainerSecurityContext {
            apparmor: kind.map(|kind| v1::SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: "mine".to_owned(),
            }),
            apparmor_profile: words.to_owned(),
            ..Default::default()
        }))
    };
    for words in ["", "runtime/default", "unconfined"] {
        parse(None, words).unwrap();
    }
    parse(Some(ProfileType::RuntimeDefault), "localhost/mine").unwrap();
    for (kind, words, field) in [
        (Some(ProfileType::Localhost), "", "apparmor:"),
        (None, "localhost/mine", "apparmor_profile:"),
    ] {
        let refused = parse(kind, words).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unimplemented);
        let message = refused.message();
        assert!(
            message.contains(field) && message.contains("\"mine\""),
            "{message}"
        );
    }
    let refused = parse(None, "mine").unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
}

#[test]
fn a_group_without_a_user_is_refused() {
    let mut config = config();
    config.linux = Some(v1::LinuxContainerConfig {
        security_context: Some(v1::LinuxContainerSecurityContext {
            run_as_group: Some(v1::Int64Value { value: 5 }),
            ..Default::default()
        }),
        resources: None,
    });
    assert!(
        parse(config)
            .unwrap_err()
            .message()
            .contains("run_as_group")
    );
}
