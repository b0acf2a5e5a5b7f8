//! The control protocol between the daemon and a pod's VMM.
//!
//! A SOCK_SEQPACKET unix socket; each packet is one JSON message, at most
//! [`MAX_MESSAGE`] bytes, file descriptors beside it. A connection carries
//! requests, each answered by exactly one [`Reply`] in order; after
//! [`Request::Subscribe`] it carries [`Event`]s only. The daemon that loses
//! its connections loses nothing: a new one asks [`Request::Status`] and goes
//! on. The VMM's end of the socket closing means the VMM is gone.

use serde::{Deserialize, Serialize};

use crate::LogToken;

/// Room for a status with the tail of a console.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Descriptors in one message: a disk of 64 image layers and some room.
pub const MAX_FDS: usize = 128;

/// The guest's port on which the agent serves gRPC.
pub const AGENT_PORT: u32 = 1024;
/// The host's port that the agent connects to once it serves.
pub const READY_PORT: u32 = 1;
/// The host's port that takes the output of containers; see [`Request::OpenLog`].
pub const LOG_PORT: u32 = 2;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    Status,
    /// Turn this connection into a stream of events, starting with the
    /// present state.
    Subscribe,
    /// Back disk slot `slot` by the concatenation of the files sent beside
    /// this message. Each file's length is rounded up to 4 KiB.
    AttachDisk {
        slot: u32,
    },
    /// Back disk slot `slot` by the block device sent beside this message,
    /// which is open for writing too unless the disk is to be read-only.
    AttachDevice {
        slot: u32,
        read_only: bool,
    },
    DetachDisk {
        slot: u32,
    },
    /// Take the output of container `container` into the log file sent beside
    /// this message, in the CRI log format. The guest opens [`LOG_PORT`] and
    /// sends one line, `container stream token\n` with `stream` either
    /// `stdout` or `stderr`, then raw bytes. A log without a token, as older
    /// daemons open them, takes `container stream\n`. Sent again, the new file
    /// replaces the old one between two lines: log rotation; the token stays
    /// unless there is a new one. See [`Status::log_tokens`].
    OpenLog {
        container: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token: Option<LogToken>,
    },
    /// Forget the log once its streams have ended.
    CloseLog {
        container: String,
    },
    /// Ask the guest to do without `mib` MiB of its memory. It follows as far
    /// and as soon as it can, and takes pages back before it kills for want of
    /// memory.
    SetBalloon {
        mib: u32,
    },
    /// End the machine now.
    Kill,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    Ok,
    Status(Status),
    Error {
        message: String,
    },
    /// The pod was not started: its confinement has to be whole
    /// ([`Confinement::Required`](crate::Confinement)), and the node lacks what
    /// the message says.
    Unconfined {
        message: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub state: VmState,
    /// Microseconds from the VMM's exec to each point that was reached.
    pub jailed_us: Option<u64>,
    pub machine_started_us: Option<u64>,
    pub guest_ready_us: Option<u64>,
    /// Whether [`Request::OpenLog`] may have a token. A VMM that an older
    /// daemon started takes none.
    #[serde(default)]
    pub log_tokens: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum VmState {
    /// The machine was started; the agent has not been heard of.
    Booting,
    /// The agent has connected to [`READY_PORT`].
    Ready,
    /// The guest ended; `reason` says how and ends with the console's tail.
    /// The VMM exits once this was sent to every subscriber.
    Ended {
        reason: String,
        #[serde(default)]
        cause: EndCause,
    },
}

/// The kind of a machine's end, for those who count them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndCause {
    /// By a request or a signal, to the VMM or to the guest's process.
    Killed,
    /// The guest's kernel said that it panicked.
    GuestPanic,
    /// The guest switched itself off.
    PoweredOff,
    /// The machine or one of its devices failed.
    Fault,
    /// Said by a VMM of another version, or not at all.
    #[default]
    #[serde(other)]
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    State(Status),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_daemons_and_vmms_understand_each_other() {
        let container = "c".to_owned();
        let text = r#"{"request":"open-log","container":"c"}"#;
        let request = Request::OpenLog {
            container: container.clone(),
            token: None,
        };
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        let read = serde_json::from_str(text).unwrap();
        assert!(matches!(read, Request::OpenLog { token: None, .. }));

        let sent = LogToken::new([7; 16]);
        let request = Request::OpenLog {
            container,
            token: Some(sent),
        };
        let text = serde_json::to_string(&request).unwrap();
        let read = serde_json::from_str(&text).unwrap();
        assert!(matches!(read, Request::OpenLog { token: Some(token), .. } if token == sent));

        // Of a VMM before there were tokens.
        let text = r#"{"state":{"state":"ready"},"jailed_us":1,"machine_started_us":2,
            "guest_ready_us":3}"#;
        let status: Status = serde_json::from_str(text).unwrap();
        assert!(!status.log_tokens);
    }

    #[test]
    fn an_end_is_read_from_every_version_of_the_vmm() {
        let read = |text: &str| serde_json::from_str::<VmState>(text).unwrap();
        let ended = |cause| VmState::Ended {
            reason: "x".to_owned(),
            cause,
        };
        assert_eq!(
            read(r#"{"state":"ended","reason":"x"}"#),
            ended(EndCause::Unknown)
        );
        assert_eq!(
            read(r#"{"state":"ended","reason":"x","cause":"of-tomorrow"}"#),
            ended(EndCause::Unknown)
        );
        let now = ended(EndCause::GuestPanic);
        let text = serde_json::to_string(&now).unwrap();
        assert_eq!(
            text,
            r#"{"state":"ended","reason":"x","cause":"guest-panic"}"#
        );
        assert_eq!(read(&text), now);
    }
}
