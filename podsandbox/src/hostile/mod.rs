//! Guests that do what no agent does, against the daemon's own code: a pod
//! manager with its drivers and agent clients, in a process of its own, in front
//! of a monitor and an agent that this process plays over real sockets. What the
//! daemon spends on them is measured there, and bounded here.

mod aborts;
mod agent;
mod daemon;
mod monitor;
mod scripts;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use self::agent::Guest;
use self::daemon::{Measured, run_daemon};
use self::monitor::Monitor;
use crate::config::Config;
use crate::confinement::{Confinement, Facilities};
use crate::context::now_nanos;
use crate::paths::PodPaths;
use crate::record::tests::{container, pod};
use crate::record::{ContainerPhase, ContainerRecord};
use crate::store::Store;

/// The pod whose guest is hostile, and one beside it.
const HOSTILE: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const HONEST: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
/// A container of each.
const OF_HOSTILE: &str = "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc";
const OF_HONEST: &str = "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd";

/// What one guest may have of the daemon's memory beyond what the daemon takes
/// anyway: windows and messages of its connections, answers that are decoded,
/// and the output of a command, of which the test asks for one.
const MEMORY: u64 = 64 << 20;
/// And of one of the node's CPUs: 8 MiB or 16,000 frames a second are handled, which
/// takes 30 % alone and up to twice that on a busy node.
const CPU_PERCENT: u64 = 80;
/// For each container: who it runs as, with its process and its start, and its
/// end. None of these holds anything that would have to be freed.
const WRITES: u64 = 2;

/// Root of a daemon with both pods on record.
struct Node {
    _dir: TempDir,
    root: PathBuf,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let config = config(&root);
        std::fs::create_dir_all(&config.root).unwrap();
        let store = Store::open(&config.root.join("state.redb")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        for (id, of, name) in [
            (HOSTILE, OF_HOSTILE, "hostile"),
            (HONEST, OF_HONEST, "honest"),
        ] {
            std::fs::create_dir_all(PodPaths::new(&config, id).dir).unwrap();
            runtime.block_on(async {
                store.put_pod(&pod(id, name)).await.unwrap();
                let record = ContainerRecord {
                    // The clock was set back by an hour since.
                    created_at_nanos: now_nanos() + 3600 * 1_000_000_000,
                    ..container(of, id, ContainerPhase::Running)
                };
                store.put_container(&record).await.unwrap();
            });
        }
        Self { _dir: dir, root }
    }

    fn paths(&self, pod: &str) -> PodPaths {
        PodPaths::new(&config(&self.root), pod)
    }
}

fn config(root: &Path) -> Config {
    Config {
        root: root.join("lib"),
        run_dir: root.join("run"),
        netns_dir: root.join("netns"),
        vmm: root.join("vmm"),
        shim: root.join("shim"),
        uid_base: 1,
        confinement: Confinement::default(),
        facilities: Facilities::whole(),
        cdi_spec_dirs: Vec::new(),
        default_runtime: "microvm".to_owned(),
        runtimes: BTreeMap::new(),
    }
}

/// A daemon serves `guest` for so long, and an honest one beside it.
fn serve(guest: Guest, time: Duration) -> Measured {
    let node = Node::new();
    let _monitors = [HOSTILE, HONEST].map(|id| Monitor::listen(&node.paths(id).control));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    guest.listen(&node.paths(HOSTILE).vsock);
    Guest::honest(OF_HONEST, time / 4).listen(&node.paths(HONEST).vsock);
    run_daemon(&node.root, time)
}

fn check(guest: &Guest, time: Duration) {
    let measured = serve(guest.clone(), time);
    println!("{measured:?} {guest:?}");
    let most = time * u32::try_from(CPU_PERCENT).unwrap() / 100;
    assert!(measured.memory < MEMORY, "{measured:?} {guest:?}");
    assert!(measured.cpu < most, "{measured:?} {guest:?}");
    // Those of the honest one's container are the same.
    assert!(measured.writes <= 2 * WRITES, "{measured:?} {guest:?}");
    assert!(measured.is_honest_served, "{measured:?} {guest:?}");
}
