//! Volumes as the kubelet makes and changes them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::pod::{Container, IDLE, Pod};
use e2e::{Node, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::Code;

use crate::{refused, with_drupe, with_node};

/// The kubelet's clients expect a change of a volume to be seen soon after the
/// kubelet has made it.
const AT_ONCE: Duration = Duration::from_secs(2);
const NONE: Option<&str> = None;

/// A mount on the node that the kubelet would make for a pod.
struct KubeletMount(PathBuf);

impl KubeletMount {
    fn memory(at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        let options = Some("size=16m,mode=1777");
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), options)?;
        Ok(Self(at.to_owned()))
    }

    /// What a subPath is given to the runtime as: a bind of it elsewhere.
    fn sub_path(source: &Path, at: &Path) -> Result<Self> {
        if source.is_dir() {
            fs::create_dir_all(at)?;
        } else {
            fs::write(at, "")?;
        }
        mount(Some(source), at, NONE, MsFlags::MS_BIND, NONE)
            .with_context(|| at.display().to_string())?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for KubeletMount {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

/// The directory of a configMap: its keys are links through `..data`, which is
/// swapped when they change.
struct ConfigMap {
    dir: PathBuf,
    versions: u32,
}

impl ConfigMap {
    fn new(dir: PathBuf, value: &str) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        symlink("..data/key", dir.join("key"))?;
        let mut map = Self { dir, versions: 0 };
        map.set(value)?;
        Ok(map)
    }

    fn version(&self, number: u32) -> PathBuf {
        self.dir.join(format!("..2026_11_22_10_00_00.{number:09}"))
    }

    fn set(&mut self, value: &str) -> Result<()> {
        let old = self.version(self.versions);
        self.versions += 1;
        let new = self.version(self.versions);
        fs::create_dir(&new)?;
        fs::write(new.join("key"), value)?;
        let name = new.file_name().context("a version without a name")?;
        let link = self.dir.join("..data_tmp");
        symlink(name, &link)?;
        fs::rename(&link, self.dir.join("..data"))?;
        match fs::remove_dir_all(&old) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            result => Ok(result?),
        }
    }
}

fn at(path: &str, host: &Path, readonly: bool) -> Mount {
    Mount {
        container_path: path.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Default::default()
    }
}

fn start(pod: &Pod, name: &str, mounts: Vec<Mount>) -> Result<Container> {
    let mut config = pod.container_config(name, IDLE);
    config.mounts = mounts;
    pod.start_with(config)
}

fn volume_of(node: &Node, uid: &str, kind: &str) -> PathBuf {
    let volumes = node.dir.join("kubelet/pods").join(uid).join("volumes");
    volumes.join(format!("kubernetes.io~{kind}/v"))
}

#[test]
fn a_changed_config_map_is_seen_in_its_volume_and_not_in_a_sub_path() -> Result<()> {
    with_node(|node| {
        let config = node.pod_config("configured");
        let uid = config.metadata.clone().unwrap_or_default().uid;
        let pod = node.run_pod_with(config)?;
        let dir = volume_of(node, &uid, "configmap");
        let mut map = ConfigMap::new(dir.clone(), "first")?;
        let key = fs::canonicalize(dir.join("key"))?;
        let file = KubeletMount::sub_path(&key, &node.dir.join("sub-path-of-a-file"))?;
        let container = start(
            &pod,
            "c",
            vec![
                at("/config", &dir, true),
                at("/etc/app.conf", &file.0, true),
            ],
        )?;
        let read = |path: &str| container.exec(&["cat", path]);
        assert_eq!(read("/config/key")?, "first");
        assert_eq!(read("/etc/app.conf")?, "first");
        for value in ["second", "third"] {
            map.set(value)?;
            let changed = Instant::now();
            eventually("the change to be seen", e2e::patient(AT_ONCE), || {
                let now = read("/config/key")?;
                ensure!(now == value, "{now:?} after {:?}", changed.elapsed());
                Ok::<_, anyhow::Error>(())
            })?;
        }
        // Its file is no longer the volume's, as with any runtime.
        assert_eq!(read("/etc/app.conf")?, "first");
        let links = container.exec(&["ls", "-A", "/config"])?;
        assert_eq!(links.lines().count(), 3, "{links}");
        pod.remove()?;
        drop(file);
        Ok(())
    })
}

#[test]
fn a_sub_path_shows_that_part_of_a_volume_alone() -> Result<()> {
    with_node(|node| {
        let volume = node.dir.join("volume");
        fs::create_dir_all(volume.join("part"))?;
        fs::write(volume.join("other"), "")?;
        let part = KubeletMount::sub_path(&volume.join("part"), &node.dir.join("sub-path"))?;
        let pod = node.run_pod("parted")?;
        let container = start(&pod, "c", vec![at("/part", &part.0, false)])?;
        container.exec(&["sh", "-c", "echo inside > /part/file"])?;
        assert_eq!(fs::read_to_string(volume.join("part/file"))?, "inside\n");
        let shown = container.exec(&["ls", "/part", "/part/.."])?;
        ensure!(!shown.contains("other"), "{shown}");
        pod.remove()?;
        drop(part);
        Ok(())
    })
}

#[test]
fn containers_share_an_empty_dir_in_memory() -> Result<()> {
    with_node(|node| {
        let config = node.pod_config("in-memory");
        let uid = config.metadata.clone().unwrap_or_default().uid;
        let pod = node.run_pod_with(config)?;
        let memory = KubeletMount::memory(&volume_of(node, &uid, "empty-dir"))?;
        let writer = start(&pod, "writer", vec![at("/cache", &memory.0, false)])?;
        let reader = start(&pod, "reader", vec![at("/cache", &memory.0, true)])?;
        writer.exec(&[
            "sh",
            "-c",
            "head -c 4000000 /dev/urandom > /cache/blob; sync",
        ])?;
        let sum = ["sha256sum", "/cache/blob"];
        assert_eq!(reader.exec(&sum)?, writer.exec(&sum)?);
        ensure!(memory.0.join("blob").exists(), "the node does not have it");
        // Its size is the volume's.
        let fill = "dd if=/dev/zero of=/cache/more bs=1M count=32";
        let answer = writer.exec_sync(&["sh", "-c", fill], 60)?;
        let said = String::from_utf8_lossy(&answer.stderr);
        ensure!(said.contains("No space left on device"), "{said}");
        pod.remove()?;
        drop(memory);
        Ok(())
    })
}

#[test]
fn a_file_of_the_machines_figures_may_be_a_volumes() -> Result<()> {
    with_node(|node| {
        // As lxcfs on the node gives them to containers.
        let figures = node.dir.join("meminfo");
        fs::write(&figures, "MemTotal: 4096 kB\n")?;
        let pod = node.run_pod("figures")?;
        let mounts = vec![at("/proc/meminfo", &figures, true)];
        let container = start(&pod, "c", mounts)?;
        let read = container.exec(&["cat", "/proc/meminfo"])?;
        assert_eq!(read, "MemTotal: 4096 kB");
        container.exec(&["grep", "-q", "^processor", "/proc/cpuinfo"])?;
        Ok(())
    })
}

#[test]
fn no_other_file_of_proc_is_replaced() -> Result<()> {
    with_drupe(|node| {
        let file = node.dir.join("file");
        fs::write(&file, "")?;
        let pod = node.run_pod("proc")?;
        for path in ["/proc/sysrq-trigger", "/proc/self/attr/current"] {
            let mut config = pod.container_config("c", IDLE);
            config.mounts = vec![at(path, &file, true)];
            refused(
                pod.create(config).map(drop),
                Code::InvalidArgument,
                &[path, "below /proc"],
            )?;
        }
        Ok(())
    })
}
