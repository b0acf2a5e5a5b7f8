//! Containers: from `ContainerConfig`, to `Container` and its status.

use std::collections::BTreeMap;
use std::path::{Component, PathBuf};

use cri_api::v1;
use podsandbox::record::{ContainerPhase, ContainerRecord};
use podsandbox::spec::{ContainerName, ContainerSpec, ImageVolume, Mount, Propagation};
use tonic::Status;

use super::{devices, invalid, required, resources, security, signal, userns};

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
        user: security::user(&context)?,
        user_namespace: userns::parse(
            "config.linux.security_context.namespace_options.userns_options",
            context
                .namespace_options
                .as_ref()
                .and_then(|options| options.userns_options.as_ref()),
        )?,
        security: security::security(&context)?,
        resources: resources::parse(
            "config.linux.resources",
            &linux.resources.unwrap_or_default(),
        )?,
        debug: false,
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
mod tests;
