//! The handler and its OCI runtime.

use std::process::Command;

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::{Node, Server};
use serde_json::json;
use tonic::Code;

use super::{HANDLER, NETWORK, pod_config};
use crate::{refused, with_drupe};

#[test]
fn an_operator_can_refuse_such_pods_and_is_told_what_is_missing() -> Result<()> {
    let with = |config: fn(&mut serde_json::Value), parts: &[&str]| -> Result<()> {
        let node = Node::builder()
            .server(Server::Drupe)
            .config(config)
            .start()?;
        let config = pod_config(&node, "unwanted", NETWORK);
        refused(
            node.try_run_pod(config).map(|pod| pod.id),
            Code::FailedPrecondition,
            parts,
        )?;
        node.finish()
    };
    with(
        |config| config["runtimes"]["microvm"]["host_namespaces"] = json!("refuse"),
        &["network", "refuse", "host_namespaces"],
    )?;
    with(
        |config| config["runtimes"]["host"]["oci"] = json!("no-such-runtime"),
        &["no-such-runtime", "install", "runtimes.host.oci"],
    )?;
    with(
        |config| {
            config["runtimes"]
                .as_object_mut()
                .map(|all| all.remove("host"));
        },
        &["network", "\"host\"", "not configured"],
    )
}

#[test]
fn the_handler_is_listed_and_checked() -> Result<()> {
    with_drupe(|node| {
        let request = StatusRequest { verbose: false };
        let handlers = node.cri()?.status(request)?.runtime_handlers;
        let host = handlers.iter().find(|handler| handler.name == HANDLER);
        ensure!(host.is_some(), "{handlers:?}");
        let output = Command::new(e2e::artifacts::daemon()?)
            .args(["check", "--config"])
            .arg(node.config_file())
            .output()?;
        let told = String::from_utf8_lossy(&output.stdout);
        let line = told.lines().find(|line| line.contains("handler host"));
        let runtime = e2e::artifacts::oci_runtime();
        ensure!(line.is_some_and(|line| line.contains(&runtime)), "{told}");
        Ok(())
    })
}
