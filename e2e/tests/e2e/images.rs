//! What is in an image arrives in the container, whatever its format.

use std::thread;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::image::{self, Format, Image, busybox_config};
use e2e::layer::{Compression, LayerBuilder};
use e2e::node::BUSYBOX;
use e2e::{Container, Node};
use tar::EntryType;

use crate::{shares_the_hosts_kernel, with_node};

/// Pushes `image`, pulls it and starts a container of it.
fn container_of(node: &Node, name: &str, image: &Image) -> Result<Container> {
    node.registry()?.push(name, "latest", image)?;
    let reference = format!("127.0.0.1:5000/{name}:latest");
    node.cri()?
        .pull(&reference)
        .with_context(|| format!("pull {reference}"))?;
    let pod = node.run_pod(name)?;
    let mut config = pod.container_config("c", e2e::pod::IDLE);
    config.image.get_or_insert_default().image = reference;
    pod.start_with(config)
}

#[test]
fn layers_may_be_plain_gzip_or_zstd_in_oci_and_docker_images() -> Result<()> {
    with_node(|node| {
        for (name, compression, format) in [
            ("plain", Compression::Plain, Format::Oci),
            ("gzip", Compression::Gzip, Format::Oci),
            ("zstd", Compression::Zstd, Format::Oci),
            ("docker", Compression::Gzip, Format::DockerSchema2),
        ] {
            let layers = vec![
                image::busybox_layer(compression)?,
                image::accounts_layer(compression)?,
            ];
            let image = Image::new(layers, busybox_config()).format(format);
            let container = container_of(node, name, &image)?;
            assert_eq!(
                container.exec(&["cat", "/home/alice/greeting"])?,
                "hello from alice",
                "{name}"
            );
        }
        Ok(())
    })
}

#[test]
fn upper_layers_hide_and_replace_what_is_below() -> Result<()> {
    with_node(|node| {
        let lower = LayerBuilder::default()
            .dir("d", 0o755)?
            .file("d/removed", 0o644, b"x")?
            .file("d/replaced", 0o644, b"old")?
            .file("d/kept", 0o644, b"kept")?
            .dir("opaque", 0o755)?
            .file("opaque/below", 0o644, b"x")?
            .dir("opaque/sub", 0o755)?
            .dir("gone", 0o755)?
            .file("gone/inside", 0o644, b"x")?
            .file("file-to-dir", 0o644, b"x")?
            .dir("dir-to-file", 0o755)?
            .build(Compression::Gzip)?;
        let upper = LayerBuilder::default()
            .file("d/.wh.removed", 0o644, b"")?
            .file("d/replaced", 0o600, b"new")?
            .dir("opaque", 0o700)?
            .file("opaque/.wh..wh..opq", 0o644, b"")?
            .file("opaque/above", 0o644, b"above")?
            .file(".wh.gone", 0o644, b"")?
            .file(".wh.file-to-dir", 0o644, b"")?
            .dir("file-to-dir", 0o755)?
            .file("file-to-dir/inside", 0o644, b"x")?
            .file(".wh.dir-to-file", 0o644, b"")?
            .file("dir-to-file", 0o644, b"now a file")?
            .build(Compression::Zstd)?;
        let base = image::busybox_layer(Compression::Gzip)?;
        let container = container_of(
            node,
            "whiteouts",
            &Image::new(vec![base, lower, upper], busybox_config()),
        )?;
        assert_eq!(container.exec(&["ls", "-A", "/d"])?, "kept\nreplaced");
        assert_eq!(container.exec(&["cat", "/d/replaced"])?, "new");
        assert_eq!(
            container.exec(&["stat", "-c", "%a", "/d/replaced", "/opaque"])?,
            "600\n700"
        );
        assert_eq!(container.exec(&["ls", "-A", "/opaque"])?, "above");
        assert_eq!(
            container.exec(&["cat", "/file-to-dir/inside", "/dir-to-file"])?,
            "xnow a file"
        );
        container.exec(&["test", "!", "-e", "/gone"]).map(drop)
    })
}

#[test]
fn a_directory_that_a_layer_does_not_describe_stays_what_it_was() -> Result<()> {
    with_node(|node| {
        let lower = LayerBuilder::default()
            .dir("shared", 0o1777)?
            .file("shared/low", 0o644, b"low")?
            .dir("opaque", 0o750)?
            .file("opaque/below", 0o644, b"x")?
            .build(Compression::Gzip)?;
        let upper = LayerBuilder::default()
            .file("tmp/x", 0o644, b"x")?
            .file("shared/high", 0o644, b"high")?
            .file("opaque/.wh..wh..opq", 0o644, b"")?
            .file("new/dir/x", 0o644, b"")?
            .build(Compression::Zstd)?;
        let base = image::busybox_layer(Compression::Gzip)?;
        let image = Image::new(vec![base, lower, upper], busybox_config());
        let container = container_of(node, "implied", &image)?;
        assert_eq!(
            container.exec(&["stat", "-c", "%a", "/tmp", "/shared", "/opaque"])?,
            "1777\n1777\n750"
        );
        assert_eq!(
            container.exec(&["stat", "-c", "%a", "/new", "/new/dir"])?,
            "755\n755"
        );
        assert_eq!(container.exec(&["ls", "-A", "/shared"])?, "high\nlow");
        assert_eq!(container.exec(&["cat", "/tmp/x", "/shared/low"])?, "xlow");
        assert_eq!(container.exec(&["ls", "-A", "/opaque"])?, "");
        // Once changed, it is the container's own.
        container.exec(&["sh", "-c", "touch /tmp/mine && chmod 700 /shared"])?;
        assert_eq!(
            container.exec(&["stat", "-c", "%a", "/tmp", "/shared"])?,
            "1777\n700"
        );
        Ok(())
    })
}

/// `cap_net_bind_service=ep` as the kernel keeps it (VFS_CAP_REVISION_2 with
/// the effective bit; permitted and inheritable of either half).
const CAP_NET_BIND_SERVICE: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

#[test]
fn links_devices_attributes_and_odd_names_are_kept() -> Result<()> {
    with_node(|node| {
        let long = "n".repeat(200);
        let deep = "deep/".repeat(40);
        let layer = LayerBuilder::default()
            .file("first", 0o4755, b"linked")?
            .hardlink("second", "first", 0o4755)?
            .symlink("sym", "/first")?
            .symlink("dangling", "../../nowhere")?
            .char_device("null-device", 1, 3)?
            .raw(b"fifo", EntryType::Fifo, b"")?
            .file_with_xattr(
                "capable/grep",
                &std::fs::read("/bin/busybox").context("busybox-static")?,
                "security.capability",
                CAP_NET_BIND_SERVICE,
            )?
            .file(&long, 0o644, b"long")?
            .file(&format!("{deep}file"), 0o644, b"deep")?
            .file("sp ace\n\"'\\\u{e9}\u{1f352}", 0o644, b"odd")?
            .owned_file("owned", 0o640, 1_000_000, b"x")?
            .build(Compression::Gzip)?;
        let base = image::busybox_layer(Compression::Gzip)?;
        let container = container_of(
            node,
            "odd",
            &Image::new(vec![base, layer], busybox_config()),
        )?;
        assert_eq!(
            container.exec(&["stat", "-c", "%a %h", "/first", "/second"])?,
            "4755 2\n4755 2"
        );
        assert_eq!(container.exec(&["cat", "/second", "/sym"])?, "linkedlinked");
        assert_eq!(container.exec(&["readlink", "/dangling"])?, "../../nowhere");
        assert_eq!(
            container.exec(&["stat", "-c", "%F %t %T", "/null-device"])?,
            "character special file 1 3"
        );
        assert_eq!(container.exec(&["stat", "-c", "%F", "/fifo"])?, "fifo");
        assert_eq!(
            container.exec(&["cat", &format!("/{long}"), &format!("/{deep}file")])?,
            "longdeep"
        );
        assert_eq!(
            container.exec(&["cat", "/sp ace\n\"'\\\u{e9}\u{1f352}"])?,
            "odd"
        );
        assert_eq!(
            container.exec(&["stat", "-c", "%u:%g %a", "/owned"])?,
            "1000000:1000000 640"
        );
        // What the attribute is for: a capability without being root.
        let pod = node.run_pod("capable")?;
        let script = ["/capable/grep", "CapEff", "/proc/self/status"];
        let mut config = pod.container_config("c", &script);
        config.image.get_or_insert_default().image = "127.0.0.1:5000/odd:latest".to_owned();
        e2e::pod::security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
        let capable = pod.start_with(config)?;
        capable.wait_exit()?;
        assert_eq!(capable.output()?, "CapEff:\t0000000000000400\n");
        Ok(())
    })
}

#[test]
fn a_huge_file_arrives_whole() -> Result<()> {
    with_node(|node| {
        // Zeros with marks: compresses well, and a shifted block is noticed.
        let mut data = vec![0_u8; 300 << 20];
        for (n, block) in data.chunks_mut(1 << 20).enumerate() {
            block[..8].copy_from_slice(&(n as u64).to_le_bytes());
        }
        let sum = e2e::layer::digest(&data).replace("sha256:", "");
        let layer = LayerBuilder::default()
            .file("huge", 0o644, &data)?
            .build(Compression::Zstd)?;
        drop(data);
        let base = image::busybox_layer(Compression::Gzip)?;
        let container = container_of(
            node,
            "huge",
            &Image::new(vec![base, layer], busybox_config()),
        )?;
        let printed = container.exec(&["sha256sum", "/huge"])?;
        ensure!(printed.starts_with(&sum), "{printed}");
        Ok(())
    })
}

#[test]
fn an_image_of_very_many_files_and_layers_works() -> Result<()> {
    with_node(|node| {
        let mut layers = vec![image::busybox_layer(Compression::Gzip)?];
        let mut many = LayerBuilder::default();
        for n in 0..20_000 {
            many = many.file(
                &format!("many/{}/{n}", n % 7),
                0o644,
                n.to_string().as_bytes(),
            )?;
        }
        layers.push(many.build(Compression::Gzip)?);
        for n in 0..30 {
            layers.push(
                LayerBuilder::default()
                    .file(&format!("layer-{n}"), 0o644, b"x")?
                    .build(Compression::Gzip)?,
            );
        }
        let container = container_of(node, "many", &Image::new(layers, busybox_config()))?;
        assert_eq!(
            container.exec(&[
                "sh",
                "-c",
                "find /many -type f | wc -l; ls -d /layer-* | wc -l"
            ])?,
            "20000\n30"
        );
        assert_eq!(container.exec(&["cat", "/many/6/19998"])?, "19998");
        Ok(())
    })
}

#[test]
fn an_image_is_known_by_id_tag_and_digest() -> Result<()> {
    with_node(|node| {
        let cri = node.cri()?;
        let image = image::busybox()?;
        let found = cri
            .find_image(BUSYBOX)?
            .context("the pulled image is not known")?;
        assert_eq!(found.id, image.id());
        assert_eq!(found.repo_tags, [BUSYBOX]);
        let by_digest = format!("127.0.0.1:5000/busybox@{}", image.manifest().digest());
        assert_eq!(found.repo_digests, [by_digest.as_str()]);
        ensure!(found.size > 500_000, "size {}", found.size);
        for name in [found.id.as_str(), &by_digest, BUSYBOX] {
            ensure!(cri.find_image(name)?.is_some(), "{name} is not found");
        }
        ensure!(cri.find_image("127.0.0.1:5000/busybox:other")?.is_none());
        let request = ImageStatusRequest {
            image: Some(e2e::cri::image_spec(BUSYBOX)),
            verbose: true,
        };
        let info = cri.image_status(request)?.info;
        ensure!(
            info.values().any(|value| value.contains("FROM_IMAGE=yes")),
            "{info:?}"
        );
        ensure!(
            node.crictl_ok(&["images"])?
                .contains("127.0.0.1:5000/busybox")
        );
        Ok(())
    })
}

#[test]
fn removed_images_free_their_disk_space() -> Result<()> {
    let node = Node::start()?;
    if shares_the_hosts_kernel(&node) {
        return node.finish(); // containerd looks at its disk every ten seconds only.
    }
    let cri = node.cri()?;
    let before = cri.image_bytes()?;
    node.pull_busybox()?;
    let with_image = cri.image_bytes()?;
    ensure!(
        with_image > before + 500_000,
        "{before} bytes before, {with_image} with the image"
    );
    // A second image that shares a layer and adds one.
    let mut second = image::busybox()?;
    second.layers.push(
        LayerBuilder::default()
            .file("more", 0o644, &[7; 300_000])?
            .build(Compression::Plain)?,
    );
    node.registry()?.push("second", "latest", &second)?;
    cri.pull("127.0.0.1:5000/second:latest")?;

    let grown = cri.image_bytes()? - with_image;
    ensure!(
        (300_000..600_000).contains(&grown),
        "a shared layer was stored twice: {grown} bytes more"
    );
    cri.remove(BUSYBOX)?;
    ensure!(cri.find_image(BUSYBOX)?.is_none());
    let pod = node.run_pod("after")?;
    let mut config = pod.container_config("c", &["true"]);
    config.image.get_or_insert_default().image = "127.0.0.1:5000/second:latest".to_owned();
    assert_eq!(pod.start_with(config)?.wait_exit()?.exit_code, 0);
    pod.remove()?;
    cri.remove("127.0.0.1:5000/second:latest")?;
    cri.remove("127.0.0.1:5000/second:latest")
        .context("a second removal")?;
    ensure!(
        cri.list_images(ListImagesRequest::default())?
            .images
            .is_empty()
    );
    let left = cri.image_bytes()?;
    ensure!(
        left < before + 100_000,
        "{left} bytes are left of {with_image}; {before} before any pull"
    );
    node.finish()
}

#[test]
fn an_image_that_a_container_uses_keeps_working_when_it_is_removed() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("using")?.start_idle("c")?;
        // The kubelet does not do this; crictl users do.
        let removed = node.cri()?.remove(BUSYBOX);
        assert_eq!(
            container.exec(&["cat", "/home/alice/greeting"])?,
            "hello from alice"
        );
        if removed.is_ok() {
            node.pull_busybox()?;
        }
        node.run_pod("next")?
            .start_idle("c")?
            .exec(&["true"])
            .map(drop)
    })
}

#[test]
fn images_are_filtered_by_name() -> Result<()> {
    with_node(|node| {
        node.registry()?.push("other", "v1", &image::busybox()?)?;
        let mut different = image::busybox()?;
        different.config["Env"] = serde_json::json!(["OTHER=1"]);
        node.registry()?.push("different", "v1", &different)?;
        let cri = node.cri()?;
        cri.pull("127.0.0.1:5000/different:v1")?;
        if shares_the_hosts_kernel(node) {
            return Ok(()); // containerd lists every image.
        }
        let filter = ImageFilter {
            image: Some(e2e::cri::image_spec("127.0.0.1:5000/different:v1")),
        };
        let found = cri
            .list_images(ListImagesRequest {
                filter: Some(filter),
            })?
            .images;
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].repo_tags, ["127.0.0.1:5000/different:v1"]);
        Ok(())
    })
}

#[test]
fn two_tags_of_one_image_are_one_image() -> Result<()> {
    with_node(|node| {
        let registry = node.registry()?;
        registry.push("busybox", "v2", &image::busybox()?)?;
        let cri = node.cri()?;
        let id = cri.pull("127.0.0.1:5000/busybox:v2")?;
        let image = cri.find_image(&id)?.context("image")?;
        let mut tags = image.repo_tags.clone();
        tags.sort();
        assert_eq!(tags, [BUSYBOX, "127.0.0.1:5000/busybox:v2"]);
        // A tag that moved names the new image only.
        let mut newer = image::busybox()?;
        newer.config["Env"] = serde_json::json!(["NEWER=1"]);
        registry.push("busybox", "v2", &newer)?;
        let new_id = cri.pull("127.0.0.1:5000/busybox:v2")?;
        ensure!(new_id != id, "the old image again");
        assert_eq!(
            cri.find_image(&id)?.context("old image")?.repo_tags,
            [BUSYBOX]
        );
        Ok(())
    })
}

#[test]
fn two_pulls_at_once_both_succeed() -> Result<()> {
    let node = Node::start()?;
    thread::scope(|scope| {
        let pulls: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| node.pull_busybox()))
            .collect();
        pulls
            .into_iter()
            .try_for_each(|pull| pull.join().expect("thread"))
    })?;
    node.finish()
}
