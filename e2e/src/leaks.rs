//! What a node has left on the machine. A node that removed its pods and
//! ended leaves nothing, whatever happened to it before.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cgroup::Cgroup;
use crate::netns::NetNs;

/// Where to look. All below `dir` is the node's own.
pub struct Scope<'a> {
    pub dir: &'a Path,
    /// Volatile directories, which end up without files.
    pub volatile_dirs: &'a [&'a Path],
    /// A mount of the test's own.
    pub standing_mount: Option<&'a Path>,
    /// Directories that hold something for each pod and end up without it.
    pub of_pods: Vec<PathBuf>,
    pub ipam_dir: PathBuf,
    pub cgroup: &'a Cgroup,
    pub netns: &'a NetNs,
    /// Links that are there without any pod: loopback and the plugins' bridge.
    pub standing_links: &'a [String],
    /// Host port rules of others.
    pub standing_rules: &'a [String],
    /// Processes that are the harness's own.
    pub own_processes: Vec<u32>,
}

/// Fails with a list of everything that is left.
pub fn assert_none(scope: &Scope<'_>) -> Result<()> {
    let left = found(scope)?;
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    Ok(())
}

/// Everything that there is, each as a line for people.
pub fn found(scope: &Scope<'_>) -> Result<Vec<String>> {
    let mut left = Vec::new();
    left.extend(processes(scope)?);
    left.extend(mounts(scope)?);
    left.extend(loop_devices(scope.dir)?);
    left.extend(links(scope)?);
    let rules = port_forwards(scope.netns)?.into_iter();
    left.extend(rules.filter(|rule| !scope.standing_rules.contains(rule)));
    left.extend(leases(&scope.ipam_dir)?);
    left.extend(volatile_files(scope)?);
    for dir in &scope.of_pods {
        left.extend(entries_of_pods(dir)?);
    }
    left.extend(
        scope
            .cgroup
            .of_pods()?
            .iter()
            .map(|path| format!("cgroup {}", path.display())),
    );
    left.extend(
        Cgroup::empty_parents_of_daemon()?
            .iter()
            .map(|path| format!("empty cgroup {}", path.display())),
    );
    Ok(left)
}

fn processes(scope: &Scope<'_>) -> Result<Vec<String>> {
    let all = scope.cgroup.processes()?;
    let foreign = all
        .iter()
        .filter(|(pid, _)| !scope.own_processes.contains(pid));
    Ok(foreign
        .map(|(pid, line)| format!("process {pid}: {line}"))
        .collect())
}

/// Mounts at or below `dir`, deepest first.
pub fn mount_points(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    let mut points: Vec<_> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(dir))
        .collect();
    points.reverse();
    Ok(points)
}

fn mounts(scope: &Scope<'_>) -> Result<Vec<String>> {
    Ok(mount_points(scope.dir)?
        .iter()
        .filter(|point| Some(point.as_path()) != scope.standing_mount)
        .map(|point| format!("mount {}", point.display()))
        .collect())
}

fn loop_devices(dir: &Path) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for device in fs::read_dir("/sys/block").context("/sys/block")? {
        let device = device.context("/sys/block")?;
        // Absent for devices that are no loop or have no file.
        let Ok(file) = fs::read_to_string(device.path().join("loop/backing_file")) else {
            continue;
        };
        if Path::new(file.trim()).starts_with(dir) {
            left.push(format!(
                "loop device {} on {}",
                device.file_name().display(),
                file.trim()
            ));
        }
    }
    Ok(left)
}

/// Veths, taps and whatever else is in the node's network.
fn links(scope: &Scope<'_>) -> Result<Vec<String>> {
    let links = scope.netns.links()?;
    let extra = links
        .into_iter()
        .filter(|link| !scope.standing_links.contains(link));
    Ok(extra.map(|link| format!("link {link}")).collect())
}

/// Rules of the portmap plugin, whose chains are named after the container.
pub fn port_forwards(netns: &NetNs) -> Result<Vec<String>> {
    let rules = netns.output("iptables-save", &["-t", "nat"])?;
    let own = rules
        .lines()
        .filter(|rule| rule.contains("CNI-DN-") || rule.contains("CNI-SN-"));
    Ok(own.map(|rule| format!("iptables rule {rule}")).collect())
}

/// Address leases of the host-local plugin; its lock and its hint of the last
/// address given are no leases.
fn leases(ipam_dir: &Path) -> Result<Vec<String>> {
    let files = files_below(ipam_dir)?.into_iter();
    let leases = files.filter(|path| {
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        name != "lock" && !name.starts_with("last_reserved_ip.")
    });
    Ok(leases
        .map(|path| format!("address lease {}", path.display()))
        .collect())
}

/// Sockets, logs, bind mount targets, names of network namespaces.
fn volatile_files(scope: &Scope<'_>) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for dir in scope.volatile_dirs {
        left.extend(
            files_below(dir)?
                .iter()
                .map(|path| format!("file {}", path.display())),
        );
    }
    Ok(left)
}

/// Disks, records and directories in `dir`, whoever's they are, but for the
/// template that disks are copied from.
fn entries_of_pods(dir: &Path) -> Result<Vec<String>> {
    let mut left = Vec::new();
    // A runtime other than drupe has none of these.
    if !dir.exists() {
        return Ok(left);
    }
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let is_template = path.extension().is_some_and(|end| end == "ext4")
            && path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"template-"));
        if !is_template {
            left.push(format!("of a pod {}", path.display()));
        }
    }
    Ok(left)
}

/// Everything below `dir` that is no directory.
pub fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| dir.display().to_string()),
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}
