//! Images of the programs that a cluster runs as pods.

use anyhow::Result;
use serde_json::json;

use crate::artifacts::{self, deb};
use crate::critest::images::nginx_alone;
use crate::image::{self, Image};
use crate::layer::{Compression, Layer, LayerBuilder};
use crate::{Node, registry};

/// Pushes `image` to the node's registry; returns its reference.
pub(super) fn push(node: &Node, name: &str, image: &Image) -> Result<String> {
    node.registry()?.push(name, "latest", image)?;
    Ok(format!("{}/{name}:latest", registry::ADDRESS))
}

/// nginx on port 80.
pub fn nginx(node: &Node) -> Result<String> {
    push(node, "nginx", &nginx_alone(80)?)
}

/// busybox, with one of Kubernetes' programs or etcd.
pub fn with_program(node: &Node, name: &str) -> Result<String> {
    let mut image = image::busybox()?;
    image.layers.push(program(name, "usr/bin")?);
    push(node, name, &image)
}

/// CoreDNS and nothing else.
pub(super) fn coredns() -> Result<Image> {
    let config = json!({ "Entrypoint": ["/coredns"] });
    Ok(Image::new(vec![program("coredns", "")?], config))
}

/// kube-proxy with the nft that it runs.
pub(super) fn kube_proxy() -> Result<Image> {
    let mut layer = LayerBuilder::default();
    for package in [
        "libbsd0",
        "libedit2",
        "libgmp10",
        "libjansson4",
        "libmd0",
        "libmnl0",
        "libnftables1",
        "libnftnl11",
        "libtinfo6",
        "libxtables12",
        "nftables",
    ] {
        layer = layer.package(&deb(package)?)?;
    }
    let layer = layer
        .package_files(&deb("libc6")?, |path| {
            path.starts_with("lib") || path.starts_with("lib64")
        })?
        .build(Compression::Zstd)?;
    let config = json!({
        "Env": ["PATH=/usr/sbin:/usr/bin"],
        "Entrypoint": ["/usr/bin/kube-proxy"],
    });
    Ok(Image::new(
        vec![layer, program("kube-proxy", "usr/bin")?],
        config,
    ))
}

fn program(name: &str, dir: &str) -> Result<Layer> {
    let path = artifacts::kubernetes(name)?;
    let path_inside = format!("{dir}/{name}");
    LayerBuilder::default()
        .file(
            path_inside.trim_start_matches('/'),
            0o755,
            &std::fs::read(path)?,
        )?
        .build(Compression::Zstd)
}
