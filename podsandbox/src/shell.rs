//! A root shell in a pod's guest for the operator of the node: what is asked,
//! whether it can be, and what its container is. [`crate::manager`] opens them.
//!
//! The guest has no programs but its agent, so a shell's come from an image: it
//! stands in a container of that image which is privileged, in the guest's own
//! PID and user namespaces. That container is never started. Its process waits
//! for the start that does not come, and what is asked for runs beside it as an
//! exec does: with streams that wait for a slow reader for as long as it takes,
//! an exit code, and an end when its client has gone.

use crate::record::{ContainerPhase, PodKind};
use crate::session::Session;
use crate::snapshot::PodSnapshot;
use crate::spec::{ContainerName, ContainerSpec, PodName, Resources, Security, User};
use crate::{Error, ErrorKind, Result};

/// Of one pod at once: a person's, one that was forgotten, and a script's. Each
/// takes a disk slot.
pub(crate) const MAX_SHELLS: usize = 4;

/// What is run if nothing is asked for.
const DEFAULT_COMMAND: &str = "/bin/sh";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShellOptions {
    /// Id or unambiguous prefix.
    pub pod: String,
    /// On the node; None: that of the container that has run longest.
    pub image: Option<String>,
    /// Empty: a shell.
    pub command: Vec<String>,
    /// Width and height of the terminal, which None is without.
    pub terminal: Option<(u16, u16)>,
}

/// A command that runs. Has to be given back to be closed, whatever became of
/// it.
pub struct Shell {
    /// The pod's full id.
    pub pod: String,
    pub name: PodName,
    /// As people name it.
    pub image: String,
    pub command: Vec<String>,
    pub session: Session,
    /// The container that it stands in.
    pub(crate) container: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    #[error(
        "pod sandbox {id} runs on the node's kernel and has no guest: `crictl exec` enters its \
         containers, `kubectl debug node/NAME` the node"
    )]
    NoGuest { id: String },
    #[error(
        "no container of pod sandbox {id} runs whose image the shell could have: name one that is on \
         the node (--image)"
    )]
    NoContainer { id: String },
    #[error(
        "pod sandbox {id} has {max} debug shells, and no more at once: end one of them (the daemon's \
         log tells when each began)"
    )]
    TooMany { id: String, max: usize },
    #[error("{source}: `crictl images` lists those that are there, `crictl pull` fetches one")]
    Image { source: imagesvc::Error },
    #[error(
        "pod sandbox {id} cannot have a debug shell ({why}): one that an older drupe has started can \
         have none until it is started anew"
    )]
    OldAgent { id: String, why: String },
    #[error("{why} (image {image}): another image that is on the node may have it (--image)")]
    Command { image: String, why: String },
}

impl ShellError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::NoGuest { .. } | Self::NoContainer { .. } | Self::OldAgent { .. } => {
                ErrorKind::FailedPrecondition
            }
            Self::TooMany { .. } => ErrorKind::ResourceExhausted,
            Self::Image { .. } | Self::Command { .. } => ErrorKind::NotFound,
        }
    }
}

/// The container in which a shell of the pod stands.
pub(crate) fn container(pod: &PodSnapshot, options: &ShellOptions) -> Result<ContainerSpec> {
    let record = &pod.pod;
    let id = || record.id.clone();
    if record.kind == PodKind::Host {
        return Err(ShellError::NoGuest { id: id() }.into());
    }
    if !pod.is_ready() {
        return Err(Error::PodNotReady {
            id: id(),
            state: (record.failure.clone()).unwrap_or_else(|| "it was stopped".to_owned()),
        });
    }
    let (image, user_image) = match &options.image {
        Some(image) => (image.clone(), image.clone()),
        None => image_of(pod).ok_or_else(|| ShellError::NoContainer { id: id() })?,
    };
    let command = match options.command.as_slice() {
        [] => vec![DEFAULT_COMMAND.to_owned()],
        command => command.to_vec(),
    };
    Ok(ContainerSpec {
        // No name that could be taken.
        name: ContainerName {
            name: "debug".to_owned(),
            attempt: 0,
        },
        user_image,
        image,
        command,
        args: Vec::new(),
        working_dir: "/".to_owned(),
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
        user: User {
            uid: Some(0),
            gid: Some(0),
            strict_groups: true,
            ..User::default()
        },
        // The pod's, as it has to be; the agent leaves it out.
        user_namespace: record.spec.user_namespace,
        security: Security {
            privileged: true,
            ..Security::default()
        },
        resources: Resources::default(),
        debug: true,
    })
}

/// By id and by the name that people know: of the oldest container that runs.
fn image_of(pod: &PodSnapshot) -> Option<(String, String)> {
    let running = pod.containers.values();
    let running = running.filter(|c| c.phase == ContainerPhase::Running);
    let oldest = running.min_by_key(|c| c.created_at_nanos)?;
    Some((oldest.image_id.clone(), oldest.image_name.clone()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::record::{ContainerRecord, PodPhase};

    fn pod() -> PodSnapshot {
        let mut pod = crate::events::tests::snapshot();
        for (id, phase, age) in [
            ("old", ContainerPhase::Exited, 1),
            ("web", ContainerPhase::Running, 2),
            ("new", ContainerPhase::Running, 3),
        ] {
            let record = ContainerRecord {
                id: id.to_owned(),
                pod_id: pod.pod.id.clone(),
                spec: crate::oci::tests::container(),
                image_id: format!("sha256:{id}"),
                image_ref: String::new(),
                image_name: format!("{id}:1"),
                phase,
                slot: None,
                volume_slots: Vec::new(),
                device_slots: Vec::new(),
                stop_signal: String::new(),
                log_file: None,
                created_at_nanos: age,
                started_at_nanos: age,
                exit: None,
                pid: 0,
                user: None,
                binds: Vec::new(),
            };
            pod.containers.insert(id.to_owned(), Arc::new(record));
        }
        pod
    }

    #[test]
    fn the_image_is_that_of_the_container_that_has_run_longest() {
        let spec = container(&pod(), &ShellOptions::default()).unwrap();
        assert_eq!((&*spec.image, &*spec.user_image), ("sha256:web", "web:1"));
        assert_eq!(spec.command, [DEFAULT_COMMAND]);
        assert!(spec.debug && spec.security.privileged);
        let asked = ShellOptions {
            image: Some("tools".into()),
            command: vec!["ps".into()],
            ..ShellOptions::default()
        };
        let spec = container(&pod(), &asked).unwrap();
        assert_eq!((&*spec.image, &*spec.user_image), ("tools", "tools"));
        assert_eq!(spec.command, ["ps"]);
        let mut idle = pod();
        idle.containers.remove("web");
        idle.containers.remove("new");
        let error = container(&idle, &ShellOptions::default()).unwrap_err();
        assert!(error.sentence().contains("--image"), "{error}");
        container(&idle, &asked).unwrap();
    }

    #[test]
    fn a_pod_without_a_guest_that_serves_is_refused() {
        let refused = |change: fn(&mut crate::record::PodRecord)| {
            let mut pod = pod();
            change(Arc::make_mut(&mut pod.pod));
            let error = container(&pod, &ShellOptions::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
            error.sentence()
        };
        let said = refused(|pod| pod.kind = PodKind::Host);
        assert!(said.contains("crictl exec"), "{said}");
        let said = refused(|pod| pod.phase = PodPhase::Stopped);
        assert!(said.contains("stopped"), "{said}");
        let said = refused(|pod| pod.failure = Some("it burnt".to_owned()));
        assert!(said.contains("it burnt"), "{said}");
    }

    #[test]
    fn a_record_of_an_older_version_is_no_shells() {
        let mut json = serde_json::to_value(crate::oci::tests::container()).unwrap();
        json.as_object_mut().unwrap().remove("debug");
        let spec: ContainerSpec = serde_json::from_value(json).unwrap();
        assert!(!spec.debug);
    }
}
