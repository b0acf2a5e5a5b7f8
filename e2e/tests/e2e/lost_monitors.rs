//! Monitors that run and cannot be reached any more: their machines are ended,
//! rather than to run on where nobody sees them.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Node, Pod, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{Shutdown, shutdown};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::machine::{assert_ended, await_end};
use crate::with_drupe;

/// The pod's monitor, as the daemon knows it.
fn monitor(node: &Node, pod: &Pod) -> Result<i32> {
    let inspected = node.crictl_ok(&["inspectp", &pod.id])?;
    let inspected: serde_json::Value = serde_json::from_str(&inspected)?;
    let pid = inspected["info"]["pid"].as_i64().context("info.pid")?;
    Ok(i32::try_from(pid)?)
}

/// Inodes of the sockets that listen at a pod's control socket, or were accepted
/// there.
fn control_sockets(node: &Node, monitor: i32) -> Result<BTreeSet<u64>> {
    let run_dir = node.run_dir().display().to_string();
    // Of the daemon's network, which made them: the monitor's parent.
    let status = fs::read_to_string(format!("/proc/{monitor}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let daemon = parent.context("PPid")?.trim().to_owned();
    let sockets = fs::read_to_string(format!("/proc/{daemon}/net/unix"))?;
    // Num RefCount Protocol Flags Type St Inode Path
    let inodes = sockets.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let path = words.get(7)?;
        let is_control = path.starts_with(&run_dir) && path.ends_with("/control.sock");
        is_control.then(|| words.get(6)?.parse().ok()).flatten()
    });
    Ok(inodes.collect())
}

/// Closes what the process holds of them, as if it had done so itself: all at
/// once, as the daemon ends it for the first.
fn close_control_sockets(node: &Node, pid: i32) -> Result<usize> {
    let ours = control_sockets(node, pid)?;
    let process = rustix::process::Pid::from_raw(pid).context("a process id")?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let mut held: Vec<OwnedFd> = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // It may close others meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.display().to_string();
        let inode = target
            .strip_prefix("socket:[")
            .and_then(|rest| rest.strip_suffix(']'))
            .and_then(|inode| inode.parse().ok());
        if inode.is_some_and(|inode: u64| ours.contains(&inode)) {
            let number = entry.file_name().to_string_lossy().parse()?;
            held.push(pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?);
        }
    }
    for socket in &held {
        shutdown(socket, Shutdown::Both)?;
    }
    Ok(held.len())
}

fn await_no_process(node: &Node) -> Result<()> {
    eventually(
        "the pod's processes to end",
        Duration::from_secs(10),
        || {
            let left = node.pod_processes()?;
            ensure!(left.is_empty(), "{left:?}");
            Ok::<_, anyhow::Error>(())
        },
    )
}

#[test]
fn a_monitor_that_closes_its_control_socket_is_ended() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("silent")?;
        let container = pod.start_idle("c")?;
        let closed = close_control_sockets(node, monitor(node, &pod)?)?;
        // The listener, and the daemon's two connections.
        ensure!(closed >= 2, "{closed} sockets");
        await_end(&pod, &container)?;
        await_no_process(node)?;
        assert_ended(node, &pod, &container)
    })
}

#[test]
fn a_monitor_that_has_stopped_is_ended_by_a_daemon_that_cannot_take_its_pod_up() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("stopped")?;
        let container = pod.start_idle("c")?;
        let other = node.run_pod("beside")?.start_idle("c")?;
        let monitor = monitor(node, &pod)?;
        node.kill_server()?;
        kill(Pid::from_raw(monitor), Signal::SIGSTOP)?;
        node.start_server()?;
        // Three calls, each of ten seconds.
        eventually("the pod to be lost", Duration::from_secs(60), || {
            await_end(&pod, &container).map(drop)
        })?;
        eventually("the monitor to end", Duration::from_secs(10), || {
            // Empty for one that is not reaped yet.
            let line = fs::read(format!("/proc/{monitor}/cmdline")).unwrap_or_default();
            ensure!(line.is_empty(), "it is there");
            Ok::<_, anyhow::Error>(())
        })?;
        other.exec(&["true"])?;
        pod.stop()?;
        pod.remove()?;
        Ok(())
    })
}
