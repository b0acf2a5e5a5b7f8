//! Images come from every kind of registry, and over bad lines too.

use std::thread;

use anyhow::{Context, Result, ensure};
use cri_api::v1::AuthConfig;
use e2e::Node;
use e2e::image::{self, Image, architecture, busybox_config, index};
use e2e::layer::{Compression, LayerBuilder};
use e2e::proxy::{Action, Proxy};
use e2e::registry::{self, Access, PASSWORD, Registry, USER};
use serde_json::json;
use tonic::Code;

use crate::{refused, shares_the_hosts_kernel};

/// `USER:PASSWORD` in base64, as Basic authentication wants it.
const CREDENTIALS: &str = "cHVsbGVyOmNvcnJlY3QgaG9yc2UgYmF0dGVyeSBzdGFwbGU=";

#[test]
fn by_tag() -> Result<()> {
    let node = Node::start()?;
    let id = node.cri()?.pull("127.0.0.1:5000/busybox:latest")?;
    ensure!(id.contains(&image::busybox()?.id()), "{id}");
    // Without a tag it is latest.
    assert_eq!(node.cri()?.pull("127.0.0.1:5000/busybox")?, id);
    node.finish()
}

#[test]
fn by_digest() -> Result<()> {
    let node = Node::start()?;
    let name = format!(
        "127.0.0.1:5000/busybox@{}",
        image::busybox()?.manifest().digest()
    );
    let cri = node.cri()?;
    cri.pull(&name)?;
    let image = cri
        .find_image(&name)?
        .context("not found by the name it was pulled by")?;
    assert_eq!(image.repo_digests, [name.as_str()]);
    ensure!(image.repo_tags.is_empty(), "{:?}", image.repo_tags);
    node.finish()
}

#[test]
fn from_an_index_the_platform_of_this_machine() -> Result<()> {
    let node = Node::start()?;
    let registry = node.registry()?;
    let ours = image::busybox()?;
    let mut foreign = Image::new(
        vec![image::accounts_layer(Compression::Gzip)?],
        busybox_config(),
    );
    foreign.config["Env"] = json!(["FOREIGN=1"]);
    for (tag, image) in [("foreign", &foreign), ("ours", &ours)] {
        registry.push("multi", tag, image)?;
    }
    let (foreign, manifest) = (foreign.manifest(), ours.manifest());
    let index = index(&[
        ("s390x", &foreign),
        (architecture(), &manifest),
        ("riscv64", &foreign),
    ]);
    registry.push_manifest("multi", "latest", &index)?;
    let id = node.cri()?.pull("127.0.0.1:5000/multi:latest")?;
    ensure!(id.contains(&ours.id()), "{id}");

    let only_foreign = e2e::image::index(&[("s390x", &foreign)]);
    registry.push_manifest("multi", "none", &only_foreign)?;
    let missing = node.cri()?.pull("127.0.0.1:5000/multi:none");
    if !shares_the_hosts_kernel(&node) {
        refused(missing, Code::NotFound, &["multi:none", architecture()])?;
    }
    node.finish()
}

#[test]
fn with_a_user_and_a_password() -> Result<()> {
    let node = Node::start()?;
    let private = "127.0.0.1:5001";
    let _registry = node.start_registry(private, &Access::Basic)?;
    let name = format!("{private}/busybox:latest");
    let cri = node.cri()?;
    let mut forms = vec![
        AuthConfig {
            username: USER.to_owned(),
            password: PASSWORD.to_owned(),
            ..Default::default()
        },
        AuthConfig {
            auth: CREDENTIALS.to_owned(),
            ..Default::default()
        },
        AuthConfig {
            auth: CREDENTIALS.to_owned(),
            server_address: format!("http://{private}"),
            ..Default::default()
        },
    ];
    if !shares_the_hosts_kernel(&node) {
        forms.push(AuthConfig {
            auth: CREDENTIALS.to_owned(),
            server_address: private.to_owned(),
            ..Default::default()
        });
    }
    for auth in forms {
        cri.pull_with(&name, Some(auth.clone()))
            .with_context(|| format!("{auth:?}"))?;
        cri.remove(&name)?;
    }
    node.finish()
}

#[test]
fn with_a_bearer_token() -> Result<()> {
    let node = Node::start()?;
    let proxy = Proxy::start(
        &node.netns,
        "127.0.0.1:5002",
        registry::ADDRESS,
        Some(CREDENTIALS),
    )?;
    let name = format!("{}/busybox:latest", proxy.address);
    let cri = node.cri()?;
    let auth = AuthConfig {
        username: USER.to_owned(),
        password: PASSWORD.to_owned(),
        ..Default::default()
    };
    cri.pull_with(&name, Some(auth))?;
    ensure!(
        proxy
            .requests()
            .iter()
            .any(|request| request.path.starts_with("/token")),
        "no token was asked for"
    );
    if !shares_the_hosts_kernel(&node) {
        cri.remove(&name)?;
        let without = cri.pull(&name);
        refused(without, Code::Unauthenticated, &[&name])?;
    }
    node.finish()
}

#[test]
fn from_a_mirror_under_the_original_name() -> Result<()> {
    let mirrors = json!({ "registry.example": { "mirrors": ["http://127.0.0.1:5000"] } });
    let node = Node::builder()
        .config(move |config| config["images"]["registries"] = mirrors)
        .start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    let cri = node.cri()?;
    cri.pull("registry.example/busybox:latest")?;
    let image = cri
        .find_image("registry.example/busybox:latest")?
        .context("not known by its own name")?;
    assert_eq!(image.repo_tags, ["registry.example/busybox:latest"]);
    node.finish()
}

#[test]
fn from_the_next_mirror_when_one_is_down() -> Result<()> {
    let mirrors = json!({
        "registry.example": { "mirrors": ["http://127.0.0.1:5999", "http://127.0.0.1:5000"] },
    });
    let node = Node::builder()
        .config(move |config| config["images"]["registries"] = mirrors)
        .start()?;
    if !shares_the_hosts_kernel(&node) {
        node.cri()?.pull("registry.example/busybox:latest")?;
    }
    node.finish()
}

#[test]
fn over_https_with_a_private_certificate_authority() -> Result<()> {
    let address = "127.0.0.1:5003";
    let node = Node::builder().prepare()?;
    let _registry = node.start_registry(address, &Access::Tls)?;
    if shares_the_hosts_kernel(&node) {
        node.start_server()?;
        return node.finish();
    }
    // Trusted by nobody: refused.
    let name = format!("{address}/busybox:latest");
    let configure = |registries: serde_json::Value| {
        node.edit_config(|config| config["images"]["registries"] = registries)
    };
    configure(json!({ address: { "plain_http": false } }))?;
    node.start_server()?;
    refused(
        node.cri()?.pull(&name),
        Code::Unavailable,
        &[address, "certificate"],
    )?;
    node.stop_server()?;
    configure(
        json!({ address: { "ca_file": Registry::certificate_authority(&node.registry_dir()) } }),
    )?;
    node.start_server()?;
    node.cri()?.pull(&name)?;
    node.finish()
}

/// An image with one layer that takes a while.
fn large_image() -> Result<(Image, String)> {
    let mut noise = vec![0_u8; 8 << 20];
    let mut state = 1_u64;
    for byte in &mut noise {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 33) as u8;
    }
    let layer = LayerBuilder::default()
        .file("noise", 0o644, &noise)?
        .build(Compression::Gzip)?;
    let digest = layer.digest.clone();
    Ok((
        Image::new(
            vec![image::busybox_layer(Compression::Gzip)?, layer],
            busybox_config(),
        ),
        digest,
    ))
}

#[test]
fn an_interrupted_transfer_goes_on_where_it_stopped() -> Result<()> {
    let node = Node::start()?;
    let (image, digest) = large_image()?;
    node.registry()?.push("large", "latest", &image)?;
    let proxy = Proxy::start(&node.netns, "127.0.0.1:5004", registry::ADDRESS, None)?;
    let cut_after = 3 << 20;
    proxy.add_rule(&digest, Action::CutAfter(cut_after), 1);
    let name = format!("{}/large:latest", proxy.address);
    let cri = node.cri()?;
    // Whether one call tries again by itself or the caller asks again: what
    // has arrived is not fetched twice.
    if cri.pull(&name).is_err() {
        cri.pull(&name)?;
    }
    let ranges: Vec<_> = proxy
        .requests()
        .into_iter()
        .filter_map(|r| r.range.filter(|_| r.path.contains(&digest)))
        .collect();
    let resumed = |range: &String| {
        let start = range
            .trim_start_matches("bytes=")
            .split('-')
            .next()
            .and_then(|start| start.parse::<usize>().ok());
        start.is_some_and(|start| start > 0 && start <= cut_after)
    };
    ensure!(
        ranges.iter().any(resumed) || shares_the_hosts_kernel(&node),
        "ranges asked for: {ranges:?}"
    );
    node.finish()
}

#[test]
fn two_pulls_of_one_image_share_the_work() -> Result<()> {
    let node = Node::start()?;
    let (image, digest) = large_image()?;
    node.registry()?.push("large", "latest", &image)?;
    let proxy = Proxy::start(&node.netns, "127.0.0.1:5005", registry::ADDRESS, None)?;
    let name = format!("{}/large:latest", proxy.address);
    thread::scope(|scope| {
        let pulls: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| Ok(node.cri()?.pull(&name)?)))
            .collect();
        pulls.into_iter().try_for_each(|pull| {
            pull.join()
                .expect("thread")
                .map(drop)
                .map_err(|e: anyhow::Error| e)
        })
    })?;
    let fetched = proxy
        .requests()
        .iter()
        .filter(|r| r.method == "GET" && r.path.contains(&digest))
        .count();
    assert_eq!(fetched, 1, "the layer was fetched {fetched} times");
    node.finish()
}

#[test]
fn a_transfer_that_stalls_is_given_up() -> Result<()> {
    let node = Node::builder()
        .config(|config| config["images"]["no_progress_timeout_seconds"] = json!(1))
        .start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish();
    }
    let (image, digest) = large_image()?;
    node.registry()?.push("large", "latest", &image)?;
    let proxy = Proxy::start(&node.netns, "127.0.0.1:5006", registry::ADDRESS, None)?;
    proxy.add_rule(&digest, Action::StallAfter(1 << 20), usize::MAX);
    let name = format!("{}/large:latest", proxy.address);
    refused(node.cri()?.pull(&name), Code::DeadlineExceeded, &[&name])?;
    ensure!(node.cri()?.find_image(&name)?.is_none());
    node.finish()
}

#[test]
fn a_registry_that_recovers_is_asked_again() -> Result<()> {
    let node = Node::start()?;
    let proxy = Proxy::start(&node.netns, "127.0.0.1:5007", registry::ADDRESS, None)?;
    proxy.add_rule("/blobs/", Action::Fail(503), 1);
    let name = format!("{}/busybox:latest", proxy.address);
    if node.cri()?.pull(&name).is_err() {
        node.cri()?.pull(&name)?;
    }
    node.finish()
}
