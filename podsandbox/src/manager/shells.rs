//! Debug shells: opened, and closed with all that they left.

use super::PodManager;
use crate::driver::{Command, Handle};
use crate::session::ExecOptions;
use crate::shell::{self, Shell, ShellError, ShellOptions};
use crate::{Error, Result};

impl PodManager {
    /// Runs a command in a pod's guest. Leaves nothing when it fails. Not to be
    /// cancelled: who asks may go, the one who calls this may not.
    pub async fn open_shell(&self, options: ShellOptions) -> Result<Shell> {
        let unknown = || Error::PodNotFound(options.pod.clone());
        let mut handle = self.find(&options.pod)?.ok_or_else(unknown)?;
        handle.settled().await;
        let pod = handle.snapshot.borrow().clone();
        if !pod.is_listed() {
            return Err(unknown());
        }
        let spec = shell::container(&pod, &options)?;
        let (image, command) = (spec.user_image.clone(), spec.command.clone());
        let agent = super::streams::serving(&pod)?;
        let created = handle.ask(|reply| Command::Create {
            spec: Box::new(spec),
            reply,
        });
        let container = created.await.map_err(|error| match error {
            Error::Image(source) if source.kind() == imagesvc::ErrorKind::NotFound => {
                ShellError::Image { source }.into()
            }
            other => other,
        })?;
        let begun = agent.exec(ExecOptions {
            container_id: container.clone(),
            argv: command.clone(),
            tty: options.terminal.is_some(),
            size: options.terminal,
            stdin: true,
            stdout: true,
            stderr: true,
        });
        match begun.await {
            Ok(session) => Ok(Shell {
                pod: pod.pod.id.clone(),
                name: pod.pod.spec.name.clone(),
                image,
                command,
                session,
                container,
            }),
            Err(error) => {
                remove(&handle, &container).await;
                Err(explain(error, pod.pod.id.clone(), image))
            }
        }
    }

    /// Ends the command, if it runs, and all that it started, and removes what
    /// it stood in. Not to be cancelled.
    pub async fn close_shell(&self, shell: Shell) {
        drop(shell.session);
        let handle = self.pods().get(&shell.pod).cloned();
        // Without a pod there is nothing left.
        if let Some(handle) = handle {
            remove(&handle, &shell.container).await;
        }
    }
}

async fn remove(handle: &Handle, container: &str) {
    let id = container.to_owned();
    let removed = handle.ask(|reply| Command::RemoveContainer { id, reply });
    match removed.await {
        Ok(()) | Err(Error::PodNotFound(_)) => {}
        Err(error) => {
            // The driver tries again until it succeeds.
            tracing::warn!(container, error = %error.sentence(), "a debug shell's container cannot be removed yet");
        }
    }
}

/// A program that the image does not have, or that cannot be run, is the
/// caller's to change. An agent that knows no places in the guest runs nothing
/// in a container that was not started.
fn explain(error: Error, id: String, image: String) -> Error {
    use tonic::Code::{FailedPrecondition, NotFound, PermissionDenied};
    match error {
        Error::Agent {
            code: FailedPrecondition,
            message: why,
            ..
        } => ShellError::OldAgent { id, why }.into(),
        Error::Agent {
            code: NotFound | PermissionDenied,
            message: why,
            ..
        } => ShellError::Command { image, why }.into(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn what_the_agent_refuses_is_told_with_the_remedy() {
        let refused = |code| {
            let error = Error::Agent {
                call: "Exec",
                code,
                message: "because".to_owned(),
            };
            let error = explain(error, "p1".to_owned(), "tools:1".to_owned());
            (error.kind(), error.sentence())
        };
        let (kind, said) = refused(tonic::Code::NotFound);
        assert_eq!(kind, ErrorKind::NotFound);
        assert!(
            said.contains("tools:1") && said.contains("--image"),
            "{said}"
        );
        let (kind, said) = refused(tonic::Code::FailedPrecondition);
        assert_eq!(kind, ErrorKind::FailedPrecondition);
        assert!(said.contains("p1") && said.contains("older"), "{said}");
        let (kind, said) = refused(tonic::Code::ResourceExhausted);
        assert_eq!(kind, ErrorKind::ResourceExhausted);
        assert!(said.contains("because"), "{said}");
    }
}
