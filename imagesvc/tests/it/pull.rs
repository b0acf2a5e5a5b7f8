//! Pulling from Debian's docker-registry.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use imagesvc::{
    ErrorKind, ImageService, ImageServiceConfig, Observer, PullOutcome, RegistryConfig,
};

use crate::support::{
    closed_port, files,
    image::{DOCKER_MANIFEST, Layer, OCI_INDEX, Packing, TestImage, host_arch, index, noise},
    open, open_with,
    registry::{Registry, push, push_manifest},
    unpacker, with_registry,
};

/// One layer of each kind of compression.
fn three_layers() -> TestImage {
    TestImage::new(vec![
        Layer::new(Packing::Gzip, &[("bin/sh", b"#!"), ("etc/passwd", b"root")]),
        Layer::new(Packing::Zstd, &[("data", &noise(300_000, 1))]),
        Layer::new(Packing::Plain, &[("etc/.wh.passwd", b"")]),
    ])
}

#[tokio::test]
async fn an_image_is_pulled_by_tag_found_by_every_name_leased_and_removed() {
    let (storage, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(storage.path(), "", "").await;
    let image = three_layers();
    let host = registry.host();
    push(&host, "library/app", "1.0", &image).await;
    let service = open(root.path()).await;
    let empty = service.fs_info().await.unwrap();

    let name = format!("{host}/library/app");
    let pulled = service.pull(&format!("{name}:1.0"), None).await.unwrap();
    assert_eq!(pulled.id, image.id());

    let listed = service.list(None);
    assert_eq!(listed.len(), 1);
    let found = &listed[0];
    assert_eq!(found.repo_tags, [format!("{name}:1.0")]);
    assert_eq!(found.repo_digests, [format!("{name}@{}", image.digest())]);
    assert_eq!((found.uid, found.username.as_str()), (Some(1000), ""));
    assert_eq!(found.layers.len(), 3);
    assert_eq!(found.layers[1].diff_id, image.layers[1].diff_id.to_string());
    assert!(!found.pinned);

    let id = image.id();
    let digest_name = format!("{name}@{}", image.digest());
    let hex = id.strip_prefix("sha256:").unwrap();
    for query in [
        &format!("{name}:1.0"),
        &digest_name,
        &id,
        hex,
        &id[..20],
        &hex[..12],
    ] {
        let found = service.status(query).unwrap_or_else(|| panic!("{query}"));
        assert_eq!(found.id, id);
        assert_eq!(service.list(Some(query)).len(), 1);
    }
    for query in [name.as_str(), &hex[..5], "sha256:", "", "UPPER CASE"] {
        assert!(service.status(query).is_none(), "{query}");
    }

    let lease = service.lease(&id, "container-1").await.unwrap();
    assert_eq!(lease.layers.len(), 3);
    let mut size = 0;
    for layer in &lease.layers {
        let bytes = std::fs::read(&layer.path).unwrap();
        assert_eq!(bytes.len() as u64, layer.len);
        assert_eq!(layer.len % 4096, 0);
        // EROFS_SUPER_MAGIC_V1 at EROFS_SUPER_OFFSET.
        assert_eq!(bytes[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
        size += layer.len;
    }
    assert!(found.size >= size && found.size < size + 100_000);
    let command = lease.config.config().as_ref().unwrap().cmd().clone();
    assert_eq!(command, Some(vec!["/bin/sh".to_owned()]));

    let used = service.fs_info().await.unwrap();
    assert!(used.used_bytes >= empty.used_bytes + size);
    // Three layers, a record of the image, one of the lease.
    assert_eq!(used.inodes_used, empty.inodes_used + 5);

    service.release("container-1").await.unwrap();
    service.remove(&id).await.unwrap();
    service.remove(&id).await.unwrap();
    assert!(service.list(None).is_empty());
    assert_eq!(files(root.path()), [""; 0]);
    let after = service.fs_info().await.unwrap();
    assert_eq!(
        (after.used_bytes, after.inodes_used),
        (empty.used_bytes, empty.inodes_used)
    );
}

/// What an observer was told.
#[derive(Debug, Default)]
struct Told {
    outcomes: Mutex<Vec<PullOutcome>>,
    bytes: AtomicU64,
}

impl Observer for Told {
    fn pull_ended(&self, outcome: PullOutcome) {
        self.outcomes.lock().unwrap().push(outcome);
    }

    fn layer_bytes(&self, count: u64) {
        self.bytes.fetch_add(count, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn an_observer_is_told_what_came_of_pulls_and_what_came_over_the_wire() {
    let (storage, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(storage.path(), "", "").await;
    let image = three_layers();
    let host = registry.host();
    push(&host, "app", "1.0", &image).await;
    let told = Arc::new(Told::default());
    let config = ImageServiceConfig::default();
    let service = ImageService::open(config, root.path(), unpacker(), told.clone());
    let service = service.await.unwrap();

    let name = format!("{host}/app:1.0");
    service.pull(&name, None).await.unwrap();
    let sizes = image.layers.iter().map(|layer| layer.bytes.len() as u64);
    let size = sizes.sum::<u64>();
    assert_eq!(told.bytes.load(Ordering::Relaxed), size);
    service.pull(&name, None).await.unwrap();
    let missing = service.pull(&format!("{host}/app:none"), None).await;
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(
        *told.outcomes.lock().unwrap(),
        [
            PullOutcome::Pulled,
            PullOutcome::UpToDate,
            PullOutcome::Failed(ErrorKind::NotFound)
        ]
    );
    assert_eq!(told.bytes.load(Ordering::Relaxed), size);
}

#[tokio::test]
async fn a_digest_is_pulled_with_and_without_a_tag_beside_it() {
    let (storage, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(storage.path(), "", "").await;
    let layer = Layer::new(Packing::Gzip, &[("a", b"b")]);
    let diff_id = layer.diff_id.to_string();
    let image = TestImage::with(vec![layer], vec![diff_id], host_arch(), DOCKER_MANIFEST);
    push(&registry.host(), "app", "old", &image).await;
    let service = open(root.path()).await;

    let name = format!("{}/app", registry.host());
    for reference in [
        format!("{name}@{}", image.digest()),
        format!("{name}:gone@{}", image.digest()),
    ] {
        let pulled = service.pull(&reference, None).await.unwrap();
        assert_eq!(pulled.id, image.id());
        let found = service.status(&pulled.id).unwrap();
        assert!(found.repo_tags.is_empty());
        assert_eq!(found.repo_digests, [format!("{name}@{}", image.digest())]);
        assert_eq!(service.status(&reference).unwrap().id, image.id());
    }
    service
        .remove(&format!("{name}@{}", image.digest()))
        .await
        .unwrap();
    assert_eq!(files(root.path()), [""; 0]);
}

#[tokio::test]
async fn an_index_leads_to_this_nodes_platform() {
    let (storage, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(storage.path(), "", "").await;
    let host = registry.host();
    let image_for = |architecture, content: &[u8]| {
        let layer = Layer::new(Packing::Gzip, &[("arch", content)]);
        let diff_ids = vec![layer.diff_id.to_string()];
        TestImage::with(
            vec![layer],
            diff_ids,
            architecture,
            crate::support::image::OCI_MANIFEST,
        )
    };
    let other = if host_arch() == "amd64" {
        "arm64"
    } else {
        "amd64"
    };
    let (mine, theirs) = (image_for(host_arch(), b"mine"), image_for(other, b"theirs"));
    push(&host, "multi", "mine", &mine).await;
    push(&host, "multi", "theirs", &theirs).await;
    let both = index(&[(&theirs, other, None), (&mine, host_arch(), None)]);
    push_manifest(&host, "multi", "both", OCI_INDEX, &both).await;
    let foreign = index(&[(&theirs, other, Some("v8"))]);
    push_manifest(&host, "multi", "foreign", OCI_INDEX, &foreign).await;
    let service = open(root.path()).await;

    let name = format!("{host}/multi");
    let pulled = service.pull(&format!("{name}:both"), None).await.unwrap();
    assert_eq!(pulled.id, mine.id());
    let digest = imagesvc::Digest::of(&both);
    let found = service.status(&format!("{name}:both")).unwrap();
    assert_eq!(found.repo_digests, [format!("{name}@{digest}")]);

    for tag in ["foreign", "theirs"] {
        let error = service
            .pull(&format!("{name}:{tag}"), None)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(
            error.to_string().contains(&format!("linux/{other}")),
            "{error}"
        );
    }
    assert_eq!(service.list(None).len(), 1);
}

#[tokio::test]
async fn a_mirror_stands_in_for_a_registry_and_the_registry_for_a_mirror_that_is_down() {
    let (storage, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(storage.path(), "", "").await;
    let image = three_layers();
    push(&registry.host(), "library/busybox", "latest", &image).await;

    let mut config = with_registry(
        "docker.io",
        RegistryConfig {
            mirrors: vec![format!("http://{}", registry.host())],
            ..RegistryConfig::default()
        },
    );
    config.registries.insert(
        registry.host(),
        RegistryConfig {
            mirrors: vec![format!("http://127.0.0.1:{}", closed_port())],
            ..RegistryConfig::default()
        },
    );
    config.pinned.push("busybox".into());
    let service = open_with(config, root.path()).await;

    let pulled = service.pull("busybox", None).await.unwrap();
    assert_eq!(pulled.id, image.id());
    let found = service.status("busybox").unwrap();
    assert_eq!(found.repo_tags, ["docker.io/library/busybox:latest"]);
    assert!(found.pinned);

    let direct = format!("{}/library/busybox", registry.host());
    service.pull(&direct, None).await.unwrap();
    assert_eq!(service.status("busybox").unwrap().repo_tags.len(), 2);
}

#[tokio::test]
async fn what_cannot_be_pulled_says_why() {
    let (storage, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(storage.path(), "", "").await;
    push(&registry.host(), "app", "latest", &three_layers()).await;
    let service = open(root.path()).await;
    let dead = format!("127.0.0.1:{}/app", closed_port());
    let host = registry.host();
    for (reference, kind, part) in [
        (
            format!("{host}/app:gone"),
            ErrorKind::NotFound,
            "manifest gone",
        ),
        (format!("{host}/nothing"), ErrorKind::NotFound, "nothing"),
        (dead.clone(), ErrorKind::Unavailable, "refused"),
        (
            "registry.invalid/app".to_owned(),
            ErrorKind::Unavailable,
            "registry registry.invalid cannot be reached",
        ),
        ("a b".to_owned(), ErrorKind::InvalidArgument, "\"a b\""),
    ] {
        let error = service.pull(&reference, None).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let text = error.to_string();
        assert!(text.contains(part) && text.contains(&reference), "{text}");
    }
    let error = service.lease("nothing", "owner").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(files(root.path()), [""; 0]);
}
