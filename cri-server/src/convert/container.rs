//! Containers: from `ContainerConfig`, to `Container` and its status.

use std::collections::BTreeMap;
use std::path::{Component, PathBuf};

use cri_api::v1;
use podsandbox::record::{ContainerPhase, ContainerRecord};
use podsandbox::spec::{
    ContainerName, ContainerSpec, ImageVolume, Mount, Propagation, Seccomp, Security, User,
};
use tonic::Status;

use super::{devices, invalid, required, resources, signal, unsupported, userns};

/// `/proc` files that tell of or change the kernel; CRI states its own lists.
pub fn parse(config: v1::ContainerConfig) -> Result<ContainerSpec, Status> {
    let metadata = required("config.metadata", config.metadata)?;
    if metadata.name.is_empty() {
        return Err(invalid("config.metadata.name", "is empty"));
    }
    let image = required("config.image", config.image)?;
    if image.image.is_empty() {
        return Err(invalid("config.image.image", "is empty"));
    }
    let devices = devices::parse(config.devices)?;
    let annotations: BTreeMap<_, _> = config.annotations.into_iter().collect();
    let cdi_devices = devices::parse_cdi(&config.cdi_devices, &annotations)?;
    let linux = config.linux.unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let env = config
        .envs
        .into_iter()
        .map(variable)
        .collect::<Result<_, _>>()?;
    let user_image = if image.user_specified_image.is_empty() {
        &image.image
    } else {
        &image.user_specified_image
    };
    Ok(ContainerSpec {
        name: ContainerName {
            name: metadata.name,
            attempt: metadata.attempt,
        },
        user_image: user_image.clone(),
        image: image.image,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        env,
        mounts: config
            .mounts
            .into_iter()
            .map(mount)
            .collect::<Result<_, _>>()?,
        labels: config.labels.into_iter().collect(),
        devices,
        cdi_devices,
        annotations,
        log_path: log_path(&config.log_path)?,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        stop_signal: signal::parse("config.stop_signal", config.stop_signal)?,
        user: user(&context)?,
        user_namespace: userns::parse(
            "config.linux.security_context.namespace_options.userns_options",
            context
                .namespace_options
                .as_ref()
                .and_then(|options| options.userns_options.as_ref()),
        )?,
        security: security(&context)?,
        resources: resources::parse(
            "config.linux.resources",
            &linux.resources.unwrap_or_default(),
        )?,
    })
}

/// CRI has bytes here. An OCI runtime spec, in which the agent gets it, is
/// JSON: only text fits. The value may be a secret, so no answer has it.
fn variable(pair: v1::KeyValue) -> Result<(String, String), Status> {
    let name = pair.key;
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(invalid(
            "config.envs",
            format_args!("{name:?} is no variable name"),
        ));
    }
    let field = format!("config.envs[{name}]");
    let value = String::from_utf8(pair.value).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        invalid(&field, format_args!("the value is not UTF-8 at byte {at}"))
    })?;
    if value.contains('\0') {
        return Err(invalid(&field, "the value has a null byte"));
    }
    Ok((name, value))
}

/// Relative to the pod's log directory and inside it.
fn log_path(path: &str) -> Result<Option<PathBuf>, Status> {
    if path.is_empty() {
        return Ok(None);
    }
    let path = PathBuf::from(path);
    if path
        .components()
        .any(|part| !matches!(part, Component::Normal(_) | Component::CurDir))
    {
        return Err(invalid(
            "config.log_path",
            format_args!("{path:?} leaves the pod's log directory"),
        ));
    }
    Ok(Some(path))
}

fn mount(mount: v1::Mount) -> Result<Mount, Status> {
    let propagation = mount.propagation();
    let field = format!("config.mounts[{}]", mount.container_path);
    let image = image_volume(&field, &mount)?;
    let id_mapping = userns::of_mount(&field, &mount.uid_mappings, &mount.gid_mappings)?;
    if mount.recursive_read_only {
        let field = format!("{field}.recursive_read_only");
        if !mount.readonly {
            return Err(invalid(&field, "is set without readonly"));
        }
        if propagation != v1::MountPropagation::PropagationPrivate {
            return Err(invalid(
                &field,
                "is set with a propagation other than PROPAGATION_PRIVATE",
            ));
        }
    }
    let container_path = PathBuf::from(&mount.container_path);
    if !container_path.is_absolute()
        || container_path
            .components()
            .any(|part| part == Component::ParentDir)
    {
        return Err(invalid(
            &format!("{field}.container_path"),
            "is not an absolute path without '..'",
        ));
    }
    if container_path.components().count() == 1 {
        return Err(invalid(
            &format!("{field}.container_path"),
            "is the container's root",
        ));
    }
    let host_path = PathBuf::from(&mount.host_path);
    if image.is_none() && !host_path.is_absolute() {
        return Err(invalid(
            &format!("{field}.host_path"),
            format_args!("{host_path:?} is not an absolute path"),
        ));
    }
    Ok(Mount {
        host_path,
        container_path,
        read_only: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        propagation: match propagation {
            v1::MountPropagation::PropagationPrivate => Propagation::Private,
            v1::MountPropagation::PropagationHostToContainer => Propagation::HostToContainer,
            v1::MountPropagation::PropagationBidirectional => Propagation::Bidirectional,
        },
        id_mapping,
        image,
    })
}

/// The image whose files the mount is of; none: a path of the node.
fn image_volume(field: &str, mount: &v1::Mount) -> Result<Option<ImageVolume>, Status> {
    let refuse = |name: &str, why: &str| Err(invalid(&format!("{field}.{name}"), why));
    let sub_path = &mount.image_sub_path;
    let image = mount.image.as_ref().filter(|image| !image.image.is_empty());
    let Some(image) = image else {
        return match (&mount.image, sub_path.is_empty()) {
            (Some(_), _) if mount.host_path.is_empty() => refuse("image.image", "is empty"),
            (_, false) => refuse("image_sub_path", "is set without an image"),
            _ => Ok(None),
        };
    };
    if !mount.host_path.is_empty() {
        return refuse("host_path", "is set beside an image");
    }
    if !mount.readonly {
        return refuse("readonly", "is not set: an image cannot be written to");
    }
    if mount.propagation() == v1::MountPropagation::PropagationBidirectional {
        return refuse(
            "propagation",
            "is BIDIRECTIONAL: nothing can be mounted in an image",
        );
    }
    if sub_path.contains('\0') {
        return refuse("image_sub_path", "has a null byte");
    }
    Ok(Some(ImageVolume {
        image: image.image.clone(),
        sub_path: sub_path.clone(),
    }))
}

fn user(context: &v1::LinuxContainerSecurityContext) -> Result<User, Status> {
    let field = "config.linux.security_context";
    let id = |name: &str, value: &Option<v1::Int64Value>| match value {
        Some(v1::Int64Value { value }) if !(0..=i64::from(u32::MAX)).contains(value) => Err(
            invalid(&format!("{field}.{name}"), format_args!("{value} is no id")),
        ),
        other => Ok(other.as_ref().map(|v| v.value)),
    };
    let uid = id("run_as_user", &context.run_as_user)?;
    let gid = id("run_as_group", &context.run_as_group)?;
    if gid.is_some() && uid.is_none() && context.run_as_username.is_empty() {
        return Err(invalid(
            &format!("{field}.run_as_group"),
            "is set without run_as_user or run_as_username",
        ));
    }
    if let Some(gid) = context
        .supplemental_groups
        .iter()
        .find(|gid| !(0..=i64::from(u32::MAX)).contains(*gid))
    {
        return Err(invalid(
            &format!("{field}.supplemental_groups"),
            format_args!("{gid} is no id"),
        ));
    }
    Ok(User {
        username: context.run_as_username.clone(),
        uid,
        gid,
        supplemental_groups: context.supplemental_groups.clone(),
        strict_groups: context.supplemental_groups_policy() == v1::SupplementalGroupsPolicy::Strict,
    })
}

/// A privileged container in a pod that is to have none: a caller that builds
/// the two requests from one pod says it in both, as the kubelet does.
pub fn check_privileged(
    container: &v1::ContainerConfig,
    pod: Option<&v1::PodSandboxConfig>,
) -> Result<(), Status> {
    let of_container = container.linux.as_ref();
    let of_container = of_container.and_then(|linux| linux.security_context.as_ref());
    let of_pod = pod.and_then(|pod| pod.linux.as_ref()?.security_context.as_ref());
    if of_container.is_some_and(|context| context.privileged)
        && !of_pod.is_some_and(|context| context.privileged)
    {
        return Err(invalid(
            "config.linux.security_context.privileged",
            "is set, but sandbox_config.linux.security_context.privileged is not: \
             no privileged container is allowed in such a pod sandbox",
        ));
    }
    Ok(())
}

fn security(context: &v1::LinuxContainerSecurityContext) -> Result<Security, Status> {
    let field = "config.linux.security_context";
    // Options that are absent are those of an empty message: all POD.
    let options = context.namespace_options.clone().unwrap_or_default();
    let own_pid_namespace = options.pid() == v1::NamespaceMode::Container;
    let pid_target = match options.pid() {
        v1::NamespaceMode::Target if options.target_id.is_empty() => {
            return Err(invalid(
                &format!("{field}.namespace_options.target_id"),
                "is empty",
            ));
        }
        v1::NamespaceMode::Target => Some(options.target_id.clone()),
        _ => None,
    };
    check_apparmor(context, field)?;
    let capabilities = context.capabilities.clone().unwrap_or_default();
    Ok(Security {
        privileged: context.privileged,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        ambient_capabilities: capabilities.add_ambient_capabilities,
        read_only_root: context.readonly_rootfs,
        no_new_privileges: context.no_new_privs,
        masked_paths: context.masked_paths.iter().map(PathBuf::from).collect(),
        readonly_paths: context.readonly_paths.iter().map(PathBuf::from).collect(),
        own_pid_namespace,
        pid_target,
        host_namespaces: super::pod::host_namespaces(&options),
        seccomp: seccomp(context, field)?,
    })
}

/// What CRI's default profile is, is the runtime's choice: none, in a guest.
#[allow(deprecated)]
fn check_apparmor(context: &v1::LinuxContainerSecurityContext, field: &str) -> Result<(), Status> {
    let refuse = |name: &str, profile: &str| {
        let what = format!(
            "profile {profile:?} (profiles are loaded into the node's kernel: \
             a pod with its own kernel does not have them)"
        );
        Err(unsupported(&format!("{field}.{name}"), what))
    };
    if let Some(profile) = &context.apparmor {
        // The older field is the newer one in words then.
        return match profile.profile_type() {
            v1::security_profile::ProfileType::Localhost => {
                refuse("apparmor", &profile.localhost_ref)
            }
            _ => Ok(()),
        };
    }
    match context.apparmor_profile.as_str() {
        "" | "runtime/default" | "unconfined" => Ok(()),
        other => match other.strip_prefix("localhost/") {
            Some(profile) => refuse("apparmor_profile", profile),
            None => Err(invalid(
                &format!("{field}.apparmor_profile"),
                format_args!("{other:?} is none of runtime/default, unconfined and localhost/NAME"),
            )),
        },
    }
}

#[allow(deprecated)]
fn seccomp(context: &v1::LinuxContainerSecurityContext, field: &str) -> Result<Seccomp, Status> {
    use v1::security_profile::ProfileType;
    match &context.seccomp {
        Some(profile) => match profile.profile_type() {
            ProfileType::Unconfined => Ok(Seccomp::Unconfined),
            ProfileType::RuntimeDefault => Ok(Seccomp::RuntimeDefault),
            ProfileType::Localhost => {
                let field = format!("{field}.seccomp.localhost_ref");
                localhost_profile(&field, &profile.localhost_ref)
            }
        },
        // What clients of before CRI v1's `seccomp` say in words.
        None => match context.seccomp_profile_path.as_str() {
            "" | "unconfined" => Ok(Seccomp::Unconfined),
            "runtime/default" | "docker/default" => Ok(Seccomp::RuntimeDefault),
            other => {
                let field = format!("{field}.seccomp_profile_path");
                match other.strip_prefix("localhost/") {
                    Some(path) => localhost_profile(&field, path),
                    None => Err(invalid(
                        &field,
                        format_args!(
                            "{other:?} is none of runtime/default, unconfined and localhost/PATH"
                        ),
                    )),
                }
            }
        },
    }
}

fn localhost_profile(field: &str, path: &str) -> Result<Seccomp, Status> {
    match super::pod::absolute(field, path)? {
        Some(path) => Ok(Seccomp::Localhost(path)),
        None => Err(invalid(field, "is empty")),
    }
}

pub fn state(container: &ContainerRecord) -> v1::ContainerState {
    match container.phase {
        ContainerPhase::Creating | ContainerPhase::Created => v1::ContainerState::ContainerCreated,
        ContainerPhase::Running => v1::ContainerState::ContainerRunning,
        ContainerPhase::Exited | ContainerPhase::Removing => v1::ContainerState::ContainerExited,
    }
}

pub fn metadata(container: &ContainerRecord) -> v1::ContainerMetadata {
    let name = &container.spec.name;
    v1::ContainerMetadata {
        name: name.name.clone(),
        attempt: name.attempt,
    }
}

fn image(container: &ContainerRecord) -> v1::ImageSpec {
    v1::ImageSpec {
        image: container.spec.image.clone(),
        user_specified_image: container.spec.user_image.clone(),
        ..v1::ImageSpec::default()
    }
}

pub fn listed(container: &ContainerRecord) -> v1::Container {
    v1::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.pod_id.clone(),
        metadata: Some(metadata(container)),
        image: Some(image(container)),
        image_ref: container.image_ref.clone(),
        state: state(container).into(),
        created_at: container.created_at_nanos,
        labels: container.spec.labels.clone().into_iter().collect(),
        annotations: container.spec.annotations.clone().into_iter().collect(),
        image_id: container.image_id.clone(),
    }
}

pub fn status(container: &ContainerRecord) -> v1::ContainerStatus {
    let exit = container.exit.as_ref();
    v1::ContainerStatus {
        id: container.id.clone(),
        metadata: Some(metadata(container)),
        state: state(container).into(),
        created_at: container.created_at_nanos,
        started_at: container.started_at_nanos,
        finished_at: exit.map_or(0, |exit| exit.finished_at_nanos),
        exit_code: exit.map_or(0, |exit| exit.code),
        image: Some(v1::ImageSpec {
            image: container.image_name.clone(),
            ..image(container)
        }),
        image_ref: container.image_ref.clone(),
        reason: exit
            .map(|exit| exit.reason.as_str().to_owned())
            .unwrap_or_default(),
        message: exit.map(|exit| exit.message.clone()).unwrap_or_default(),
        labels: container.spec.labels.clone().into_iter().collect(),
        annotations: container.spec.annotations.clone().into_iter().collect(),
        mounts: container.spec.mounts.iter().map(show_mount).collect(),
        log_path: container
            .log_file
            .as_ref()
            .map(|p| p.to_string_lossy().into_owned())
            .unwrap_or_default(),
        resources: Some(v1::ContainerResources {
            linux: Some(resources::show(&container.spec.resources)),
            windows: None,
        }),
        image_id: container.image_id.clone(),
        user: container.user.as_ref().map(|user| v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user
                    .supplemental_groups
                    .iter()
                    .map(|&gid| gid.into())
                    .collect(),
            }),
        }),
        stop_signal: signal::show(&container.stop_signal).into(),
    }
}

fn show_mount(mount: &Mount) -> v1::Mount {
    let ids = mount.id_mapping.map(userns::show).unwrap_or_default();
    v1::Mount {
        uid_mappings: ids.clone(),
        gid_mappings: ids,
        image: mount.image.as_ref().map(|volume| v1::ImageSpec {
            image: volume.image.clone(),
            ..v1::ImageSpec::default()
        }),
        image_sub_path: mount
            .image
            .as_ref()
            .map(|volume| volume.sub_path.clone())
            .unwrap_or_default(),
        container_path: mount.container_path.to_string_lossy().into_owned(),
        host_path: mount.host_path.to_string_lossy().into_owned(),
        readonly: mount.read_only,
        recursive_read_only: mount.recursive_read_only,
        propagation: match mount.propagation {
            Propagation::Private => v1::MountPropagation::PropagationPrivate.into(),
            Propagation::HostToContainer => v1::MountPropagation::PropagationHostToContainer.into(),
            Propagation::Bidirectional => v1::MountPropagation::PropagationBidirectional.into(),
        },
        ..v1::Mount::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    #[allow(deprecated)]
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
    #[allow(deprecated)]
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
}
