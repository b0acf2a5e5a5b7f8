//! How a shell ends, and that it leaves nothing.

use anyhow::{Context, Result, ensure};
use e2e::eventually;

use super::{SOON, Shell, await_leases, debug, leases, says, with_shells};
use crate::command_line::fails;

/// A command that would run on if nobody ended it, and what it started.
const STAYS: &[&str] = &["sh", "-c", "sleep 31313 & echo up; exec sleep 31314"];

fn stays(pod: &str) -> Vec<&str> {
    [&[pod, "--"][..], STAYS].concat()
}

fn is_clean(node: &e2e::Node, pod: &str) -> Result<()> {
    let processes = says(node, pod, &["ps", "-o", "args"])?;
    ensure!(!processes.contains("3131"), "{processes}");
    Ok(())
}

#[test]
fn it_ends_with_its_client_and_is_told_in_the_log() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("left")?;
        pod.start_idle("c")?;
        let mut shell = Shell::start(node, &stays(&pod.id))?;
        shell.await_line("up")?;
        assert_eq!(leases(node)?, 2);
        let ended = || Ok::<_, anyhow::Error>(node.log()?.matches("debug shell ended").count());
        assert_eq!(ended()?, 0);
        // Without notice.
        drop(shell);
        eventually("the shell's end to be told", SOON, || {
            ensure!(ended()? == 1, "it is not");
            Ok::<_, anyhow::Error>(())
        })?;
        assert_eq!(leases(node)?, 1);
        is_clean(node, &pod.id)?;
        let log = node.log()?;
        let begins = log.lines().find(|line| line.contains("debug shell begins"));
        let begins = begins.context("it is not told")?;
        for part in [&*pod.id, "e2e/left", "busybox", "31314", "uid=0"] {
            ensure!(begins.contains(part), "{part} is not in {begins}");
        }
        Ok(())
    })
}

#[test]
fn it_ends_with_the_daemon_and_is_gone_after_the_next_start() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("survivor")?;
        let container = pod.start_idle("c")?;
        let mut shell = Shell::start(node, &stays(&pod.id))?;
        shell.await_line("up")?;
        node.kill_server()?;
        let output = shell.await_end()?;
        fails(&output, &["the shell broke off: the daemon has gone"])?;
        assert_eq!(leases(node)?, 2);
        node.start_server()?;
        await_leases(node, 1)?;
        is_clean(node, &pod.id)?;
        container.exec(&["true"])?;

        // One that is asked to stop ends them itself.
        let mut shell = Shell::start(node, &stays(&pod.id))?;
        shell.await_line("up")?;
        node.stop_server()?;
        fails(&shell.await_end()?, &["daemon is stopping"])?;
        assert_eq!(leases(node)?, 1);
        node.start_server()?;
        is_clean(node, &pod.id)
    })
}

#[test]
fn it_ends_with_its_pod() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("removed")?;
        pod.start_idle("c")?;
        let mut shell = Shell::start(node, &stays(&pod.id))?;
        shell.await_line("up")?;
        pod.stop()?;
        let output = shell.await_end()?;
        fails(&output, &["the shell broke off"])?;
        pod.remove()?;
        node.assert_no_pod_left()?;

        // A machine that is killed takes it along.
        let pod = node.run_pod("killed")?;
        pod.start_idle("c")?;
        let mut shell = Shell::start(node, &stays(&pod.id))?;
        shell.await_line("up")?;
        node.kill_pod_processes()?;
        // The guest may yet tell that its command was killed.
        ensure!(!shell.await_end()?.status.success());
        await_leases(node, 1)
    })
}

#[test]
fn a_pod_has_few_at_once() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("crowded")?;
        pod.start_idle("c")?;
        let mut open = Vec::new();
        for _ in 0..4 {
            open.push(Shell::open(node, &pod.id)?);
        }
        let output = debug(node, &[&pod.id], b"")?;
        fails(&output, &[&pod.id, "4 debug shells"])?;
        // Each takes a disk slot, of which the pod has eight.
        for name in ["second", "third", "fourth"] {
            pod.start_idle(name)?;
        }
        drop(open.pop());
        await_leases(node, 7)?;
        pod.start_idle("fifth")?;
        let output = debug(node, &[&pod.id], b"")?;
        fails(&output, &["no free disk slot"])?;
        drop(open);
        await_leases(node, 5)?;
        says(node, &pod.id, &["true"]).map(drop)
    })
}
