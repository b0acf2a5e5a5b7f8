//! What stays, what goes, and what a restart finds.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};

use imagesvc::ErrorKind;

use crate::support::{
    files,
    http::{Reply, Server, registry_reply},
    image::{Layer, Packing, TestImage},
    open, unpacker,
};

/// A registry with an image under each repository name.
struct Shelf {
    server: Server,
    images: Arc<Mutex<BTreeMap<String, TestImage>>>,
}

impl Shelf {
    async fn new() -> Self {
        let images = Arc::new(Mutex::new(BTreeMap::<String, TestImage>::new()));
        let server = {
            let images = Arc::clone(&images);
            Server::start(move |request| {
                let repository = request.path.split('/').nth(2).unwrap_or_default();
                match images.lock().unwrap().get(repository) {
                    Some(image) => registry_reply(image, request),
                    None => Reply::status(404),
                }
            })
            .await
        };
        Self { server, images }
    }

    /// The full name.
    fn put(&self, repository: &str, image: &TestImage) -> String {
        let mut images = self.images.lock().unwrap();
        images.insert(repository.to_owned(), image.clone());
        format!("{}/{repository}", self.server.host())
    }
}

fn layer(content: &[u8]) -> Layer {
    Layer::new(Packing::Gzip, &[("file", content)])
}

fn layer_files(root: &Path) -> usize {
    files(&root.join("layers")).len()
}

#[tokio::test]
async fn layers_are_shared_and_go_with_their_last_user() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let base = layer(b"base");
    let a = shelf.put("a", &TestImage::new(vec![base.clone(), layer(b"a")]));
    let b = shelf.put("b", &TestImage::new(vec![base.clone(), layer(b"b")]));
    service.pull(&a, None).await.unwrap();
    service.pull(&b, None).await.unwrap();
    assert_eq!(shelf.server.requests(base.digest().as_str()).len(), 1);
    assert_eq!(layer_files(root.path()), 3);

    service.remove(&a).await.unwrap();
    assert_eq!(layer_files(root.path()), 2);
    service.remove(&b).await.unwrap();
    assert_eq!(files(root.path()), [""; 0]);
}

#[tokio::test]
async fn a_tag_moves_and_the_old_image_stays_by_its_digest() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let (old, new) = (
        TestImage::new(vec![layer(b"old")]),
        TestImage::new(vec![layer(b"new")]),
    );
    let name = shelf.put("app", &old);
    let service = open(root.path()).await;
    service.pull(&name, None).await.unwrap();
    shelf.put("app", &new);
    assert_eq!(service.pull(&name, None).await.unwrap().id, new.id());

    let check = |service: &imagesvc::ImageService| {
        assert_eq!(service.status(&name).unwrap().id, new.id());
        let found = service.status(&old.id()).unwrap();
        assert!(found.repo_tags.is_empty());
        assert_eq!(found.repo_digests, [format!("{name}@{}", old.digest())]);
    };
    check(&service);
    drop(service);
    let service = open(root.path()).await;
    check(&service);

    // Removing by id takes every name along.
    service.remove(&new.id()).await.unwrap();
    assert!(service.status(&name).is_none());
    assert_eq!(service.list(None).len(), 1);
}

#[tokio::test]
async fn one_of_two_tags_is_removed_alone() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let image = TestImage::new(vec![layer(b"x")]);
    let (one, two) = (shelf.put("one", &image), shelf.put("two", &image));
    let service = open(root.path()).await;
    service.pull(&one, None).await.unwrap();
    service.pull(&two, None).await.unwrap();
    assert_eq!(service.list(None)[0].repo_tags.len(), 2);
    service.remove(&one).await.unwrap();
    assert!(service.status(&one).is_none());
    assert_eq!(
        service.status(&two).unwrap().repo_tags,
        [format!("{two}:latest")]
    );
    service.remove(&two).await.unwrap();
    assert_eq!(files(root.path()), [""; 0]);
}

#[tokio::test]
async fn a_lease_keeps_the_layers_of_a_removed_image_over_a_restart() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let image = TestImage::new(vec![layer(b"low"), layer(b"high")]);
    let name = shelf.put("app", &image);
    let service = open(root.path()).await;
    service.pull(&name, None).await.unwrap();
    let owner = "pod/x: any\ntext";
    let lease = service.lease(&name, owner).await.unwrap();
    assert_eq!(lease.image.id, image.id());
    service.lease(&name, owner).await.unwrap();

    service.remove(&image.id()).await.unwrap();
    assert!(service.list(None).is_empty());
    assert_eq!(layer_files(root.path()), 2);
    drop(service);

    let service = open(root.path()).await;
    assert_eq!(service.leases(), [(owner.to_owned(), image.id())]);
    assert!(lease.layers.iter().all(|layer| layer.path.exists()));
    service.release(owner).await.unwrap();
    service.release(owner).await.unwrap();
    assert!(service.leases().is_empty());
    assert_eq!(files(root.path()), [""; 0]);
}

#[tokio::test]
async fn layers_below_an_opaque_root_are_not_stacked() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let opaque = Layer::new(Packing::Gzip, &[(".wh..wh..opq", b""), ("new", b"")]);
    let layers = vec![layer(b"hidden"), opaque, layer(b"top")];
    let name = shelf.put("app", &TestImage::new(layers));
    let service = open(root.path()).await;
    service.pull(&name, None).await.unwrap();
    let lease = service.lease(&name, "owner").await.unwrap();
    assert_eq!(lease.image.layers.len(), 3);
    assert_eq!(lease.layers.len(), 2);
    drop(service);
    let service = open(root.path()).await;
    let again = service.lease(&name, "owner").await.unwrap();
    assert_eq!(again.layers, lease.layers);
}

/// `tmp`, sticky, with a file in it.
fn sticky_layer() -> Layer {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o1777);
    header.set_size(0);
    archive
        .append_data(&mut header, "tmp", std::io::empty())
        .unwrap();
    Layer::of_archive(Packing::Gzip, &archive.into_inner().unwrap())
}

fn directory_files(root: &Path) -> Vec<String> {
    let mut found = files(&root.join("layers"));
    found.retain(|name| name.ends_with(".directories.erofs"));
    found
}

#[tokio::test]
async fn directories_that_a_layer_only_implies_are_restored_by_one_more() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let inside = Layer::new(Packing::Gzip, &[("tmp/x", b"x")]);
    let image = TestImage::new(vec![sticky_layer(), inside.clone()]);
    let reversed = TestImage::new(vec![inside, sticky_layer()]);
    let name = shelf.put("app", &image);
    let needs_none = shelf.put("reversed", &reversed);
    service.pull(&name, None).await.unwrap();
    service.pull(&needs_none, None).await.unwrap();
    let lease = service.lease(&needs_none, "other").await.unwrap();
    assert_eq!(lease.layers.len(), 2);
    let [restored] = &directory_files(root.path())[..] else {
        panic!("{:?}", files(root.path()));
    };

    let lease = service.lease(&name, "owner").await.unwrap();
    assert_eq!(lease.image.layers.len(), 2);
    let [_, _, top] = &lease.layers[..] else {
        panic!("{:?}", lease.layers);
    };
    assert_eq!(top.path, root.path().join("layers").join(restored));
    let bytes = std::fs::read(&top.path).unwrap();
    assert_eq!(bytes.len() as u64, top.len);
    let layers: u64 = lease.image.layers.iter().map(|l| l.size).sum();
    assert!(lease.image.size > layers + top.len);

    // It stays for the lease, over a restart, and goes with it.
    service.remove(&image.id()).await.unwrap();
    drop(service);
    let service = open(root.path()).await;
    assert_eq!(std::fs::read(&top.path).unwrap(), bytes);
    service.release("owner").await.unwrap();
    assert!(directory_files(root.path()).is_empty());

    // The same layers, the same bytes.
    service.pull(&name, None).await.unwrap();
    assert_eq!(std::fs::read(&top.path).unwrap(), bytes);
    drop(service);
    // Without it the image is not whole.
    std::fs::remove_file(&top.path).unwrap();
    let service = open(root.path()).await;
    assert!(service.status(&name).is_none());
    service.pull(&name, None).await.unwrap();
    assert_eq!(std::fs::read(&top.path).unwrap(), bytes);
}

#[tokio::test]
async fn layers_of_another_format_are_removed_and_pulled_again() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let image = TestImage::new(vec![sticky_layer(), layer(b"x")]);
    let name = shelf.put("app", &image);
    let service = open(root.path()).await;
    service.pull(&name, None).await.unwrap();
    service.lease(&name, "owner").await.unwrap();
    drop(service);
    // As the first format left them: other directory, shorter record.
    let layers = root.path().join("layers");
    std::fs::rename(layers.join("v2"), layers.join("sha256")).unwrap();
    let hex = image.id().trim_start_matches("sha256:").to_owned();
    let path = root.path().join(format!("images/{hex}.json"));
    let record = std::fs::read_to_string(&path).unwrap();
    let older = record.replace(",\"directories_len\":null", "");
    assert_ne!(older, record);
    std::fs::write(&path, older).unwrap();

    let service = open(root.path()).await;
    assert!(service.list(None).is_empty());
    assert!(!layers.join("sha256").exists());
    assert_eq!(service.leases().len(), 1);
    service.release("owner").await.unwrap();
    service.pull(&name, None).await.unwrap();
    assert_eq!(service.lease(&name, "owner").await.unwrap().layers.len(), 2);
}

#[tokio::test]
async fn an_image_without_layers_is_an_image() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let name = shelf.put("empty", &TestImage::new(Vec::new()));
    let service = open(root.path()).await;
    service.pull(&name, None).await.unwrap();
    assert!(service.status(&name).unwrap().size > 0);
    assert!(
        service
            .lease(&name, "owner")
            .await
            .unwrap()
            .layers
            .is_empty()
    );
}

#[tokio::test]
async fn a_restart_puts_in_order_what_is_broken() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let whole = TestImage::new(vec![layer(b"whole")]);
    let torn = TestImage::new(vec![layer(b"torn"), layer(b"second")]);
    let cut = TestImage::new(vec![layer(b"cut")]);
    let service = open(root.path()).await;
    for (name, image) in [("whole", &whole), ("torn", &torn), ("cut", &cut)] {
        service.pull(&shelf.put(name, image), None).await.unwrap();
    }
    drop(service);

    let path = |name: &str| root.path().join(name);
    let layer_path = |image: &TestImage| {
        let diff_id = image.layers[0].diff_id.hex().to_owned();
        path(&format!("layers/v2/{diff_id}.erofs"))
    };
    std::fs::remove_file(layer_path(&torn)).unwrap();
    std::fs::write(layer_path(&cut), "short").unwrap();
    std::fs::write(path("images/garbage.json"), "{").unwrap();
    std::fs::write(path("leases/garbage.json"), "").unwrap();
    std::fs::write(path("pulls/garbage.json"), "[]").unwrap();
    std::fs::write(path("tmp/left"), "x").unwrap();
    std::fs::write(path("ingest/sha256-0"), "x").unwrap();
    std::fs::write(path("layers/v2/stray"), "x").unwrap();

    let service = open(root.path()).await;
    let ids: Vec<_> = service.list(None).into_iter().map(|i| i.id).collect();
    assert_eq!(ids, [whole.id()]);
    assert_eq!(files(root.path()).len(), 2, "{:?}", files(root.path()));
    // What was dropped can be pulled again.
    service.pull(&shelf.put("torn", &torn), None).await.unwrap();
}

#[tokio::test]
async fn a_name_written_to_two_images_by_a_crash_is_the_newer_ones() {
    let shelf = Shelf::new().await;
    let root = tempfile::tempdir().unwrap();
    let (old, new) = (
        TestImage::new(vec![layer(b"old")]),
        TestImage::new(vec![layer(b"new")]),
    );
    let name = shelf.put("app", &old);
    let service = open(root.path()).await;
    service.pull(&name, None).await.unwrap();
    let hex = old.id().trim_start_matches("sha256:").to_owned();
    let record = root.path().join(format!("images/{hex}.json"));
    let before = std::fs::read(&record).unwrap();
    shelf.put("app", &new);
    service.pull(&name, None).await.unwrap();
    drop(service);
    std::fs::write(&record, before).unwrap();

    let service = open(root.path()).await;
    assert_eq!(service.status(&name).unwrap().id, new.id());
    assert!(service.status(&old.id()).unwrap().repo_tags.is_empty());
}

#[tokio::test]
async fn a_store_has_one_owner() {
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let config = imagesvc::ImageServiceConfig::default();
    let again = || {
        let (config, observer) = (config.clone(), Arc::new(()));
        imagesvc::ImageService::open(config, root.path(), unpacker(), observer)
    };
    let error = match again().await {
        Err(error) => error,
        Ok(_) => panic!("opened twice"),
    };
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert!(error.to_string().contains("in use"), "{error}");
    drop(service);
    again().await.unwrap();
}
