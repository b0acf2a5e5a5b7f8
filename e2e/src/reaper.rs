//! What init does on a machine: takes in processes whose parent was killed,
//! and reaps them. Without it the pods that outlive a killed daemon would end
//! as zombies of whatever runs the tests.

use std::fs;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::cgroup::Cgroup;

/// A node whose orphans are reaped, and its own child that is waited for
/// elsewhere.
struct Watched {
    cgroup: Arc<Cgroup>,
    own_children: Vec<u32>,
}

static WATCHED: OnceLock<Mutex<Vec<Watched>>> = OnceLock::new();

/// Reaps the orphans of `cgroup` from now on.
pub fn watch(cgroup: &Arc<Cgroup>) -> Result<()> {
    let mut result = Ok(());
    let watched = WATCHED.get_or_init(|| {
        result = start();
        Mutex::default()
    });
    result?;
    let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
    watched.push(Watched {
        cgroup: cgroup.clone(),
        own_children: Vec::new(),
    });
    Ok(())
}

/// Runs `spawn`, whose child its caller waits for by itself.
pub fn spawn_own(
    cgroup: &Arc<Cgroup>,
    spawn: impl FnOnce() -> Result<std::process::Child>,
) -> Result<std::process::Child> {
    // Held across the spawn, so that a child that ends at once is known by
    // the time the reaper looks.
    let watched = WATCHED.get().context("the cgroup is not watched yet")?;
    let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
    let node = watched
        .iter_mut()
        .find(|node| Arc::ptr_eq(&node.cgroup, cgroup));
    let node = node.context("the cgroup is not watched")?;
    let child = spawn()?;
    node.own_children.push(child.id());
    Ok(child)
}

pub fn forget(cgroup: &Arc<Cgroup>) {
    if let Some(watched) = WATCHED.get() {
        let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.retain(|node| !Arc::ptr_eq(&node.cgroup, cgroup));
    }
}

fn start() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context("become a child subreaper")?;
    let tokio = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a tokio runtime")?;
    // The kernel sends it for those, too, that were zombies before they became
    // this process's.
    let mut ended = {
        let _inside = tokio.enter();
        signal(SignalKind::child()).context("listen to SIGCHLD")?
    };
    thread::spawn(move || {
        tokio.block_on(async {
            while ended.recv().await.is_some() {
                reap();
            }
        });
    });
    Ok(())
}

/// Reaps all that there are: many signals may arrive as one.
fn reap() {
    let Some(watched) = WATCHED.get() else {
        return;
    };
    let watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
    if watched.is_empty() {
        return;
    }
    for pid in zombie_children() {
        let membership = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let orphan = watched
            .iter()
            .any(|node| node.cgroup.holds(&membership) && !node.own_children.contains(&pid));
        if orphan && let Ok(pid) = i32::try_from(pid) {
            // Gone already is as good as reaped.
            let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        }
    }
}

fn zombie_children() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let own = std::process::id().to_string();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            // "pid (comm) state ppid ..."; comm may hold spaces and brackets.
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let mut fields = stat
                .rsplit_once(')')
                .map_or("", |(_, rest)| rest)
                .split_whitespace();
            fields.next() == Some("Z") && fields.next() == Some(&own)
        })
        .collect()
}
