//! `kubectl debug --target`: a container that sees another one's processes.

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::Node;
use e2e::pod::{Container, IDLE, Pod, security};
use tonic::Code;

use crate::{refused, with_drupe, with_node};

const TARGET: &[&str] = &["sh", "-c", "echo found > /only-here; exec sleep 54321"];

/// What the kubelet sends for a container of `kubectl debug --target`.
pub fn aimed_at(mut config: ContainerConfig, target: &str) -> ContainerConfig {
    let context = security(&mut config);
    let options = context.namespace_options.get_or_insert_default();
    options.pid = NamespaceMode::Target.into();
    options.target_id = target.to_owned();
    let capabilities = context.capabilities.get_or_insert_default();
    capabilities.add_capabilities = vec!["SYS_PTRACE".to_owned()];
    config
}

fn debug(pod: &Pod, name: &str, target: &Container) -> Result<Container> {
    pod.start_with(aimed_at(pod.container_config(name, IDLE), &target.id))
}

pub fn sees_its_target(debugger: &Container, target: &Container) -> Result<()> {
    let processes = debugger.exec(&["ps", "-o", "pid,args"])?;
    let is_target = |line: &&str| line.trim().starts_with("1 ") && line.contains("sleep 54321");
    ensure!(processes.lines().any(|l| is_target(&l)), "{processes}");
    let namespace = ["readlink", "/proc/self/ns/pid"];
    assert_eq!(debugger.exec(&namespace)?, target.exec(&namespace)?);
    assert_eq!(debugger.exec(&["cat", "/proc/1/root/only-here"])?, "found");
    // Its files are its own.
    let answer = debugger.exec_sync(&["test", "-e", "/only-here"], 20)?;
    ensure!(answer.exit_code != 0, "it is in the target's root");
    Ok(())
}

#[test]
fn a_debugger_sees_its_target_and_leaves_it_running() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("debugged")?;
        let target = pod.start("target", TARGET)?;
        let beside = pod.start("beside", &["sleep", "65432"])?;
        let debugger = debug(&pod, "debugger", &target)?;
        sees_its_target(&debugger, &target)?;
        let processes = debugger.exec(&["ps", "-o", "args"])?;
        ensure!(!processes.contains("65432"), "{processes}");
        // It may be aimed at a debugger, too.
        let second = debug(&pod, "second", &debugger)?;
        sees_its_target(&second, &target)?;

        debugger.stop(0)?;
        debugger.remove()?;
        sees_its_target(&second, &target)?;
        assert_eq!(target.status()?.state(), ContainerState::ContainerRunning);
        // The first process of a namespace takes all others along.
        target.stop(0)?;
        assert_eq!(second.wait_exit()?.exit_code, 137);
        beside.exec(&["true"]).map(drop)
    })
}

#[test]
fn a_target_runs_in_the_same_pod() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("here")?;
        let elsewhere = node.run_pod("elsewhere")?.start("target", TARGET)?;
        let field = "config.linux.security_context.namespace_options.target_id";
        let aimed = |id: &str| {
            let config = pod.container_config("debugger", IDLE);
            pod.create(aimed_at(config, id)).map(drop)
        };
        let unknown = "0123456789abcdef".repeat(4);
        for (id, code, parts) in [
            ("", Code::InvalidArgument, [field, "empty"]),
            (&unknown, Code::InvalidArgument, [field, unknown.as_str()]),
            (&elsewhere.id, Code::InvalidArgument, [field, &elsewhere.id]),
        ] {
            refused(aimed(id), code, &parts)?;
        }
        let target = pod.create(pod.container_config("target", TARGET))?;
        let parts = [target.id.as_str(), "is created", "running"];
        refused(aimed(&target.id), Code::FailedPrecondition, &parts)?;
        target.start()?;
        aimed(&target.id)?;
        target.stop(0)?;
        let config = pod.container_config("late", IDLE);
        refused(
            pod.create(aimed_at(config, &target.id)).map(drop),
            Code::FailedPrecondition,
            &[&target.id, "exited"],
        )
        .map(drop)
    })
}

#[test]
fn the_nodes_namespaces_are_refused_by_name_in_a_pod_with_its_own_kernel() -> Result<()> {
    with_drupe(|node: &Node| {
        let pod = node.run_pod("own")?;
        let node_mode = || NamespaceMode::Node.into();
        let options: [(&str, NamespaceOption); 3] = [
            (
                "network",
                NamespaceOption {
                    network: node_mode(),
                    ..Default::default()
                },
            ),
            (
                "ipc",
                NamespaceOption {
                    ipc: node_mode(),
                    ..Default::default()
                },
            ),
            (
                "pid",
                NamespaceOption {
                    pid: node_mode(),
                    ..Default::default()
                },
            ),
        ];
        for (name, options) in options {
            let mut config = pod.container_config("c", IDLE);
            security(&mut config).namespace_options = Some(options);
            let field = format!("config.linux.security_context.namespace_options.{name}");
            refused(
                pod.create(config).map(drop),
                Code::Unimplemented,
                &[&field, "own kernel"],
            )?;
        }
        Ok(())
    })
}
