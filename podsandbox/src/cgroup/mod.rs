//! The host's control group of a pod's VMM, below the one the kubelet made for
//! the pod, so that limits, eviction and statistics see what the pod costs.
//! Both hierarchies are served: v2, and v1 with one mount a controller.
//!
//! The machine boots in a group beside the pod's ([`make_for_boot`]) and joins
//! the pod's own when its guest serves ([`join`]): a boot takes more CPU time
//! than a small pod's limit has for it, and the memory that it took stays
//! charged there, so that all of the pod's limit is its containers'.
//!
//! A pod on the host's kernel has its supervisor in a group below its own, and
//! beside it one for each container, which the OCI runtime makes, in every
//! hierarchy that there is.

mod charge;
mod limits;

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_client::Confinement;

use crate::{Error, Result};
pub use charge::{Charge, charge, proportional_bytes};
pub use limits::{Limits, lacking_controllers};

/// A killed process leaves its group once the kernel has freed its memory.
const EMPTY_WITHIN: Duration = Duration::from_secs(5);
const EMPTY_POLL: Duration = Duration::from_millis(5);
const ROOT: &str = "/sys/fs/cgroup";
/// Of v2, from Linux 5.14 on.
const KILL: &str = "cgroup.kill";
/// Below a pod's group; no container has this name.
const SUPERVISOR: &str = "supervisor";
/// Where the VMMs of pods without a `cgroup_parent` are charged.
pub const OWN_PARENT: &str = "/drupe";
/// Another daemon may be removing a parent that is ours together.
const MAKE_TRIES: u32 = 5;
/// Each takes along all but what was born while it ran.
const MOVE_ROUNDS: u32 = 100;
/// v1 hierarchies that account or limit; a cpuset would need to be filled in
/// before it takes a process.
const V1_CONTROLLERS: [&str; 6] = ["memory", "cpu", "cpuacct", "pids", "blkio", "devices"];
const V2_CONTROLLERS: [&str; 4] = ["memory", "cpu", "pids", "io"];

/// Makes the group below `parent` in every hierarchy, and returns the files
/// that take its process.
pub fn make(parent: &Path, id: &str) -> Result<Vec<PathBuf>> {
    make_all(&dirs_of(&group(parent, id)?))
}

/// Makes the group in which the pod's machine boots: beside the pod's group,
/// below the parent that they share. It goes by [`remove`] with `parent`'s own
/// parent, and until then tells what the boot has cost.
pub fn make_for_boot(parent: &Path, id: &str) -> Result<Vec<PathBuf>> {
    // Refused as the pod's own would be.
    group(parent, id)?;
    make_all(&dirs_of(&group(beside(parent), id)?))
}

/// Makes the groups in which a pod's machine boots and runs, all with `limits`:
/// two in a parent that was asked for, in our own one for both. `wanted` says
/// what becomes of the pod where they do not have a limit.
pub fn make_for_machine(
    parent: &Path,
    id: &str,
    limits: Limits,
    wanted: Confinement,
) -> Result<MachineGroups> {
    let mut procs = make(parent, id)?;
    let mut made = vec![group(parent, id)?];
    if parent != Path::new(OWN_PARENT) {
        procs = make_for_boot(parent, id)?;
        made = groups(parent, id)?;
    }
    let mut without_device_rule = Vec::new();
    for group in made {
        limits.set(&group, wanted)?;
        without_device_rule.extend(limits::without_device_rule(&group));
    }
    Ok(MachineGroups {
        procs,
        without_device_rule,
    })
}

/// The groups of a pod whose machine is about to boot.
#[derive(Debug, Default)]
pub struct MachineGroups {
    /// The files that take its process.
    pub procs: Vec<PathBuf>,
    /// Directories of v2, where a program is what refuses devices.
    pub without_device_rule: Vec<PathBuf>,
}

/// The group of the boot and the pod's own, which are one where there is no
/// other to boot in.
fn groups(parent: &Path, id: &str) -> Result<Vec<PathBuf>> {
    let mut groups = vec![group(parent, id)?, group(beside(parent), id)?];
    groups.dedup();
    Ok(groups)
}

/// The parent of the group in which the machine of a pod in `parent` boots.
pub fn beside(parent: &Path) -> &Path {
    parent.parent().unwrap_or(parent)
}

/// Moves everything from the group of the boot to the pod's own.
pub fn join(parent: &Path, id: &str) -> Result<()> {
    let targets = make(parent, id)?;
    if beside(parent) == parent {
        return Ok(());
    }
    let sources = dirs_of(&group(beside(parent), id)?);
    for (source, target) in sources.iter().zip(&targets) {
        move_all(&source.join("cgroup.procs"), target)?;
    }
    Ok(())
}

/// Until nothing is left: what is born meanwhile is born where its parent is.
fn move_all(source: &Path, target: &Path) -> Result<()> {
    for _ in 0..MOVE_ROUNDS {
        let text = fs::read_to_string(source).map_err(|error| failed(source, error))?;
        if text.is_empty() {
            return Ok(());
        }
        for pid in text.lines() {
            match fs::write(target, pid) {
                // It has ended.
                Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {}
                written => written.map_err(|error| failed(target, error))?,
            }
        }
    }
    Err(failed(
        source,
        io::Error::other("its processes cannot all be moved"),
    ))
}

/// Makes the group of a pod's supervisor, which has others beside it.
pub fn make_for_supervisor(parent: &Path, id: &str) -> Result<Vec<PathBuf>> {
    make_all(&dirs_of(&group(parent, id)?.join(SUPERVISOR)))
}

fn make_all(dirs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for dir in dirs {
        let mut tries = 0;
        while let Err(source) = fs::create_dir_all(dir) {
            tries += 1;
            if source.kind() != io::ErrorKind::NotFound || tries == MAKE_TRIES {
                return Err(failed(dir, source));
            }
        }
        if let (true, Some(parent)) = (is_unified(), dir.parent()) {
            account_below(parent);
        }
        files.push(dir.join("cgroup.procs"));
    }
    Ok(files)
}

/// Lets v2 account for each group below `parent` by itself, which is off in a
/// group that is new. Not where processes are in `parent` itself, as no other
/// could join a group below it then: limits and figures are those of `parent`.
fn account_below(parent: &Path) {
    let is_empty = |text: String| text.is_empty();
    if !fs::read_to_string(parent.join("cgroup.procs")).is_ok_and(is_empty) {
        return;
    }
    let Ok(there) = fs::read_to_string(parent.join("cgroup.controllers")) else {
        return;
    };
    let wanted = |name: &&str| V2_CONTROLLERS.contains(name);
    for controller in there.split_whitespace().filter(wanted) {
        let file = parent.join("cgroup.subtree_control");
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            tracing::debug!(path = %file.display(), controller, %error, "the controller stays off");
        }
    }
}

/// Removes the parent that is nobody else's, unless some pod is in it. Where
/// only OCI runtimes make groups it may be empty though a pod is there: its
/// runtime is about to.
pub fn remove_own_parent() {
    let parent = Path::new(OWN_PARENT);
    let is_gone = dirs_of(parent).iter().all(|dir| remove_empty(dir));
    if is_gone {
        for dir in everywhere(parent) {
            remove_empty(&dir);
        }
    }
}

/// Whether it is gone.
fn remove_empty(dir: &Path) -> bool {
    match fs::remove_dir(dir) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => {
            let in_use = [
                io::ErrorKind::ResourceBusy,
                io::ErrorKind::DirectoryNotEmpty,
            ];
            if !in_use.contains(&error.kind()) {
                tracing::warn!(path = %dir.display(), %error, "cannot remove an empty control group");
            }
            false
        }
    }
}

/// Kills what is left in the group and below, and removes it all; one that is
/// gone, or could never have been made, is no error. A parent that was asked
/// for is its maker's.
pub async fn remove(parent: &Path, id: &str) -> Result<()> {
    let deadline = Instant::now() + EMPTY_WITHIN;
    let Ok(group) = group(parent, id) else {
        return Ok(());
    };
    for dir in everywhere(&group) {
        // Where the kernel does it: no process escapes by forking.
        if dir.join(KILL).exists() {
            let whole = dir.clone();
            let work = tokio::task::spawn_blocking(move || kill_whole(&whole));
            work.await
                .map_err(|_| Error::Stopping)?
                .map_err(|source| failed(&dir, source))?;
        }
        loop {
            match remove_tree(&dir) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(source) if Instant::now() > deadline => return Err(failed(&dir, source)),
                Err(_) => {
                    for dir in tree(&dir) {
                        kill_all(&dir)?;
                    }
                }
            }
            // v1 has no event for a group that became empty.
            tokio::time::sleep(EMPTY_POLL).await;
        }
    }
    Ok(())
}

/// Kills all that is in a group of v2 and below, and waits for its end. Fine
/// with the group being gone.
fn kill_whole(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + EMPTY_WITHIN;
    let gone = |error: &io::Error| {
        error.kind() == io::ErrorKind::NotFound
            || error.raw_os_error() == Some(Errno::ENODEV as i32)
    };
    let mut events = match File::open(dir.join("cgroup.events")) {
        Err(error) if gone(&error) => return Ok(()),
        events => events?,
    };
    match fs::write(dir.join(KILL), "1") {
        Err(error) if gone(&error) => return Ok(()),
        killed => killed?,
    }
    loop {
        let mut text = String::new();
        events.rewind()?;
        match events.read_to_string(&mut text) {
            Err(error) if gone(&error) => return Ok(()),
            read => read?,
        };
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // The read above has taken the change before.
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The directory and those below it, parents first; what vanishes meanwhile is
/// not there.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut dirs = vec![dir.to_owned()];
    let mut next = 0;
    while let Some(dir) = dirs.get(next) {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
        let below: Vec<PathBuf> = below.map(|entry| entry.path()).collect();
        dirs.extend(below);
        next += 1;
    }
    dirs
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    let mut outcome = Ok(());
    for dir in tree(dir).iter().rev() {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => outcome = Err(error),
            _ => {}
        }
    }
    outcome
}

fn kill_all(dir: &Path) -> Result<()> {
    let text = match fs::read_to_string(dir.join("cgroup.procs")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| failed(dir, source))?,
    };
    for pid in text
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 1)
    {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(error) => return Err(failed(dir, error.into())),
        }
    }
    Ok(())
}

/// The pod's group, from its hierarchy's root.
pub fn group(parent: &Path, id: &str) -> Result<PathBuf> {
    if parent
        .components()
        .any(|part| !matches!(part, Component::RootDir | Component::Normal(_)))
    {
        return Err(Error::Invalid {
            field: "config.linux.cgroup_parent".to_owned(),
            why: format!("{parent:?} is not an absolute path without '..'"),
        });
    }
    Ok(parent.join(format!("drupe-{id}")))
}

/// Whether there is one hierarchy for all controllers.
pub fn is_unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

pub fn has_controller(name: &str) -> bool {
    let root = Path::new(ROOT);
    match fs::read_to_string(root.join("cgroup.controllers")) {
        Ok(controllers) => controllers.split_whitespace().any(|c| c == name),
        Err(_) => root.join(name).join("cgroup.procs").exists(),
    }
}

/// Whether swap can be limited: kernels may be built or booted without.
pub fn limits_swap() -> bool {
    let root = Path::new(ROOT);
    if !is_unified() {
        return root.join("memory/memory.memsw.limit_in_bytes").exists();
    }
    // The root has no such file; of the groups below it one that has the
    // memory controller tells.
    let groups = fs::read_dir(root).into_iter().flatten().flatten();
    let mut files = groups.map(|group| group.path().join("memory.swap.max"));
    files.any(|file| file.exists())
}

/// The group in every hierarchy that is mounted, whoever made it there.
fn everywhere(group: &Path) -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    let below = group.strip_prefix("/").unwrap_or(group);
    if is_unified() {
        return vec![root.join(below)];
    }
    let mounted = fs::read_dir(root).into_iter().flatten().flatten();
    let mounted = mounted.map(|entry| entry.path());
    let hierarchies = mounted.filter(|dir| dir.join("cgroup.procs").exists());
    hierarchies.map(|dir| dir.join(below)).collect()
}

/// The group in every hierarchy.
fn dirs_of(group: &Path) -> Vec<PathBuf> {
    let below = group.strip_prefix("/").unwrap_or(group);
    let root = Path::new(ROOT);
    let hierarchies = if is_unified() {
        vec![root.to_owned()]
    } else {
        let mounted = V1_CONTROLLERS.iter().map(|name| root.join(name));
        mounted
            .filter(|dir| dir.join("cgroup.procs").exists())
            .collect()
    };
    hierarchies
        .into_iter()
        .map(|hierarchy| hierarchy.join(below))
        .collect()
}

fn failed(dir: &Path, source: io::Error) -> Error {
    Error::File {
        what: "control group",
        path: dir.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_group_is_removed_with_what_runs_in_it_and_may_be_gone() {
        let parent = Path::new("/drupe-unit-test");
        let files = make(parent, "p1").unwrap();
        assert!(files.iter().all(|file| file.exists()));
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        for file in &files {
            fs::write(file, child.id().to_string()).unwrap();
        }
        remove(parent, "p1").await.unwrap();
        child.wait().unwrap();
        remove(parent, "p1").await.unwrap();
        for file in files {
            fs::remove_dir(file.parent().unwrap().parent().unwrap()).unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_below_a_group_goes_with_it() {
        let parent = Path::new("/drupe-unit-test-below");
        let files = make_for_supervisor(parent, "p2").unwrap();
        // As an OCI runtime does, also where nothing is charged.
        for dir in everywhere(&group(parent, "p2").unwrap()) {
            fs::create_dir_all(dir.join("container/exec-1")).unwrap();
        }
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        for file in &files {
            let container = file.parent().unwrap().with_file_name("container");
            fs::write(container.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        remove(parent, "p2").await.unwrap();
        child.wait().unwrap();
        for dir in everywhere(parent) {
            fs::remove_dir(dir).unwrap();
        }
    }

    #[test]
    fn the_kernel_kills_a_whole_group_and_tells_when_it_is_empty() {
        // Where there is v2, beside v1 perhaps.
        let roots = [ROOT, "/sys/fs/cgroup/unified"];
        let has_v2 = |root: &&str| Path::new(root).join("cgroup.controllers").exists();
        let root = roots.into_iter().find(has_v2).expect("a v2 hierarchy");
        let dir = Path::new(root).join("drupe-unit-test-kill");
        fs::create_dir_all(dir.join("below")).unwrap();
        kill_whole(&dir).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        fs::write(dir.join("below/cgroup.procs"), child.id().to_string()).unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        kill_whole(&dir).unwrap();
        assert!(!reaper.join().unwrap().success());
        remove_tree(&dir).unwrap();
        kill_whole(&dir).unwrap();
    }

    #[test]
    fn a_parent_that_climbs_is_refused() {
        assert!(matches!(
            make(Path::new("/a/../.."), "p"),
            Err(Error::Invalid { .. })
        ));
    }
}
