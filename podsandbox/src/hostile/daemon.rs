//! The daemon's side, in a process of its own: what it spends is read there.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use imagesvc::{ImageService, ImageServiceConfig, Unpacker};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};

use super::{HONEST, OF_HONEST, OF_HOSTILE, config};
use crate::network::{Exempt, Network, NetworkOptions};
use crate::observer::Observer;
use crate::record::ExitRecord;
use crate::{PodManager, faults};

const ROOT: &str = "DRUPE_TEST_ROOT";
const MILLIS: &str = "DRUPE_TEST_MILLIS";
/// The kubelet asks every ten seconds, and as patiently.
const RHYTHM: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Measured {
    /// How much more memory the daemon had at its largest than before it began.
    pub(super) memory: u64,
    /// CPU time.
    pub(super) cpu: Duration,
    /// Of records.
    pub(super) writes: u64,
    /// Whether the guest beside was asked with success each time, and its
    /// container's end was learnt.
    pub(super) is_honest_served: bool,
}

/// Runs [`daemon`] in a process of its own.
pub(super) fn run_daemon(root: &Path, time: Duration) -> Measured {
    let millis = time.as_millis().to_string();
    let mut command = this_test("hostile::daemon::daemon", root);
    let output = command.env(MILLIS, millis).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let measured = std::fs::read(root.join("measured")).unwrap();
    serde_json::from_slice(&measured).unwrap()
}

/// One of this program's tests that are no tests, on what is in `root`.
pub(super) fn this_test(name: &str, root: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture"]);
    command.env(ROOT, root);
    command
}

pub(super) fn root() -> PathBuf {
    std::env::var_os(ROOT).expect("a directory").into()
}

/// As the daemon's own program does it.
pub(super) fn end_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        faults::note_panic();
        std::process::abort();
    }));
}

pub(super) async fn open(root: &Path, observer: Arc<dyn Observer>) -> PodManager {
    let dir = root.join("images");
    // No image is pulled here.
    let unpacker = Unpacker {
        program: root.join("no-unpacker"),
        uid: 1,
        gid: 1,
        strict: true,
    };
    let images = ImageService::open(ImageServiceConfig::default(), &dir, unpacker, Arc::new(()));
    let network = Network::open(NetworkOptions {
        conf_dir: root.join("net.d"),
        bin_dirs: Vec::new(),
        record_dir: root.join("cni"),
        plugin_timeout: Duration::from_secs(1),
        source_check_exempt: Exempt::default(),
    });
    let (images, network) = (images.await.unwrap(), network.await.unwrap());
    PodManager::open(config(root), images, network, observer)
        .await
        .unwrap()
}

#[test]
#[ignore = "run by other tests as a process of its own"]
fn daemon() {
    let root = root();
    end_on_panic();
    let millis = std::env::var(MILLIS).unwrap().parse().unwrap();
    let time = Duration::from_millis(millis);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let measured = runtime.block_on(measure(&root, time));
    let measured = serde_json::to_vec(&measured).unwrap();
    std::fs::write(root.join("measured"), measured).unwrap();
    runtime.shutdown_background();
}

async fn measure(root: &Path, time: Duration) -> Measured {
    let (memory, cpu, begun) = (peak(), used(), Instant::now());
    let pods = open(root, Arc::new(())).await;
    let mut is_honest_served = true;
    // A probe, which the kubelet gives up after a second.
    let probed = pods.clone();
    let probe = tokio::spawn(async move {
        let patience = Some(Duration::from_secs(1));
        let _ = probed
            .exec_sync(OF_HOSTILE, vec!["probe".to_owned()], patience)
            .await;
    });
    while begun.elapsed() < time {
        let asked = pods.list().into_iter().map(|pod| {
            let pods = pods.clone();
            async move {
                let figures = pods.figures(&pod, PATIENCE).await;
                pod.pod.id != HONEST || figures.answered
            }
        });
        is_honest_served &= join_all(asked).await.into_iter().all(|served| served);
        tokio::time::sleep(RHYTHM).await;
    }
    probe.abort();
    let (_, container) = pods.container(OF_HONEST).unwrap();
    let created = container.created_at_nanos;
    let learnt = |exit: &ExitRecord| exit.code == 7 && exit.finished_at_nanos >= created;
    is_honest_served &= container.exit.as_ref().is_some_and(learnt);
    Measured {
        memory: peak() - memory,
        cpu: used() - cpu,
        writes: pods.record_writes(),
        is_honest_served,
    }
}

/// The most memory that this process ever had at once.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

fn used() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros.unsigned_abs())
}
