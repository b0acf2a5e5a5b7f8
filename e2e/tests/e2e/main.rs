//! What a user of a node gains, tried with the real parts.
#![forbid(unsafe_code)]

mod bad_containers;
mod bad_input;
mod bad_machines;
mod bad_networks;
mod bad_pods;
mod cdi;
mod cgroups;
mod command_line;
mod confinement;
mod containers;
mod debug_shell;
mod debugging;
mod devices;
mod events;
mod files;
mod harness;
mod host_pods;
mod identity;
mod image_volumes;
mod images;
mod kubelet_volumes;
mod lacking;
mod logs;
mod lost_monitors;
mod machine;
mod metrics;
mod networks;
mod overhead;
mod pods;
mod private_cache;
mod privileged;
mod processes;
mod prometheus;
mod pulls;
mod removal;
mod resources;
mod restart;
mod restart_plugins;
mod restart_sweep;
mod runtime;
mod seccomp;
mod source_check;
mod stats;
mod streaming;
mod top;
mod traces;
mod userns;
mod volumes;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use e2e::{Node, Server, patient};
use tonic::{Code, Status};

/// Fails unless `result` is an error of `code` whose message is one line that
/// contains all of `parts`.
fn refused<T>(result: Result<T, Status>, code: Code, parts: &[&str]) -> Result<String> {
    let Err(status) = result else {
        bail!("it succeeded; expected {code:?} naming {parts:?}")
    };
    ensure!(
        status.code() == code,
        "{:?} instead of {code:?}: {}",
        status.code(),
        status.message()
    );
    let message = status.message().to_owned();
    ensure!(
        !message.trim().is_empty() && !message.contains('\n'),
        "not one line: {message:?}"
    );
    for part in parts {
        ensure!(message.contains(part), "{part:?} is not in: {message}");
    }
    Ok(message)
}

/// A pod called `name` is refused for a reason that names `parts`.
fn pod_refused(node: &Node, name: &str, code: Code, parts: &[&str]) -> Result<String> {
    refused(node.try_run_pod(node.pod_config(name)), code, parts)
}

/// The node whose images are pulled and which runs `test`, then proves that
/// nothing is left.
fn with_node(test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let node = Node::start()?;
    node.pull_busybox()?;
    test(&node)?;
    node.finish()
}

/// Fails if more has passed since `begun` than `limit`, on a slow machine a
/// multiple of it.
fn took_less(begun: Instant, limit: Duration) -> Result<()> {
    let took = begun.elapsed();
    ensure!(took < patient(limit), "it took {took:?}");
    Ok(())
}

/// A node whose server is drupe, whatever other tests try.
fn drupe() -> Result<Node> {
    Node::builder().server(Server::Drupe).start()
}

/// Like [`with_node`], but passes over another runtime: what is tried is drupe's
/// own.
fn with_drupe(test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(());
        }
        test(node)
    })
}

/// The same on a node that the test has made.
fn on_drupe(node: Node, test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    if !shares_the_hosts_kernel(&node) {
        test(&node)?;
    }
    node.finish()
}

/// Whether the harness is being checked against a runtime that shares the
/// host's kernel.
fn shares_the_hosts_kernel(node: &Node) -> bool {
    node.server == Server::Containerd
}
