//! Pod networks that cannot be had: the plugin or directory is named, and
//! nothing left.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::ListPodSandboxRequest;
use e2e::Node;
use serde_json::json;
use tonic::Code;

use crate::{on_drupe, pod_refused, took_less};

/// A plugin that connects no pod and says why.
pub const FAILS: &str = r#"#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.0.0","code":100,"msg":"no cherries today","details":"sold out"}'; exit 1 ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
esac
"#;

#[test]
fn a_failing_cni_plugin_is_quoted_and_nothing_is_left() -> Result<()> {
    let node = Node::builder().plugin("e2e-fails").prepare()?;
    node.write_plugin("e2e-fails", FAILS)?;
    node.start_server()?;
    on_drupe(node, |node| {
        let message = pod_refused(
            node,
            "unplugged",
            Code::Internal,
            &["e2e-fails", "no cherries today"],
        )?;
        ensure!(message.contains("cni"), "the phase is not named: {message}");
        ensure!(
            node.cri()?
                .list_pod_sandbox(ListPodSandboxRequest::default())?
                .items
                .is_empty()
        );
        node.assert_no_pod_left()
    })
}

#[test]
fn a_cni_plugin_that_hangs_is_given_up() -> Result<()> {
    let node = Node::builder()
        .plugin("e2e-hangs")
        .config(|config| config["network"]["plugin_timeout_seconds"] = json!(2))
        .prepare()?;
    let script = "#!/bin/sh\nif [ \"$CNI_COMMAND\" = ADD ]; then sleep 54321 & wait; fi\necho '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}'\n";
    node.write_plugin("e2e-hangs", script)?;
    node.start_server()?;
    on_drupe(node, |node| {
        let begun = Instant::now();
        pod_refused(
            node,
            "hanging",
            Code::DeadlineExceeded,
            &["e2e-hangs", "2 s"],
        )?;
        took_less(begun, Duration::from_secs(20))?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_pod_on_a_node_without_network_configuration_is_refused() -> Result<()> {
    let node = Node::builder()
        .cni(|conflist| *conflist = serde_json::Value::Null)
        .start()?;
    on_drupe(node, |node| {
        let answer = node
            .try_run_pod(node.pod_config("netless"))
            .map(|pod| pod.id);
        let status = answer.err().context("a pod came up without a network")?;
        ensure!(
            status
                .message()
                .contains(&node.cni_dir().display().to_string()),
            "{status:?}"
        );
        node.assert_no_pod_left()
    })
}
