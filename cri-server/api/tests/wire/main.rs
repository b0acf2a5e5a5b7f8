//! The proto states the published interface: compared with the `k8s-cri` crate
//! for what both know (it has Kubernetes 1.32's), and pinned as a whole.

mod listing;

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use prost::Message;
use prost_types::FileDescriptorSet;
use sha2::{Digest, Sha256};

/// Of the listing of `k8s.io/cri-api` v0.36.6's `api.proto`, of which
/// `examples/compare.rs` says that it is ours.
const KUBERNETES_1_36: &str = "c0aada0a292f90118057c4f7be67f96d072cb66b7c0ec1cd0e1a816c509d2b5b";

/// What 1.32 says otherwise: what it is, there, here, and why.
const CHANGED: [(&str, &str, &str, &str); 1] = [(
    "runtime.v1.KeyValue.2",
    "value Optional String ",
    "value Optional Bytes ",
    "a variable may hold bytes that are no UTF-8; the wire type is the same",
)];

/// What came after 1.32: fields, methods, and whole messages and enumerations.
const ADDED: [&str; 34] = [
    // 1.33: image volumes' sub-paths, stop signals, resizing of pods, pressure.
    "Mount.10",
    "ContainerConfig.18",
    "ContainerStatus.19",
    "Signal",
    "RuntimeService.UpdatePodSandboxResources",
    "UpdatePodSandboxResourcesRequest",
    "UpdatePodSandboxResourcesResponse",
    "ContainerStats.6",
    "LinuxPodSandboxStats.6",
    "CpuUsage.4",
    "MemoryUsage.8",
    "IoUsage",
    "PsiStats",
    "PsiData",
    // Since: user namespaces in the host's network, image volumes' digests,
    // lists as streams.
    "RuntimeFeatures.2",
    "ImageSpec.20",
    "RuntimeService.StreamPodSandboxes",
    "StreamPodSandboxesRequest",
    "StreamPodSandboxesResponse",
    "RuntimeService.StreamContainers",
    "StreamContainersRequest",
    "StreamContainersResponse",
    "RuntimeService.StreamContainerStats",
    "StreamContainerStatsRequest",
    "StreamContainerStatsResponse",
    "RuntimeService.StreamPodSandboxStats",
    "StreamPodSandboxStatsRequest",
    "StreamPodSandboxStatsResponse",
    "RuntimeService.StreamPodSandboxMetrics",
    "StreamPodSandboxMetricsRequest",
    "StreamPodSandboxMetricsResponse",
    "ImageService.StreamImages",
    "StreamImagesRequest",
    "StreamImagesResponse",
];

fn ours() -> Result<listing::Listing> {
    let bytes: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/wire.bin"));
    Ok(listing::of(&FileDescriptorSet::decode(bytes)?))
}

/// The proto that `k8s-cri` is generated from lies in its sources.
fn proto_of_the_crate() -> Result<PathBuf> {
    let platform = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version=1", "--offline", "--locked"])
        .args(["--filter-platform", &platform])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .context("cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    let manifest = packages
        .iter()
        .find(|package| package["name"] == "k8s-cri")
        .and_then(|package| package["manifest_path"].as_str())
        .context("k8s-cri is no dependency")?;
    let root = Path::new(manifest).parent().context("no directory")?;
    Ok(root.join("proto/v1.proto"))
}

#[test]
fn what_the_crate_knows_is_the_same_here() -> Result<()> {
    let ours = ours()?;
    let theirs = listing::of_file(&proto_of_the_crate()?)?;
    ensure!(theirs.len() > 500, "only {} lines", theirs.len());
    let mut changed = BTreeSet::new();
    for (key, there) in &theirs {
        let here = ours.get(key).with_context(|| format!("{key} is missing"))?;
        if here != there {
            changed.insert((key.as_str(), there.as_str(), here.as_str()));
        }
    }
    let known = CHANGED.map(|(key, there, here, _)| (key, there, here));
    assert_eq!(changed, BTreeSet::from(known));
    Ok(())
}

#[test]
fn what_is_here_and_not_in_the_crate_came_later() -> Result<()> {
    let theirs = listing::of_file(&proto_of_the_crate()?)?;
    let messages: BTreeSet<&str> = theirs
        .keys()
        .filter_map(|key| key.strip_prefix("runtime.v1.")?.split('.').next())
        .collect();
    let ours = ours()?;
    let added: BTreeSet<&str> = ours
        .keys()
        .filter(|key| !theirs.contains_key(*key))
        .filter_map(|key| key.strip_prefix("runtime.v1."))
        // One that is new as a whole is listed by its name alone.
        .map(|key| match key.split_once('.') {
            Some((owner, _)) if !messages.contains(owner) => owner,
            _ => key,
        })
        .collect();
    assert_eq!(added, BTreeSet::from(ADDED));
    Ok(())
}

#[test]
fn the_wire_is_that_of_kubernetes_1_36() -> Result<()> {
    let digest = Sha256::digest(listing::text(&ours()?));
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex, KUBERNETES_1_36,
        "compare with the interface's api.proto by examples/compare.rs"
    );
    Ok(())
}
