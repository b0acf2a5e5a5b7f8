//! Why a call could not be answered, and the code that says so.

use std::io;
use std::path::PathBuf;

use drupe_agent::container::session::SessionError;
use drupe_agent::container::stdio::StdioError;
use drupe_agent::container::tee;
use drupe_agent::container::user::UserError;
use drupe_agent::server::sentence;
use drupe_vmm::logs::LogError;
use tonic::{Code, Status};

use crate::cgroup::CgroupError;
use crate::exec::MAX_EXECS;
use crate::pod::{MAX_ATTACHED, MAX_CONTAINERS};
use crate::runtime::RuntimeError;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{id:?} is no container id")]
    Id { id: String },
    #[error("container {id} already exists")]
    Exists { id: String },
    #[error("container {id} does not exist")]
    Unknown { id: String },
    #[error("container {id} is {phase}, not {wanted}")]
    Phase {
        id: String,
        phase: &'static str,
        wanted: &'static str,
    },
    #[error("{signal} is no signal")]
    Signal { signal: u32 },
    #[error("cannot send signal {signal} to container {id}")]
    Send {
        id: String,
        signal: u32,
        source: nix::errno::Errno,
    },
    #[error("the pod has {MAX_CONTAINERS} containers")]
    TooMany,
    #[error("the pod runs {MAX_EXECS} commands already")]
    TooManyExecs,
    #[error("{MAX_ATTACHED} clients are attached to the pod's containers already")]
    TooManyAttached,
    #[error("the client took no output of container {id} for {} s", tee::STALL.as_secs())]
    TooSlow { id: String },
    #[error("the pod was not configured")]
    NotConfigured,
    #[error("the OCI spec is not valid")]
    Json(#[from] serde_json::Error),
    #[error("the OCI spec has no {field}")]
    Missing { field: &'static str },
    #[error(transparent)]
    Oci(#[from] oci_spec::OciSpecError),
    #[error("cannot {action} {path:?}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot make the PID namespace that the pod's containers share")]
    Pause(#[source] io::Error),
    #[error("no terminal came from the runtime")]
    Console(#[source] io::Error),
    #[error("cannot take the container's output to its log")]
    Log(#[from] LogError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("a task of the supervisor has failed")]
    Task(#[from] tokio::task::JoinError),
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Unknown { .. } | Error::Session(SessionError::Unknown) => Code::NotFound,
            Error::Exists { .. } => Code::AlreadyExists,
            Error::Phase { .. }
            | Error::NotConfigured
            | Error::Session(SessionError::NoTerminal) => Code::FailedPrecondition,
            Error::TooMany
            | Error::TooManyExecs
            | Error::TooManyAttached
            | Error::TooSlow { .. } => Code::ResourceExhausted,
            Error::Session(SessionError::ConnectTimeout)
            | Error::Runtime(RuntimeError::TimedOut { .. }) => Code::DeadlineExceeded,
            Error::Runtime(RuntimeError::Refused { message, .. }) => refusal(message),
            Error::Id { .. }
            | Error::Signal { .. }
            | Error::Json(_)
            | Error::Missing { .. }
            | Error::Oci(_)
            | Error::User(_) => Code::InvalidArgument,
            _ => Code::Internal,
        };
        Status::new(code, sentence(&error))
    }
}

/// A program that cannot be run is the caller's affair.
fn refusal(message: &str) -> Code {
    let has = |text| message.contains(text);
    if has("executable file not found") || has("exec: ") && has("no such file or directory") {
        Code::NotFound
    } else if has("exec: ") && has("permission denied") {
        Code::PermissionDenied
    } else {
        Code::Internal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_missing_is_not_found() {
        for (message, code) in [
            (
                "exec failed: exec: \"nope\": executable file not found in $PATH",
                Code::NotFound,
            ),
            (
                "exec: \"/no\": stat /no: no such file or directory",
                Code::NotFound,
            ),
            (
                "exec: \"/etc/passwd\": permission denied",
                Code::PermissionDenied,
            ),
            ("error mounting: no such file or directory", Code::Internal),
        ] {
            assert_eq!(refusal(message), code, "{message}");
        }
    }
}
