//! What can go wrong with a pod's namespace and its links.

use std::{io, path::PathBuf, time::Duration};

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("network namespace name {name:?} is not a plain file name")]
    Name { name: String },
    #[error("interface name {name:?} is not 1 to 15 characters without '/', ':' and blanks")]
    InterfaceName { name: String },
    #[error("network namespace {path} already exists")]
    Exists { path: PathBuf },
    #[error("network namespace {path} does not exist")]
    NotFound { path: PathBuf },
    #[error("{path} is not a network namespace")]
    NotANamespace { path: PathBuf },
    #[error("interface {interface} is not in network namespace {netns}")]
    NoInterface { interface: String, netns: PathBuf },
    #[error("interface {interface} in network namespace {netns} has no {what}")]
    Incomplete {
        interface: String,
        netns: PathBuf,
        what: &'static str,
    },
    #[error(
        "interface {interface} in network namespace {netns} has {count} addresses, \
         more than can be checked"
    )]
    TooManyAddresses {
        interface: String,
        netns: PathBuf,
        count: usize,
    },
    #[error(
        "the node's kernel has no tc classifier `bpf` or no tc action `mirred` \
         (modules cls_bpf and act_mirred)"
    )]
    NoClassifier { source: io::Error },
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot {action} for network namespace {netns}")]
    System {
        action: &'static str,
        netns: PathBuf,
        source: io::Error,
    },
    #[error("cannot {action} {interface} in network namespace {netns}")]
    Netlink {
        action: &'static str,
        interface: String,
        netns: PathBuf,
        source: io::Error,
    },
    #[error("work in network namespace {netns} took longer than {} s", after.as_secs())]
    TimedOut { netns: PathBuf, after: Duration },
    #[error("the thread working in network namespace {netns} ended without an answer")]
    ThreadEnded { netns: PathBuf },
}
