//! Process ids that containers share.

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::pod::{IDLE, security};
use e2e::{Container, Node, Pod};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use super::{Shared, idle, namespace, pod_config, run_by_handler};
use crate::{refused, with_drupe};

#[test]
fn containers_share_process_ids_when_the_pod_says_so_or_one_joins_another() -> Result<()> {
    with_drupe(|node| {
        let mut config = pod_config(node, "sharing", Shared::default());
        let linux = config.linux.get_or_insert_default();
        let options = NamespaceOption {
            pid: NamespaceMode::Pod.into(),
            ..Default::default()
        };
        linux
            .security_context
            .get_or_insert_default()
            .namespace_options = Some(options.clone());
        let pod = run_by_handler(node, config)?;
        let with_pid = |name: &str, options: NamespaceOption| {
            let mut config = pod.container_config(name, IDLE);
            security(&mut config).namespace_options = Some(options);
            pod.start_with(config)
        };
        let first = with_pid("first", options.clone())?;
        let second = with_pid("second", options)?;
        let pids = |container: &Container| container.exec(&["readlink", "/proc/self/ns/pid"]);
        assert_eq!(pids(&first)?, pids(&second)?);
        ensure!(
            pids(&first)? != namespace("/proc/self/ns/pid")?,
            "the node's"
        );
        // What one leaves behind goes with it, though the namespace stays.
        let _ = first.exec(&["sh", "-c", "sleep 4321 & exit 0"])?;
        ensure!(second.exec(&["ps"])?.contains("sleep 4321"), "not seen");
        first.stop(0)?;
        ensure!(!second.exec(&["ps"])?.contains("sleep 4321"), "left behind");

        let pod = run_by_handler(node, pod_config(node, "debugged", Shared::default()))?;
        let target = idle(&pod, "target", Shared::default())?;
        let mut config = pod.container_config("debugger", IDLE);
        security(&mut config).namespace_options = Some(NamespaceOption {
            pid: NamespaceMode::Target.into(),
            target_id: target.id.clone(),
            ..Default::default()
        });
        let debugger = pod.start_with(config)?;
        assert_eq!(pids(&debugger)?, pids(&target)?);
        Ok(())
    })
}

/// A pod whose containers share process ids, and what its containers ask for.
fn sharing(node: &Node, name: &str) -> Result<(Pod, NamespaceOption)> {
    let mut config = pod_config(node, name, Shared::default());
    let options = NamespaceOption {
        pid: NamespaceMode::Pod.into(),
        ..Default::default()
    };
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.namespace_options = Some(options.clone());
    Ok((run_by_handler(node, config)?, options))
}

#[test]
fn who_may_trace_in_shared_process_ids_does_not_reach_the_node() -> Result<()> {
    with_drupe(|node| {
        let (pod, options) = sharing(node, "traced")?;
        let mut config = pod.container_config("tracer", IDLE);
        let context = security(&mut config);
        context.namespace_options = Some(options);
        let capabilities = context.capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["SYS_PTRACE".to_owned()];
        let tracer = pod.start_with(config)?;
        assert_eq!(tracer.exec(&["cat", "/proc/1/comm"])?, "pause");
        // It may look, and there is nothing.
        for dir in ["/proc/1/root/", "/proc/1/cwd/"] {
            assert_eq!(tracer.exec(&["ls", "-A", dir])?, "", "{dir}");
        }
        let open = tracer.exec(&[
            "sh",
            "-c",
            "cd /proc/1/fd; for fd in *; do readlink $fd; done",
        ])?;
        let harmless = |line: &str| line.starts_with("pipe:") || line.starts_with("anon_inode:");
        ensure!(!open.is_empty() && open.lines().all(harmless), "{open}");
        let write = tracer.exec_sync(&["sh", "-c", "echo x > /proc/1/root/x"], 20)?;
        let said = String::from_utf8_lossy(&write.stderr);
        ensure!(said.contains("Read-only file system"), "{said}");
        let status = tracer.exec(&["cat", "/proc/1/status"])?;
        for line in [
            "Uid:\t65535\t65535\t65535\t65535",
            "CapInh:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "CapAmb:\t0000000000000000",
            "NoNewPrivs:\t1",
        ] {
            ensure!(status.lines().any(|l| l == line), "{line}: {status}");
        }
        Ok(())
    })
}

#[test]
fn when_the_holder_of_shared_process_ids_ends_the_next_container_gets_another() -> Result<()> {
    with_drupe(|node| {
        let (pod, options) = sharing(node, "held")?;
        let start = |name: &str| {
            let mut config = pod.container_config(name, IDLE);
            security(&mut config).namespace_options = Some(options.clone());
            pod.start_with(config)
        };
        let before = start("before")?;
        let processes = node.pod_processes()?;
        let mut holders = processes.iter().filter(|(_, line)| line.ends_with("pause"));
        let (&holder, _) = holders.next().context("no holder")?;
        ensure!(holders.next().is_none(), "{processes:?}");
        kill(Pid::from_raw(i32::try_from(holder)?), Signal::SIGKILL)?;
        // The kernel ends what is in the namespace.
        assert_eq!(before.wait_exit()?.exit_code, 137);
        let (first, second) = (start("first")?, start("second")?);
        let pids = |container: &Container| container.exec(&["readlink", "/proc/self/ns/pid"]);
        assert_eq!(pids(&first)?, pids(&second)?);
        assert_eq!(pod.status()?.state(), PodSandboxState::SandboxReady);
        Ok(())
    })
}

#[test]
fn a_container_that_joins_one_that_has_ended_does_not_join_another() -> Result<()> {
    with_drupe(|node| {
        let pod = run_by_handler(node, pod_config(node, "late", Shared::default()))?;
        let target = idle(&pod, "target", Shared::default())?;
        let config = |name: &str| {
            let mut config = pod.container_config(name, IDLE);
            security(&mut config).namespace_options = Some(NamespaceOption {
                pid: NamespaceMode::Target.into(),
                target_id: target.id.clone(),
                ..Default::default()
            });
            config
        };
        let debugger = pod.create(config("debugger"))?;
        target.stop(0)?;
        // Its namespace is what was promised, and has nobody left to be in it.
        ensure!(debugger.start().is_err(), "it started somewhere");
        assert_eq!(debugger.wait_exit()?.exit_code, 128);
        refused(
            pod.create(config("later")).map(|container| container.id),
            Code::FailedPrecondition,
            &[&target.id],
        )?;
        Ok(())
    })
}
