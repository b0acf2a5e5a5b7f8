//! What can go wrong between the daemon and a CNI plugin.

use std::{fmt, io, path::PathBuf, process::ExitStatus, time::Duration};

use super::exec::Verb;

#[derive(Debug, thiserror::Error)]
pub enum CniError {
    #[error("{field} {value:?} cannot be given to a CNI plugin")]
    Invalid { field: &'static str, value: String },
    #[error("pod {sandbox} has an attachment of {interface} already")]
    AlreadyAttached { sandbox: String, interface: String },
    #[error("pod {sandbox} has no attachment of {interface}")]
    NotAttached { sandbox: String, interface: String },
    #[error("CNI plugin {plugin} is not in {}", join(dirs))]
    NoPlugin { plugin: String, dirs: Vec<PathBuf> },
    #[error("cannot run CNI plugin {call}")]
    Spawn { call: Call, source: io::Error },
    #[error("cannot talk to CNI plugin {call}")]
    Talk { call: Call, source: io::Error },
    #[error("CNI plugin {call} did not end within {} s and was killed", after.as_secs_f32())]
    TimedOut { call: Call, after: Duration },
    #[error("CNI plugin {call} answered with more than {limit} bytes and was killed")]
    TooMuchOutput { call: Call, limit: usize },
    /// The plugin's own error (CNI 1.1, "Error").
    #[error("CNI plugin {call} failed: {}", sentence(message, details, *code))]
    Plugin {
        call: Call,
        code: u64,
        message: String,
        details: String,
    },
    /// It failed without an error in the form of the specification.
    #[error("CNI plugin {call} ended with {status}: {stderr}")]
    Exit {
        call: Call,
        status: ExitStatus,
        /// The last of what it wrote there.
        stderr: String,
    },
    #[error("the answer of CNI plugin {call} is not of the specification's form")]
    Answer {
        call: Call,
        source: serde_json::Error,
    },
    /// Of a daemon that was killed, or of another caller.
    #[error(
        "an earlier CNI plugin run for pod {sandbox} ({interface}) still goes on after {} s",
        after.as_secs_f32()
    )]
    Busy {
        sandbox: String,
        interface: String,
        after: Duration,
    },
    #[error("cannot {action} CNI record {path}")]
    Record {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("CNI record {path} is damaged")]
    DamagedRecord {
        path: PathBuf,
        source: serde_json::Error,
    },
    /// The ADD's failure is `source`; the record stays, for `del` to be tried again.
    #[error("{source}; undoing it failed too: {undo}")]
    Undo {
        source: Box<CniError>,
        undo: Box<CniError>,
    },
    #[error("{failed} CNI attachments could not be collected, the first because: {source}")]
    Collect {
        failed: usize,
        source: Box<CniError>,
    },
}

impl CniError {
    /// Whether a plugin, or the wait for one, took longer than it may.
    #[must_use]
    pub fn timed_out(&self) -> bool {
        match self {
            Self::TimedOut { .. } | Self::Busy { .. } => true,
            Self::Undo { source, undo } => source.timed_out() || undo.timed_out(),
            Self::Collect { source, .. } => source.timed_out(),
            _ => false,
        }
    }

    /// Whether the plugin ran to its end and reported a failure.
    pub(crate) fn reported(&self) -> bool {
        matches!(self, Self::Plugin { .. } | Self::Exit { .. })
    }
}

/// Which plugin was asked for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub plugin: String,
    pub verb: Verb,
    /// None in calls that concern no single pod.
    pub sandbox: Option<String>,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.plugin, self.verb.name())?;
        if let Some(sandbox) = &self.sandbox {
            write!(f, " of pod {sandbox}")?;
        }
        f.write_str(")")
    }
}

fn sentence(message: &str, details: &str, code: u64) -> String {
    if details.is_empty() {
        format!("{message} (code {code})")
    } else {
        format!("{message}; {details} (code {code})")
    }
}

pub(crate) fn join(dirs: &[PathBuf]) -> String {
    let names: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    names.join(" or ")
}
