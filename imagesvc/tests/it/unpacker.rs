//! The processes that unpack layers: what they hold, and what their death does.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imagesvc::{Error, ErrorKind, ImageService, PulledImage, Unpacker};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::task::JoinHandle;

use crate::support::{
    eventually, files,
    http::{Fault, Server, registry_reply},
    image::{Layer, Packing, TestImage},
    open, unpacker, unpackers,
};

const SIZE: usize = 1 << 20;
const HALF: usize = SIZE / 2;

/// A pull of which half has come, gone through both unpackers and reached the
/// disk; the rest comes when it is tried again.
struct HalfPulled {
    image: TestImage,
    server: Server,
    silent: Arc<AtomicBool>,
    root: tempfile::TempDir,
    service: ImageService,
    pull: JoinHandle<Result<PulledImage, Error>>,
}

impl HalfPulled {
    async fn new(seed: u64) -> Self {
        let image = TestImage::of_noise(SIZE, seed);
        let silent = Arc::new(AtomicBool::new(true));
        let server = {
            let (image, silent) = (image.clone(), Arc::clone(&silent));
            Server::start(move |request| {
                let reply = registry_reply(&image, request);
                let of_layer = request.is_for(image.layers[0].digest().as_str());
                if of_layer && silent.load(Ordering::SeqCst) {
                    return reply.after(HALF, Fault::Stall);
                }
                reply
            })
            .await
        };
        let root = tempfile::tempdir().unwrap();
        let service = open(root.path()).await;
        let pull = {
            let (service, name) = (service.clone(), format!("{}/app", server.host()));
            tokio::spawn(async move { service.pull(&name, None).await })
        };
        let tmp = root.path().join("tmp");
        eventually(&tmp, "an image has begun", || {
            let names = fs::read_dir(&tmp).unwrap();
            // Records go through this directory as well, and are small.
            let lengths = names.map(|name| fs::metadata(name.unwrap().path()));
            lengths.flatten().any(|file| file.len() > 64 << 10)
        })
        .await;
        Self {
            image,
            server,
            silent,
            root,
            service,
            pull,
        }
    }

    fn name(&self) -> String {
        format!("{}/app", self.server.host())
    }

    /// The processes at its layer, by task.
    fn unpackers(&self) -> BTreeMap<String, u32> {
        unpackers(self.image.layers[0].digest().as_str())
    }
}

fn link(path: PathBuf) -> String {
    fs::read_link(path).unwrap().to_str().unwrap().to_owned()
}

#[tokio::test]
async fn whoever_unpacks_a_layer_holds_nothing_but_it() {
    let half = HalfPulled::new(21).await;
    let found = half.unpackers();
    assert_eq!(found.keys().collect::<Vec<_>>(), ["decompress", "write"]);
    let tmp = files(&half.root.path().join("tmp"));
    for (task, id) in &found {
        let proc = PathBuf::from(format!("/proc/{id}"));
        holds_nothing(&proc);
        assert_eq!(
            files_of(&proc, half.root.path()),
            match task.as_str() {
                "decompress" => vec!["socket", "pipe", "pipe", "pipe", "pipe"],
                _ => vec!["socket", "pipe", "pipe", "pipe", tmp[0].as_str()],
            }
        );
    }
    half.pull.abort();
    assert!(half.pull.await.unwrap_err().is_cancelled());
    // The next one waits until they are gone.
    half.silent.store(false, Ordering::SeqCst);
    half.service
        .pull(&format!("{}/app", half.server.host()), None)
        .await
        .unwrap();
    let digest = half.image.layers[0].digest();
    assert_eq!(unpackers(digest.as_str()), BTreeMap::new());
}

/// No right, no namespace of the node's, no file system, little of anything.
fn holds_nothing(proc: &Path) {
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let id = unpacker().uid;
    for line in [
        "Seccomp:\t2".to_owned(),
        "Seccomp_filters:\t1".to_owned(),
        "NoNewPrivs:\t1".to_owned(),
        "CapInh:\t0000000000000000".to_owned(),
        "CapPrm:\t0000000000000000".to_owned(),
        "CapEff:\t0000000000000000".to_owned(),
        "CapBnd:\t0000000000000000".to_owned(),
        "CapAmb:\t0000000000000000".to_owned(),
        format!("Uid:\t{id}\t{id}\t{id}\t{id}"),
        format!("Gid:\t{id}\t{id}\t{id}\t{id}"),
        "Groups:\t ".to_owned(),
        "Threads:\t1".to_owned(),
    ] {
        assert!(status.lines().any(|l| l == line), "{line:?} in {status}");
    }
    let nspid = status.lines().find(|line| line.starts_with("NSpid:"));
    assert!(nspid.unwrap().ends_with("\t1"), "{nspid:?}");
    for namespace in ["pid", "mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |proc: &Path| link(proc.join("ns").join(namespace));
        assert_ne!(of(proc), of(Path::new("/proc/self")), "{namespace}");
    }
    let root = proc.join("root");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    assert_eq!(fs::metadata(&root).unwrap().mode() & 0o7777, 0o555);
    assert_eq!(link(proc.join("cwd")), "/");
    let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains("ro,nosuid,nodev,noexec"), "{mounts}");
    let routes = fs::read_to_string(proc.join("net/dev")).unwrap();
    assert_eq!(routes.lines().count(), 3, "more than loopback: {routes}");

    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    let limit = |name: &str| -> u64 {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let mut words = line[name.len()..].split_whitespace();
        let (soft, hard) = (words.next().unwrap(), words.next().unwrap());
        assert_eq!(soft, hard, "{line}");
        soft.parse().unwrap()
    };
    for none in ["Max open files", "Max processes", "Max core file size"] {
        assert_eq!(limit(none), 0);
    }
    assert!(limit("Max address space") < 2 << 30);
    assert!(limit("Max cpu time") < 24 * 3600);
    assert!(limit("Max file size") < 1 << 32);
    let score = fs::read_to_string(proc.join("oom_score_adj")).unwrap();
    assert_eq!(score.trim(), "500");
}

/// What a process has open, in order: files by their name below `root`/tmp.
fn files_of(proc: &Path, root: &Path) -> Vec<String> {
    let fds = fs::read_dir(proc.join("fd")).unwrap();
    let mut fds: Vec<u32> = fds
        .map(|fd| fd.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    fds.sort_unstable();
    let link_of = |fd: u32| {
        let target = link(proc.join("fd").join(fd.to_string()));
        let tmp = format!("{}/tmp/", root.display());
        let short = target.strip_prefix(&tmp).unwrap_or(&target);
        short.split(':').next().unwrap().to_owned()
    };
    fds.into_iter().map(link_of).collect()
}

#[tokio::test]
async fn an_unpacker_that_dies_fails_its_pull_and_nothing_else() {
    for (seed, task) in [(22, "decompress"), (23, "write")] {
        let half = HalfPulled::new(seed).await;
        let name = half.name();
        let found = half.unpackers();
        let id = i32::try_from(found[task]).unwrap();
        kill(Pid::from_raw(id), Signal::SIGKILL).unwrap();

        // Although the registry is silent.
        let error = half.pull.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
        let digest = half.image.layers[0].digest();
        let text = error.to_string();
        let cause = format!(
            "layer {digest}: it cannot be unpacked: its unpacker ({task}) was killed by signal 9 (SIGKILL)"
        );
        assert!(text.contains(&cause) && text.contains(&name), "{text}");
        assert_eq!(files(half.root.path()), [""; 0]);
        assert_eq!(unpackers(digest.as_str()), BTreeMap::new());

        half.silent.store(false, Ordering::SeqCst);
        half.service.pull(&name, None).await.unwrap();
        assert_eq!(files(half.root.path()).len(), 2, "a record and a layer");
    }
}

#[tokio::test]
async fn without_the_program_a_pull_names_it() {
    let image = TestImage::of_noise(1000, 24);
    let server = {
        let image = image.clone();
        Server::start(move |request| registry_reply(&image, request)).await
    };
    let root = tempfile::tempdir().unwrap();
    let unpacker = Unpacker {
        program: root.path().join("none"),
        ..unpacker()
    };
    let config = imagesvc::ImageServiceConfig::default();
    let service = ImageService::open(config, root.path(), unpacker, Arc::new(()))
        .await
        .unwrap();
    let error = service
        .pull(&format!("{}/app", server.host()), None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
    let cause = format!(
        "cannot start {}/none: No such file or directory",
        root.path().display()
    );
    assert!(error.to_string().contains(&cause), "{error}");
    assert_eq!(files(root.path()), [""; 0]);
}

/// An archive of `count` directories, each in the one before, `depth` deep.
fn nested(count: usize, depth: usize) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut left = count;
    let mut chain = 0;
    while left > 0 {
        let mut path = format!("{chain}");
        for _ in 0..depth.min(left) {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
            header.set_mode(0o755);
            // Longer ones would need a header more.
            header.set_path(&path).unwrap();
            header.set_cksum();
            archive.append(&header, &b""[..]).unwrap();
            path.push_str("/d");
        }
        left -= depth.min(left);
        chain += 1;
    }
    archive.into_inner().unwrap()
}

async fn pull(image: &TestImage) -> Result<PulledImage, Error> {
    let server = {
        let image = image.clone();
        Server::start(move |request| registry_reply(&image, request)).await
    };
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    service.pull(&format!("{}/app", server.host()), None).await
}

/// What takes most memory for what is counted.
#[tokio::test]
async fn a_layer_at_its_bounds_fits_in_an_unpackers_memory() {
    let limit = imagesvc::ImageServiceConfig::default().max_layer_entries;
    // The root is one too.
    let archive = nested(usize::try_from(limit).unwrap() - 1, 30);
    let layer = Layer::of_archive(Packing::Zstd, &archive);
    pull(&TestImage::new(vec![layer])).await.unwrap();
}

#[tokio::test]
async fn so_does_the_largest_window_of_zstd() {
    let mut layer = Layer::new(Packing::Zstd, &[("a", b"b")]);
    let archive = zstd::decode_all(&layer.bytes[..]).unwrap();
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(27).unwrap();
    encoder.write_all(&archive).unwrap();
    layer.bytes = encoder.finish().unwrap();
    pull(&TestImage::new(vec![layer])).await.unwrap();
}
