//! What of the node a pod's processes can reach: looked at from the node while
//! the pod runs, and tried from inside.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use cri_api::v1::Mount;
use e2e::Node;

use crate::with_drupe;

/// Its own processes of a pod, by what they are.
struct Processes {
    monitor: u32,
    file_server: u32,
    all: BTreeMap<u32, String>,
}

impl Processes {
    fn of(node: &Node) -> Result<Self> {
        let all = node.pod_processes()?;
        let find = |name: &str| {
            let mut found = all.iter().filter(|(_, line)| program(line) == name);
            let first = found
                .next()
                .with_context(|| format!("no {name}: {all:?}"))?;
            ensure!(found.next().is_none(), "more than one {name}: {all:?}");
            Ok(*first.0)
        };
        Ok(Self {
            monitor: find("drupe-vmm")?,
            file_server: find("drupe-files")?,
            all,
        })
    }
}

fn program(line: &str) -> &str {
    let path = line.split_whitespace().next().unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default()
}

fn field(status: &str, name: &str) -> Result<String> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let value = line.with_context(|| format!("no {name} in {status}"))?;
    Ok(value
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

#[test]
fn no_process_of_a_pod_has_rights_over_the_node() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("rights")?;
        pod.start_idle("one")?;
        let found = Processes::of(node)?;
        for (pid, line) in &found.all {
            let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
            // One of the guest's that has ended meanwhile.
            let Ok(status) = read("status") else { continue };
            // A thread of the node's kernel that works for KVM counts as the pod's.
            if field(&status, "PPid:")? == "2" {
                continue;
            }
            let allowed = match *pid == found.file_server {
                true => "00000000800000db",
                false => "0000000000000000",
            };
            for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
                ensure!(field(&status, set)? == allowed, "{line}: {set} {status}");
            }
            ensure!(field(&status, "NoNewPrivs:")? == "1", "{line}: {status}");
            every_thread_has_a_filter(*pid)?;
            let links = read("net/dev")?;
            ensure!(links.lines().count() == 3, "{line}: {links}");
        }
        Ok(())
    })
}

fn every_thread_has_a_filter(pid: u32) -> Result<()> {
    // One of the guest's processes, or a thread, that has ended meanwhile.
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Ok(());
    };
    for thread in threads {
        let Ok(thread) = thread else { continue };
        let Ok(status) = fs::read_to_string(thread.path().join("status")) else {
            continue;
        };
        ensure!(field(&status, "Seccomp:")? == "2", "{status}");
        ensure!(field(&status, "CapEff:")? == field(&status, "CapPrm:")?);
    }
    Ok(())
}

/// A container has the capability for it, as containers do by default.
#[test]
fn no_device_is_made_on_a_volume() -> Result<()> {
    with_drupe(|node| {
        let volume = node.dir.join("volume");
        fs::create_dir(&volume)?;
        let pod = node.run_pod("devices")?;
        let mut config = pod.container_config("one", e2e::pod::IDLE);
        config.mounts = vec![Mount {
            container_path: "/v".to_owned(),
            host_path: volume.display().to_string(),
            ..Default::default()
        }];
        let container = pod.start_with(config)?;
        for device in ["c 1 5", "b 8 0"] {
            let script = format!("mknod /v/d {device} 2>&1");
            let tried = container.exec_sync(&["sh", "-c", &script], 20)?;
            let said = String::from_utf8_lossy(&tried.stdout);
            ensure!(tried.exit_code != 0, "{device} was made");
            ensure!(said.contains("Operation not permitted"), "{said}");
        }
        ensure!(!volume.join("d").exists(), "there is a node");
        // What is no device is made, also overlayfs' mark of a deleted file.
        container.exec(&["sh", "-c", "mkfifo /v/fifo && mknod /v/mark c 0 0"])?;
        // A program of a volume runs, in the guest.
        container.exec(&["sh", "-c", "cp /bin/busybox /v/busybox && /v/busybox true"])?;
        Ok(())
    })
}

#[test]
fn every_mount_that_a_guest_sees_is_guarded() -> Result<()> {
    with_drupe(|node| {
        let volume = node.dir.join("volume");
        fs::create_dir(&volume)?;
        let pod = node.run_pod("mounts")?;
        let mut config = pod.container_config("one", e2e::pod::IDLE);
        config.mounts = vec![Mount {
            container_path: "/v".to_owned(),
            host_path: volume.display().to_string(),
            ..Default::default()
        }];
        pod.start_with(config)?;
        let found = Processes::of(node)?;
        // All that the file server has is the guest's to see.
        let served = mounts(found.file_server, Path::new("/"))?;
        ensure!(served.len() == 2, "{served:?}");
        let on_node = mounts(std::process::id(), &node.run_dir().join("pods"))?;
        let shared = on_node.iter().filter(|(at, _)| at.contains("/shared"));
        let shared: Vec<_> = shared.cloned().collect();
        ensure!(shared.len() == 2, "{on_node:?}");
        for (at, options) in served.iter().chain(&shared) {
            for guard in ["nodev", "nosuid", "noexec"] {
                let has = options.split(',').any(|option| option == guard);
                ensure!(has, "{at} has {options}");
            }
        }
        let monitors = mounts(found.monitor, Path::new("/"))?;
        let volumes = monitors.iter().filter(|(at, _)| at.contains("shared"));
        ensure!(volumes.count() == 0, "{monitors:?}");
        Ok(())
    })
}

/// Mount points at and below `dir` with their options, as `pid` sees them.
fn mounts(pid: u32, dir: &Path) -> Result<Vec<(String, String)>> {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let mounts = table.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(4);
        Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
    });
    Ok(mounts
        .filter(|(at, _)| Path::new(at).starts_with(dir))
        .collect())
}

/// Also in a pod that was promised no limits: it has those of its size.
#[test]
fn a_guest_does_not_multiply_beyond_its_limit() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("multiplies")?;
        let container = pod.start_idle("one")?;
        let found = Processes::of(node)?;
        let file = |controller: &str, name: &str| group_file(found.monitor, controller, name);
        let most = fs::read_to_string(file("pids", "pids.max")?)?;
        ensure!(most.trim().parse::<u64>()? < 10_000, "pids.max is {most}");
        let memory = file("memory", "memory.limit_in_bytes").or_else(|_| file("", "memory.max"))?;
        let bytes: u64 = fs::read_to_string(memory)?.trim().parse()?;
        ensure!(bytes < 16 << 30, "memory of {bytes} bytes");
        if e2e::Machine::under_test()? == e2e::Machine::Kvm {
            // There a guest's processes are none of the node's.
            return Ok(());
        }
        let now: u64 = fs::read_to_string(file("pids", "pids.current")?)?
            .trim()
            .parse()?;
        fs::write(file("pids", "pids.max")?, (now + 20).to_string())?;
        let script = "for n in $(seq 60); do sleep 1000 > /dev/null 2>&1 & done; jobs -p | wc -l";
        let tried = container.exec_sync(&["sh", "-c", script], 60)?;
        let said = String::from_utf8_lossy(&tried.stderr);
        ensure!(tried.exit_code != 0, "it had all it wanted: {tried:?}");
        ensure!(said.contains("fork"), "{said}");
        let now: u64 = fs::read_to_string(file("pids", "pids.current")?)?
            .trim()
            .parse()?;
        fs::write(file("pids", "pids.max")?, (now + 100).to_string())?;
        // The guest goes on.
        ensure!(container.exec(&["echo", "lives"])?.trim() == "lives");
        Ok(())
    })
}

/// A file of the control group that `pid` is in, of v1 or v2.
fn group_file(pid: u32, controller: &str, name: &str) -> Result<std::path::PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        let group = group.trim_start_matches('/');
        let root = Path::new("/sys/fs/cgroup");
        let dir = match controllers {
            "" => root.join(group),
            of if of == controller => root.join(controller).join(group),
            _ => continue,
        };
        let path = dir.join(name);
        if path.exists() {
            return Ok(path);
        }
    }
    anyhow::bail!("no {name} for {pid}: {groups}")
}
