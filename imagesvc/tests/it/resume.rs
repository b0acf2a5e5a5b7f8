//! Pulls that are cut, stopped or killed, and pulls at the same time.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use imagesvc::ErrorKind;

use crate::support::{
    eventually, files,
    http::{Fault, Reply, Request, Server, registry_reply},
    image::TestImage,
    open,
};

const SIZE: usize = 1 << 20;
/// Where the connection is cut.
const HALF: usize = SIZE / 2;

/// Make the test's executable, run again, the daemon that is killed.
const CHILD_ROOT: &str = "IMAGESVC_TEST_CHILD_ROOT";
const CHILD_IMAGE: &str = "IMAGESVC_TEST_CHILD_IMAGE";

fn is_layer(image: &TestImage, request: &Request) -> bool {
    request.is_for(image.layers[0].digest().as_str())
}

/// A registry whose layer stops in the middle while `faulty`.
async fn faulty_server(image: &TestImage, fault: Fault) -> (Server, Arc<AtomicBool>) {
    let faulty = Arc::new(AtomicBool::new(true));
    let server = {
        let (image, faulty) = (image.clone(), Arc::clone(&faulty));
        Server::start(move |request| {
            let reply = registry_reply(&image, request);
            if is_layer(&image, request) && faulty.load(Ordering::SeqCst) {
                // What comes in all, over all tries, is half of the layer.
                let missing = HALF.saturating_sub(image.layers[0].bytes.len() - reply.body.len());
                return reply.after(missing, fault);
            }
            reply
        })
        .await
    };
    (server, faulty)
}

fn layer_requests(server: &Server, image: &TestImage) -> Vec<Request> {
    server.requests(image.layers[0].digest().as_str())
}

fn partial(root: &Path, image: &TestImage) -> PathBuf {
    let name = image.layers[0].digest().to_string().replace(':', "-");
    root.join("ingest").join(name)
}

async fn until_half_is_here(root: &Path, image: &TestImage) {
    let partial = partial(root, image);
    eventually(partial.parent().unwrap(), "half of the layer", || {
        std::fs::metadata(&partial).is_ok_and(|m| m.len() >= HALF as u64)
    })
    .await;
}

#[tokio::test]
async fn a_pull_that_was_cut_goes_on_where_it_was() {
    let image = TestImage::of_noise(SIZE, 1);
    let (server, faulty) = faulty_server(&image, Fault::Cut).await;
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let name = format!("{}/app", server.host());

    let error = service.pull(&name, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&format!("cut {HALF} bytes into blob sha256:")),
        "{text}"
    );
    assert!(text.contains(&server.host()), "{text}");
    assert!(service.list(None).is_empty());
    let tries = layer_requests(&server, &image).len();
    assert!(tries > 1, "the pull itself tried again");

    faulty.store(false, Ordering::SeqCst);
    service.pull(&name, None).await.unwrap();
    let requests = layer_requests(&server, &image);
    assert_eq!(requests.len(), tries + 1);
    assert_eq!(requests[0].header("range"), None);
    let range = format!("bytes={HALF}-");
    assert_eq!(requests[tries].header("range"), Some(range.as_str()));
    assert_eq!(files(root.path()).len(), 2, "a record and a layer");
}

#[tokio::test]
async fn a_registry_without_ranges_sends_the_beginning_again() {
    let image = TestImage::of_noise(SIZE, 2);
    let first = AtomicBool::new(true);
    let server = {
        let image = image.clone();
        Server::start(move |request| {
            let mut plain = request.clone();
            plain.headers.remove("range");
            let reply = registry_reply(&image, &plain);
            if is_layer(&image, request) && first.swap(false, Ordering::SeqCst) {
                return reply.after(HALF, Fault::Cut);
            }
            reply
        })
        .await
    };
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    service
        .pull(&format!("{}/app", server.host()), None)
        .await
        .unwrap();
    let requests = layer_requests(&server, &image);
    assert_eq!(requests.len(), 2);
    assert!(requests[1].header("range").is_some());
}

#[tokio::test]
async fn bytes_that_rotted_on_disk_are_fetched_anew() {
    let image = TestImage::of_noise(SIZE, 3);
    let (server, faulty) = faulty_server(&image, Fault::Cut).await;
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let name = format!("{}/app", server.host());
    service.pull(&name, None).await.unwrap_err();
    faulty.store(false, Ordering::SeqCst);

    let path = partial(root.path(), &image);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[HALF / 2..].fill(0);
    std::fs::write(&path, bytes).unwrap();

    service.pull(&name, None).await.unwrap();
    let requests = layer_requests(&server, &image);
    let last = &requests[requests.len() - 2..];
    assert!(last[0].header("range").is_some());
    assert!(last[1].header("range").is_none());
}

#[tokio::test]
async fn pulls_at_the_same_time_fetch_each_blob_once() {
    let image = TestImage::of_noise(SIZE, 4);
    let server = {
        let image = image.clone();
        Server::start(move |request| registry_reply(&image, request)).await
    };
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let name = format!("{}/app", server.host());
    let by_digest = format!("{name}@{}", image.digest());
    let (a, b, c) = tokio::join!(
        service.pull(&name, None),
        service.pull(&name, None),
        // Another image reference with the same layer.
        service.pull(&by_digest, None),
    );
    for pulled in [a, b, c] {
        assert_eq!(pulled.unwrap().id, image.id());
    }
    assert_eq!(layer_requests(&server, &image).len(), 1);
    assert_eq!(server.requests("/manifests/latest").len(), 1);
    // Nothing but the tag's digest is asked for once the image is here.
    let before = server.requests("").len();
    service.pull(&name, None).await.unwrap();
    let requests = server.requests("");
    assert_eq!(requests.len(), before + 1);
    assert_eq!(requests[before].method, "HEAD");
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_the_other_its_pull() {
    let image = TestImage::of_noise(SIZE, 5);
    let go = Arc::new(AtomicBool::new(false));
    let server = {
        let (image, go) = (image.clone(), Arc::clone(&go));
        Server::start(move |request| {
            // Silent in the middle, so that the pull is under way for a while.
            let reply = registry_reply(&image, request);
            if is_layer(&image, request) && !go.load(Ordering::SeqCst) {
                return reply.after(HALF, Fault::Stall);
            }
            reply
        })
        .await
    };
    let root = tempfile::tempdir().unwrap();
    let config = imagesvc::ImageServiceConfig {
        no_progress_timeout_seconds: 2,
        ..imagesvc::ImageServiceConfig::default()
    };
    let service = crate::support::open_with(config, root.path()).await;
    let name = format!("{}/app", server.host());
    let spawn = || {
        let (service, name) = (service.clone(), name.clone());
        tokio::spawn(async move { service.pull(&name, None).await })
    };
    let (first, second) = (spawn(), spawn());
    until_half_is_here(root.path(), &image).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    // The second one's pull is still the same: it ends by the time-out.
    let error = second.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error}");
    assert_eq!(layer_requests(&server, &image).len(), 1);
    go.store(true, Ordering::SeqCst);
    service.pull(&name, None).await.unwrap();
    assert!(layer_requests(&server, &image)[1].header("range").is_some());
}

#[tokio::test]
async fn an_aborted_pull_leaves_nothing_visible_and_is_taken_up() {
    let image = TestImage::of_noise(SIZE, 6);
    let (server, faulty) = faulty_server(&image, Fault::Stall).await;
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let name = format!("{}/app", server.host());
    let pull = {
        let (service, name) = (service.clone(), name.clone());
        tokio::spawn(async move { service.pull(&name, None).await })
    };
    until_half_is_here(root.path(), &image).await;
    pull.abort();
    assert!(pull.await.unwrap_err().is_cancelled());
    assert!(service.list(None).is_empty());
    assert!(service.status(&name).is_none());
    let tmp = root.path().join("tmp");
    eventually(&tmp, "no temporary file", || files(&tmp).is_empty()).await;
    assert!(files(&root.path().join("layers")).is_empty());

    faulty.store(false, Ordering::SeqCst);
    service.pull(&name, None).await.unwrap();
    let requests = layer_requests(&server, &image);
    assert_eq!(requests.len(), 2);
    let range = format!("bytes={HALF}-");
    assert_eq!(requests[1].header("range"), Some(range.as_str()));
}

/// What the daemon of [`a_killed_daemons_pull_is_taken_up`] does.
async fn pull_until_killed(root: &Path, name: &str) {
    let result = open(root).await.pull(name, None).await;
    panic!("the pull ended: {result:?}");
}

#[tokio::test]
async fn a_killed_daemons_pull_is_taken_up() {
    if let (Some(root), Ok(name)) = (std::env::var_os(CHILD_ROOT), std::env::var(CHILD_IMAGE)) {
        return pull_until_killed(Path::new(&root), &name).await;
    }
    let image = TestImage::of_noise(SIZE, 7);
    let (server, faulty) = faulty_server(&image, Fault::Stall).await;
    let root = tempfile::tempdir().unwrap();
    let name = format!("{}/app", server.host());
    // There before the daemon makes it, to be watched.
    std::fs::create_dir(root.path().join("ingest")).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "resume::a_killed_daemons_pull_is_taken_up"])
        .env(CHILD_ROOT, root.path())
        .env(CHILD_IMAGE, &name)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until_half_is_here(root.path(), &image).await;
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(files(&root.path().join("tmp")).len(), 1);

    faulty.store(false, Ordering::SeqCst);
    let service = open(root.path()).await;
    assert!(service.list(None).is_empty());
    assert!(files(&root.path().join("tmp")).is_empty());
    service.pull(&name, None).await.unwrap();
    let requests = layer_requests(&server, &image);
    let range = format!("bytes={HALF}-");
    assert_eq!(
        requests.last().unwrap().header("range"),
        Some(range.as_str())
    );
    assert_eq!(files(root.path()).len(), 2, "a record and a layer");
}

#[tokio::test]
async fn layers_that_came_before_a_failure_are_not_fetched_again() {
    let small = TestImage::of_noise(1000, 8).layers.remove(0);
    let large = TestImage::of_noise(SIZE, 9).layers.remove(0);
    let image = TestImage::new(vec![small.clone(), large.clone()]);
    let (small, large) = (small.digest(), large.digest());
    let failures = AtomicU32::new(0);
    let server = {
        let (image, large) = (image.clone(), large.clone());
        Server::start(move |request| {
            if request.is_for(large.as_str()) && failures.fetch_add(1, Ordering::SeqCst) < 4 {
                return Reply::status(503).body("<html>");
            }
            registry_reply(&image, request)
        })
        .await
    };
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let name = format!("{}/app", server.host());
    let error = service.pull(&name, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("503"), "{error}");
    assert!(service.list(None).is_empty());
    service.pull(&name, None).await.unwrap();
    assert_eq!(server.requests(small.as_str()).len(), 1);
    assert_eq!(server.requests(large.as_str()).len(), 5);
}
