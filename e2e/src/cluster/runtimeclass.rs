//! The RuntimeClass of pods in a microVM, as an operator gets it: measured and
//! installed by drupe itself.

use std::process::Command;

use anyhow::{Context, Result};

use super::{Cluster, HANDLER, NODE};
use crate::{artifacts, output};

/// The memory limit of the pods that are measured; most of the tests' are
/// smaller.
const PODS_OF_MIB: &str = "512";

impl Cluster {
    /// Labels the node, as an installer does where the handler works, and has
    /// drupe install the class. Returns the memory that it declares, in MiB.
    pub(super) fn install_runtime_class(&self) -> Result<u64> {
        let label = format!("handler.drupe.internal/{HANDLER}=true");
        self.kubectl(&["label", "node", NODE, &label])?;
        let node = self.node()?;
        let args = [
            "runtimeclass",
            "--apply",
            "--handler",
            HANDLER,
            "--memory",
            PODS_OF_MIB,
            "--pods=3",
            "--seconds=1",
        ];
        let mut command = Command::new(artifacts::daemon()?);
        command
            .args(args)
            .arg("--config")
            .arg(node.config_file())
            .arg("--kubeconfig")
            .arg(self.files.kubeconfig("admin"));
        let said = node.netns.run(|| command.output().context("drupe"))?;
        output::of_success("drupe", &args, &said)?;
        let declared = self.kubectl(&[
            "get",
            "runtimeclass",
            HANDLER,
            "-o",
            "jsonpath={.overhead.podFixed.memory}",
        ])?;
        let mib = declared.strip_suffix("Mi").and_then(|mib| mib.parse().ok());
        mib.with_context(|| format!("the class declares {declared:?}"))
    }
}
