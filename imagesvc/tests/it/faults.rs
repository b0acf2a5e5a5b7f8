//! Registries and content that cannot be trusted, and a full disk.

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use imagesvc::{Error, ErrorKind, ImageServiceConfig};

use crate::support::{
    files,
    http::{Fault, Reply, Request, Server, registry_reply},
    image::{Layer, OCI_MANIFEST, Packing, TestImage, host_arch, noise},
    open, open_with,
    registry::run,
};

/// Pulls `image` from a registry that answers as `handler` says; `None` is
/// what it should answer.
async fn pull_from(
    config: ImageServiceConfig,
    root: &Path,
    image: &TestImage,
    handler: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
) -> (Result<imagesvc::PulledImage, Error>, Server) {
    let server = {
        let image = image.clone();
        Server::start(move |request| {
            handler(request).unwrap_or_else(|| registry_reply(&image, request))
        })
        .await
    };
    let service = open_with(config, root).await;
    let result = service.pull(&format!("{}/app", server.host()), None).await;
    if let Err(error) = &result {
        assert!(service.list(None).is_empty());
        // Whatever it is, the sentence says what and from where.
        let image = format!("{}/app:latest", server.host());
        assert!(error.to_string().contains(&image), "{error}");
    }
    (result, server)
}

/// A pull that must fail for good and leave nothing.
async fn failure(
    config: ImageServiceConfig,
    image: &TestImage,
    handler: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
) -> Error {
    let root = tempfile::tempdir().unwrap();
    let (result, _server) = pull_from(config, root.path(), image, handler).await;
    assert_eq!(files(root.path()), [""; 0]);
    result.unwrap_err()
}

fn blob_reply(part: String, bytes: Vec<u8>) -> impl Fn(&Request) -> Option<Reply> {
    move |request| {
        request
            .is_for(&part)
            .then(|| Reply::status(200).body(bytes.clone()))
    }
}

#[tokio::test]
async fn a_corrupt_layer_is_refused_and_leaves_nothing() {
    let good = Layer::new(Packing::Gzip, &[("a", b"b")]);
    let bad = Layer::new(Packing::Plain, &[("data", &noise(500_000, 1))]);
    let image = TestImage::new(vec![good, bad]);
    let digest = image.layers[1].digest();
    let path = format!("/blobs/{digest}");

    // A flipped bit in a file: only the digest tells.
    let mut flipped = image.layers[1].bytes.clone();
    flipped[250_000] ^= 1;
    let error = failure(
        ImageServiceConfig::default(),
        &image,
        blob_reply(path.clone(), flipped),
    );
    let error = error.await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains(digest.as_str()), "{error}");

    let longer = [&image.layers[1].bytes[..], b"more"].concat();
    let error = failure(
        ImageServiceConfig::default(),
        &image,
        blob_reply(path.clone(), longer),
    );
    let error = error.await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");

    let garbage = noise(image.layers[1].bytes.len(), 2);
    let error = failure(
        ImageServiceConfig::default(),
        &image,
        blob_reply(path, garbage),
    )
    .await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[tokio::test]
async fn a_corrupt_manifest_or_configuration_is_refused() {
    let image = TestImage::of_noise(1000, 3);
    let config_path = format!("/blobs/{}", image.id());
    let mut config = image.config.clone();
    config[10] ^= 1;
    let error = failure(
        ImageServiceConfig::default(),
        &image,
        blob_reply(config_path, config),
    );
    let error = error.await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");

    let (announced, mut manifest) = (image.digest(), image.manifest.clone());
    manifest.push(b' ');
    let error = failure(ImageServiceConfig::default(), &image, move |request| {
        request.is_for("/manifests/").then(|| {
            Reply::status(200)
                .with("docker-content-digest", announced.clone())
                .body(manifest.clone())
        })
    });
    let error = error.await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");

    let error = failure(ImageServiceConfig::default(), &image, |request| {
        let endless = || Reply::status(200).body(vec![b' '; (4 << 20) + 1]);
        request.is_for("/manifests/").then(endless)
    });
    let error = error.await;
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
}

#[tokio::test]
async fn a_layer_that_is_not_what_the_configuration_says_is_refused() {
    let layer = Layer::new(Packing::Gzip, &[("a", b"b")]);
    let other = Layer::new(Packing::Gzip, &[("a", b"c")]);
    let diff_ids = vec![other.diff_id.to_string()];
    let image = TestImage::with(vec![layer.clone()], diff_ids, host_arch(), OCI_MANIFEST);
    let error = failure(ImageServiceConfig::default(), &image, |_| None).await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let text = error.to_string();
    assert!(text.contains(other.diff_id.as_str()), "{text}");
    assert!(text.contains(layer.diff_id.as_str()), "{text}");

    let image = TestImage::with(vec![layer], Vec::new(), host_arch(), OCI_MANIFEST);
    let error = failure(ImageServiceConfig::default(), &image, |_| None).await;
    assert!(
        error
            .to_string()
            .contains("describes 0 layers and the manifest 1"),
        "{error}"
    );
}

#[tokio::test]
async fn layers_with_bad_content_or_beyond_the_bounds_are_refused() {
    let config = || ImageServiceConfig {
        max_layer_bytes: 2 << 20,
        max_layer_entries: 10,
        ..ImageServiceConfig::default()
    };
    // 16 MiB of zeros in some 16 KiB.
    let bomb = Layer::new(Packing::Gzip, &[("zeros", &vec![0; 16 << 20])]);
    assert!(bomb.bytes.len() < 1 << 20);
    let names: Vec<String> = (0..50).map(|i| i.to_string()).collect();
    let many: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
    let mut escaping = tar::Header::new_ustar();
    escaping.set_size(0);
    escaping.set_mode(0o644);
    escaping.as_old_mut().name[..9].copy_from_slice(b"../escape");
    escaping.set_cksum();
    let escaping = [&escaping.as_bytes()[..], &[0; 1024]].concat();
    for (layer, kind, part) in [
        (bomb, ErrorKind::ResourceExhausted, "larger than"),
        (
            Layer::new(Packing::Zstd, &many),
            ErrorKind::ResourceExhausted,
            "10 entries",
        ),
        (
            Layer::of_archive(Packing::Gzip, &escaping),
            ErrorKind::Corrupt,
            "../escape",
        ),
        (
            Layer::of_archive(Packing::Plain, &noise(4096, 4)),
            ErrorKind::Corrupt,
            "header",
        ),
    ] {
        let digest = layer.digest();
        let error = failure(config(), &TestImage::new(vec![layer]), |_| None).await;
        let text = error.to_string();
        assert_eq!(error.kind(), kind, "{text}");
        assert!(
            text.contains(part) && text.contains(digest.as_str()),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_registry_that_falls_silent_is_given_up() {
    let image = TestImage::of_noise(1 << 20, 5);
    let digest = image.layers[0].digest();
    for stalled in ["/manifests/".to_owned(), format!("/blobs/{digest}")] {
        let root = tempfile::tempdir().unwrap();
        let config = ImageServiceConfig {
            no_progress_timeout_seconds: 1,
            ..ImageServiceConfig::default()
        };
        let begun = Instant::now();
        let blob = image.layers[0].bytes.clone();
        let (result, server) = pull_from(config, root.path(), &image, move |request| {
            let stall = || {
                Reply::status(200)
                    .body(blob.clone())
                    .after(1000, Fault::Stall)
            };
            request.is_for(&stalled).then(stall)
        })
        .await;
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error}");
        let text = error.to_string();
        assert!(
            text.contains(&server.host()) && text.contains("nothing for 1 s"),
            "{text}"
        );
        if text.contains("blob") {
            assert!(
                text.contains(&format!("1000 bytes into blob {digest}")),
                "{text}"
            );
        }
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test]
async fn a_busy_registry_is_asked_again() {
    let image = TestImage::of_noise(1000, 6);
    let (manifests, blobs) = (AtomicU32::new(0), AtomicU32::new(0));
    let root = tempfile::tempdir().unwrap();
    let config = ImageServiceConfig::default();
    let (result, server) = pull_from(config, root.path(), &image, move |request| {
        if request.is_for("/manifests/") && manifests.fetch_add(1, Ordering::SeqCst) < 2 {
            return Some(Reply::status(429).with("retry-after", "0"));
        }
        let busy = request.is_for("/blobs/") && blobs.fetch_add(1, Ordering::SeqCst) < 2;
        busy.then(|| Reply::status(503))
    })
    .await;
    result.unwrap();
    assert_eq!(server.requests("/manifests/").len(), 3);
    assert_eq!(server.requests("/blobs/").len(), 4);

    let patience = failure(ImageServiceConfig::default(), &image, |_| {
        Some(
            Reply::status(429)
                .with("retry-after", "3600")
                .body(r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"rate limit reached"}]}"#),
        )
    });
    let error = patience.await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(
        error.to_string().contains("429: rate limit reached"),
        "{error}"
    );
}

#[tokio::test]
async fn images_that_drupe_does_not_run_are_named_as_such() {
    let image = TestImage::of_noise(10, 7);
    let with = |from: &str, to: &str| {
        let text = String::from_utf8(image.manifest.clone()).unwrap();
        let changed = text.replace(from, to).into_bytes();
        move |request: &Request| {
            let reply = || Reply::status(200).body(changed.clone());
            request.is_for("/manifests/").then(reply)
        }
    };
    for (from, to, part) in [
        (
            "layer.v1.tar+gzip",
            "layer.nondistributable.v1.tar+gzip",
            "foreign",
        ),
        ("\"schemaVersion\":2", "\"schemaVersion\":1", "schema 1"),
        ("image.config.v1", "helm.config.v1", "helm"),
    ] {
        let error = failure(ImageServiceConfig::default(), &image, with(from, to)).await;
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// A file system of its own, unmounted when dropped.
struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={size}"), "none", path],
        );
        Self { dir }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run("umount", &["-l", self.dir.path().to_str().unwrap()]);
    }
}

#[tokio::test]
async fn a_full_disk_is_named_leaves_nothing_and_images_can_be_removed() {
    let disk = SmallDisk::new("2m");
    let root = disk.dir.path();
    let fits = TestImage::of_noise(300_000, 8);
    let config = ImageServiceConfig::default();
    let (result, _server) = pull_from(config.clone(), root, &fits, |_| None).await;
    result.unwrap();
    let before = files(root);
    assert_eq!(before.len(), 2);

    let large = TestImage::of_noise(4 << 20, 9);
    let server = {
        let image = large.clone();
        Server::start(move |request| registry_reply(&image, request)).await
    };
    let service = open(root).await;
    let name = format!("{}/app", server.host());
    let error = service.pull(&name, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("No space left") && text.contains(&name),
        "{text}"
    );
    assert_eq!(files(root), before);

    // Not a block is left, and yet the image goes.
    let filler = root.join("filler");
    std::fs::write(&filler, vec![1; 4 << 20]).unwrap_err();
    let error = service.pull(&name, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    service.remove(&fits.id()).await.unwrap();
    std::fs::remove_file(filler).unwrap();
    assert_eq!(files(root), [""; 0]);
}
