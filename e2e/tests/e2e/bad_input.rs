//! Images that cannot be had, and a daemon that cannot start: a clear reason,
//! and nothing left.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::{AuthConfig, ListImagesRequest};
use e2e::image::{self, Image, busybox_config};
use e2e::layer::{Compression, Layer, LayerBuilder};
use e2e::leaks::files_below;
use e2e::registry::Access;
use e2e::{Node, Server};
use serde_json::json;
use tar::EntryType;
use tonic::Code;

use crate::{drupe, refused};

/// Fails if a failed pull has left an image or anything of one.
fn assert_no_image_left(node: &Node) -> Result<()> {
    let images = node
        .cri()?
        .list_images(ListImagesRequest::default())?
        .images;
    ensure!(images.is_empty(), "{images:?}");
    let mut left = files_below(&node.root().join("images"))?;
    // What the store is locked by.
    left.retain(|file| !file.ends_with("lock"));
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
fn an_unknown_image_is_named() -> Result<()> {
    let node = drupe()?;
    for name in [
        "127.0.0.1:5000/no-such-image:latest",
        "127.0.0.1:5000/busybox:no-such-tag",
    ] {
        refused(node.cri()?.pull(name), Code::NotFound, &[name])?;
    }
    for bad in [
        "",
        "library/UPPER",
        "a b",
        "127.0.0.1:5000/busybox@sha256:short",
    ] {
        refused(node.cri()?.pull(bad), Code::InvalidArgument, &[bad])?;
    }
    node.finish()
}

#[test]
fn an_unreachable_registry_is_named() -> Result<()> {
    let node = drupe()?;
    refused(
        node.cri()?.pull("127.0.0.1:5998/busybox:latest"),
        Code::Unavailable,
        &["127.0.0.1:5998", "refused"],
    )?;
    let unresolvable = "registry.invalid/busybox:latest";
    refused(
        node.cri()?.pull(unresolvable),
        Code::Unavailable,
        &["registry.invalid"],
    )?;
    node.finish()
}

#[test]
fn wrong_credentials_are_refused() -> Result<()> {
    let node = drupe()?;
    let _registry = node.start_registry("127.0.0.1:5001", &Access::Basic)?;
    let name = "127.0.0.1:5001/busybox:latest";
    let wrong = AuthConfig {
        username: "puller".to_owned(),
        password: "wrong".to_owned(),
        ..Default::default()
    };
    let message = refused(
        node.cri()?.pull_with(name, Some(wrong)),
        Code::Unauthenticated,
        &[name, "does not accept the credentials"],
    )?;
    ensure!(
        !message.contains("wrong"),
        "the password is in the message: {message}"
    );
    refused(
        node.cri()?.pull(name),
        Code::Unauthenticated,
        &[name, "none were given"],
    )?;
    assert_no_image_left(&node)?;
    node.finish()
}

#[test]
fn a_corrupt_layer_is_refused_by_its_digest() -> Result<()> {
    let node = drupe()?;
    let mut image = image::busybox()?;
    image.layers.push(
        LayerBuilder::default()
            .file("data", 0o644, &[1; 3_000_000])?
            .build(Compression::Plain)?,
    );
    let registry = node.registry()?;
    registry.push("corrupt", "latest", &image)?;
    let digest = image.layers[2].digest.clone();
    registry.corrupt_blob(&digest)?;
    refused(
        node.cri()?.pull("127.0.0.1:5000/corrupt:latest"),
        Code::DataLoss,
        &["corrupt:latest", &digest],
    )?;
    assert_no_image_left(&node)?;
    node.finish()
}

#[test]
fn a_truncated_or_garbled_layer_is_refused() -> Result<()> {
    let node = drupe()?;
    let whole = LayerBuilder::default()
        .file("data", 0o644, &[1; 100_000])?
        .build(Compression::Plain)?;
    let cases = [
        (
            "truncated",
            Layer::from_tar(&whole.blob[..60_000], Compression::Gzip)?,
        ),
        (
            "garbled",
            Layer::from_tar(&[0xa5; 10_000], Compression::Gzip)?,
        ),
    ];
    for (name, layer) in cases {
        let image = Image::new(vec![layer], busybox_config());
        node.registry()?.push(name, "latest", &image)?;
        let answer = node.cri()?.pull(&format!("127.0.0.1:5000/{name}:latest"));
        refused(answer, Code::DataLoss, &[name, &image.layers[0].digest])?;
    }
    assert_no_image_left(&node)?;
    node.finish()
}

#[test]
fn a_layer_that_is_not_what_the_image_says_is_refused() -> Result<()> {
    let node = drupe()?;
    let mut image = image::busybox()?;
    // The blob's own digest is right; what is inside is something else.
    image.layers[1].diff_id = e2e::layer::digest(b"something else");
    node.registry()?.push("swapped", "latest", &image)?;
    refused(
        node.cri()?.pull("127.0.0.1:5000/swapped:latest"),
        Code::DataLoss,
        &["swapped:latest"],
    )?;
    assert_no_image_left(&node)?;
    node.finish()
}

#[test]
fn a_layer_that_leaves_the_root_is_refused() -> Result<()> {
    let node = drupe()?;
    let escape = b"../../../../tmp/drupe-e2e-escaped";
    let cases = [
        (
            "dotdot",
            LayerBuilder::default().raw(escape, EntryType::Regular, b"")?,
        ),
        (
            "dotdot-link",
            LayerBuilder::default().file("a", 0o644, b"x")?.raw(
                b"b",
                EntryType::Link,
                b"../../../etc/passwd",
            )?,
        ),
        (
            "long-name",
            LayerBuilder::default().file(&"n".repeat(256), 0o644, b"x")?,
        ),
        (
            "long-path",
            LayerBuilder::default().file(&"deep/".repeat(1000), 0o644, b"x")?,
        ),
    ];
    for (name, layer) in cases {
        let image = Image::new(vec![layer.build(Compression::Gzip)?], busybox_config());
        node.registry()?.push(name, "latest", &image)?;
        let answer = node.cri()?.pull(&format!("127.0.0.1:5000/{name}:latest"));
        let status = answer
            .err()
            .with_context(|| format!("{name} was accepted"))?;
        let code = status.code();
        ensure!(
            matches!(code, Code::DataLoss | Code::InvalidArgument),
            "{name}: {code:?}: {}",
            status.message()
        );
        ensure!(status.message().contains(name), "{}", status.message());
    }
    ensure!(!std::path::Path::new("/tmp/drupe-e2e-escaped").exists());
    assert_no_image_left(&node)?;
    node.finish()
}

#[test]
fn a_decompression_bomb_is_refused_at_the_bound() -> Result<()> {
    let node = Node::builder()
        .server(Server::Drupe)
        .config(|config| config["images"]["max_layer_bytes"] = json!(16 << 20))
        .start()?;
    let zeros = vec![0_u8; 64 << 20];
    for compression in [Compression::Gzip, Compression::Zstd] {
        let layer = LayerBuilder::default()
            .file("bomb", 0o644, &zeros)?
            .build(compression)?;
        ensure!(layer.blob.len() < 1 << 20, "the bomb is no bomb");
        let image = Image::new(vec![layer], busybox_config());
        node.registry()?.push("bomb", "latest", &image)?;
        let answer = node.cri()?.pull("127.0.0.1:5000/bomb:latest");
        refused(
            answer,
            Code::ResourceExhausted,
            &["bomb:latest", "16777216"],
        )?;
    }
    assert_no_image_left(&node)?;
    node.finish()
}

#[test]
fn a_full_disk_is_told_and_left_clean() -> Result<()> {
    let node = Node::builder().server(Server::Drupe).prepare()?;
    node.mount_small_root("8m")?;
    node.start_server()?;
    let mut image = image::busybox()?;
    let noise: Vec<u8> = (0..20_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    image.layers.push(
        LayerBuilder::default()
            .file("noise", 0o644, &noise)?
            .build(Compression::Plain)?,
    );
    node.registry()?.push("large", "latest", &image)?;
    refused(
        node.cri()?.pull("127.0.0.1:5000/large:latest"),
        Code::ResourceExhausted,
        &["large:latest"],
    )?;
    assert_no_image_left(&node)?;
    // What fits still works.
    node.pull_busybox()?;
    node.finish_with_small_root()
}

#[test]
fn an_invalid_configuration_ends_the_daemon_with_the_key_named() -> Result<()> {
    for (edit, expected) in [
        (json!({ "sockett": "/x" }), "did you mean `socket`?"),
        (json!({ "log_level": "loud" }), "log_level"),
        (json!({ "default_runtime": "none" }), "default_runtime"),
        (
            json!({ "runtimes": { "microvm": { "machine": "abacus" } } }),
            "machine",
        ),
    ] {
        let node = Node::builder()
            .server(Server::Drupe)
            .config(move |config| {
                if let (Some(config), Some(edit)) = (config.as_object_mut(), edit.as_object()) {
                    config.extend(edit.clone());
                }
            })
            .prepare()?;
        let (status, said) = node.run_server_to_its_end(Duration::from_secs(10))?;
        ensure!(!status.success(), "it started with {expected} wrong");
        ensure!(said.contains(expected), "{expected:?} is not in: {said}");
        ensure!(
            said.trim().lines().count() <= 3,
            "more than a few lines: {said}"
        );
        node.assert_nothing_left()?;
        node.finish_without_server()?;
    }
    for (text, expected) in [
        (Some("socket: [unclosed"), "line"),
        (None, "No such file or directory"),
    ] {
        let node = Node::builder().server(Server::Drupe).prepare()?;
        match text {
            Some(text) => node.write_config(text)?,
            None => fs::remove_file(node.config_file())?,
        }
        let (status, said) = node.run_server_to_its_end(Duration::from_secs(10))?;
        ensure!(!status.success(), "it started with {text:?}");
        let file = node.config_file().display().to_string();
        for part in [expected, &file] {
            ensure!(said.contains(part), "{part:?} is not in: {said}");
        }
        node.finish_without_server()?;
    }
    Ok(())
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() -> Result<()> {
    let node = drupe()?;
    let output = std::process::Command::new("timeout")
        .arg("10")
        .arg(e2e::artifacts::daemon()?)
        .args(["serve", "--config"])
        .arg(node.config_file())
        .output()?;
    // 124 is timeout's own: it would have served on.
    ensure!(
        !output.status.success() && output.status.code() != Some(124),
        "two daemons share one state"
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("in use by another process"), "{said}");
    node.pull_busybox()
        .context("the first daemon after the second was refused")?;
    node.finish()
}
