//! What containers of one pod see of a volume and of what is mounted below it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::pod::{Container, IDLE, Pod, security};
use e2e::{Node, eventually};
use nix::mount::{MntFlags, MsFlags, umount2};
use tonic::Code;

use crate::{refused, with_drupe, with_node};

const SOON: Duration = Duration::from_secs(10);
const NONE: Option<&str> = None;

/// A mount on the node, made by the test.
struct HostMount(PathBuf);

impl HostMount {
    fn tmpfs(at: &Path) -> Result<Self> {
        Self::new(
            Some(Path::new("tmpfs")),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
        )
    }

    /// Another path of `source`, as the kubelet makes it for a subPath.
    fn bind(source: &Path, at: &Path) -> Result<Self> {
        Self::new(Some(source), at, NONE, MsFlags::MS_BIND)
    }

    fn new(source: Option<&Path>, at: &Path, kind: Option<&str>, flags: MsFlags) -> Result<Self> {
        fs::create_dir_all(at)?;
        nix::mount::mount(source, at, kind, flags, NONE)
            .with_context(|| at.display().to_string())?;
        Ok(Self(at.to_owned()))
    }

    /// As on a node whose mounts systemd has made shared.
    fn shared(self) -> Result<Self> {
        let flags = MsFlags::MS_SHARED;
        nix::mount::mount(NONE, &self.0, NONE, flags, NONE).context("make it shared")?;
        Ok(self)
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

/// A directory of the node that every user may write.
fn directory(node: &Node, name: &str) -> Result<PathBuf> {
    let path = node.dir.join(name);
    fs::create_dir_all(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
    Ok(path)
}

fn at_data(host: &Path) -> Mount {
    Mount {
        container_path: "/data".to_owned(),
        host_path: host.display().to_string(),
        ..Default::default()
    }
}

fn start(pod: &Pod, name: &str, command: &[&str], mount: Mount) -> Result<Container> {
    let mut config = pod.container_config(name, command);
    config.mounts = vec![mount];
    pod.start_with(config)
}

/// One that may mount.
fn start_privileged(pod: &Pod, name: &str, mount: Mount) -> Result<Container> {
    let mut config = pod.container_config(name, IDLE);
    config.mounts = vec![mount];
    security(&mut config).privileged = true;
    pod.start_with(config)
}

fn has(container: &Container, path: &str) -> Result<bool> {
    let answer = container.exec_sync(&["test", "-e", path], 20)?;
    Ok(answer.exit_code == 0)
}

fn tools(node: &Node) -> Result<String> {
    let image = e2e::image::with_tools()?;
    node.registry()?.push("tools", "latest", &image)?;
    let name = "127.0.0.1:5000/tools:latest".to_owned();
    node.cri()?.pull(&name)?;
    Ok(name)
}

fn start_image(
    pod: &Pod,
    name: &str,
    image: &str,
    command: &[&str],
    mount: Mount,
) -> Result<Container> {
    let mut config = pod.container_config(name, command);
    config.image.get_or_insert_default().image = image.to_owned();
    config.mounts = vec![mount];
    pod.start_with(config)
}

#[test]
fn a_socket_in_a_volume_joins_containers_by_whatever_path_they_have_it() -> Result<()> {
    with_node(|node| {
        let shared = directory(node, "shared")?;
        let sub_path = HostMount::bind(&shared, &node.dir.join("sub-path"))?;
        let link = node.dir.join("link");
        symlink(&shared, &link)?;
        let pod = node.run_pod("sockets")?;
        let serve = "ln -s /data/log /dev/log && exec busybox syslogd -n -O -";
        let server = start(&pod, "server", &["sh", "-c", serve], at_data(&shared))?;
        for (name, path, readonly) in [
            ("same", &shared, false),
            ("reader", &shared, true),
            ("sub-path", &sub_path.0, false),
            ("link", &link, false),
        ] {
            let mount = Mount {
                readonly,
                ..at_data(path)
            };
            let client = start(&pod, name, IDLE, mount)?;
            eventually("the server to listen", SOON, || {
                client.exec(&["test", "-S", "/data/log"])
            })?;
            let ask = format!("ln -s /data/log /dev/log && busybox logger hello from {name}");
            client.exec(&["sh", "-c", &ask])?;
            eventually("the server to be told", SOON, || {
                let told = server.stdout()?;
                ensure!(told.contains(&format!("hello from {name}")), "{told}");
                Ok::<_, anyhow::Error>(())
            })?;
        }
        pod.remove()?;
        drop(sub_path);
        Ok(())
    })
}

#[test]
fn a_watch_on_an_empty_dir_sees_what_another_container_writes() -> Result<()> {
    with_node(|node| {
        let image = tools(node)?;
        let config = node.pod_config("watches");
        let uid = config.metadata.clone().unwrap_or_default().uid;
        let pod = node.run_pod_with(config)?;
        // Where the kubelet puts it.
        let path = format!("kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/shared");
        let shared = directory(node, &path)?;
        // The one that only reads it comes first.
        let mount = Mount {
            readonly: true,
            ..at_data(&shared)
        };
        let watch = [
            "inotifywait",
            "-m",
            "-e",
            "close_write",
            "--format",
            "%e %f",
            "/data",
        ];
        let watcher = start_image(&pod, "watcher", &image, &watch, mount)?;
        eventually("the watch", SOON, || {
            let output = watcher.output()?;
            ensure!(output.contains("Watches established"), "{output}");
            Ok::<_, anyhow::Error>(())
        })?;
        let writer = start(&pod, "writer", IDLE, at_data(&shared))?;
        writer.exec(&["sh", "-c", "echo x > /data/new-file"])?;
        eventually("the watcher to be told", SOON, || {
            let told = watcher.stdout()?;
            ensure!(told.contains("CLOSE_WRITE,CLOSE new-file"), "{told}");
            Ok::<_, anyhow::Error>(())
        })?;
        let answer = watcher.exec_sync(&["touch", "/data/by-the-reader"], 20)?;
        ensure!(answer.exit_code != 0, "a read-only mount was written");
        assert_eq!(fs::read_to_string(shared.join("new-file"))?, "x\n");
        Ok(())
    })
}

#[test]
fn a_lock_in_a_volume_keeps_other_containers_out() -> Result<()> {
    with_node(|node| {
        let image = tools(node)?;
        let shared = directory(node, "shared")?;
        let pod = node.run_pod("locks")?;
        let hold = [
            "flock",
            "/data/lock",
            "sh",
            "-c",
            "echo locked; exec sleep 1000",
        ];
        let holder = start_image(&pod, "holder", &image, &hold, at_data(&shared))?;
        eventually("the lock", SOON, || {
            let output = holder.stdout()?;
            ensure!(output.contains("locked"), "{output}");
            Ok::<_, anyhow::Error>(())
        })?;
        let other = start_image(&pod, "other", &image, IDLE, at_data(&shared))?;
        let take = ["flock", "-n", "/data/lock", "true"];
        assert_eq!(other.exec_sync(&take, 20)?.exit_code, 1);
        holder.stop(0)?;
        assert_eq!(other.exec_sync(&take, 20)?.exit_code, 0);
        Ok(())
    })
}

#[test]
fn a_volume_that_a_container_still_has_stays_when_another_goes() -> Result<()> {
    with_node(|node| {
        let shared = directory(node, "shared")?;
        fs::write(shared.join("file"), "kept")?;
        let pod = node.run_pod("stays")?;
        let first = start(&pod, "first", IDLE, at_data(&shared))?;
        let second = start(&pod, "second", IDLE, at_data(&shared))?;
        first.stop(5)?;
        first.remove()?;
        assert_eq!(second.exec(&["cat", "/data/file"])?, "kept");
        second.stop(5)?;
        second.remove()?;
        // With the last of them the node's file system is free.
        let tmpfs = HostMount::tmpfs(&node.dir.join("tmpfs"))?;
        let third = start(&pod, "third", IDLE, at_data(&tmpfs.0))?;
        third.exec(&["touch", "/data/x"])?;
        third.stop(5)?;
        third.remove()?;
        nix::mount::umount(&tmpfs.0).context("the volume is still in use")?;
        std::mem::forget(tmpfs);
        Ok(())
    })
}

#[test]
fn what_one_container_mounts_in_a_volume_is_seen_by_those_that_ask() -> Result<()> {
    with_drupe(|node| {
        let shared = directory(node, "shared")?;
        let pod = node.run_pod("propagation")?;
        let with = |name: &str, propagation: MountPropagation| {
            let mount = Mount {
                propagation: propagation.into(),
                ..at_data(&shared)
            };
            start_privileged(&pod, name, mount)
        };
        let early = with("early", MountPropagation::PropagationHostToContainer)?;
        let maker = with("maker", MountPropagation::PropagationBidirectional)?;
        let make = "mkdir /data/tmp /data/etc && mount -t tmpfs tmpfs /data/tmp && \
                    echo made > /data/tmp/file && mount --bind /etc /data/etc";
        maker.exec(&["sh", "-c", make])?;
        let late = with("late", MountPropagation::PropagationHostToContainer)?;
        for container in [&early, &late] {
            assert_eq!(container.exec(&["cat", "/data/tmp/file"])?, "made");
            ensure!(has(container, "/data/etc/passwd")?, "{}", container.name);
        }
        let apart = with("apart", MountPropagation::PropagationPrivate)?;
        ensure!(!has(&apart, "/data/tmp/file")?, "it did not ask for it");

        let own = "mkdir /data/own && mount -t tmpfs tmpfs /data/own && touch /data/own/file";
        late.exec(&["sh", "-c", own])?;
        ensure!(!has(&maker, "/data/own/file")? && !has(&early, "/data/own/file")?);

        // As on a node, what it has mounted stays, but for its own files.
        maker.stop(5)?;
        maker.remove()?;
        assert_eq!(early.exec(&["cat", "/data/tmp/file"])?, "made");
        ensure!(!has(&early, "/data/etc/passwd")?, "its root is still there");
        let next = with("next", MountPropagation::PropagationBidirectional)?;
        next.exec(&["umount", "/data/tmp"])?;
        ensure!(!has(&early, "/data/tmp/file")?, "unmounted for one only");
        // Of another kernel than the node's.
        ensure!(fs::read_dir(shared.join("tmp"))?.next().is_none());
        Ok(())
    })
}

#[test]
fn what_the_node_mounts_below_a_volume_appears_where_it_is_asked_for() -> Result<()> {
    with_node(|node| {
        let source = directory(node, "source")?;
        let shared = HostMount::bind(&source, &source)?.shared()?;
        let pod = node.run_pod("follows")?;
        let with = |name: &str, propagation: MountPropagation, readonly: bool| {
            let mount = Mount {
                propagation: propagation.into(),
                readonly,
                ..at_data(&shared.0)
            };
            start(&pod, name, IDLE, mount)
        };
        let follows = with(
            "follows",
            MountPropagation::PropagationHostToContainer,
            false,
        )?;
        let reads = with("reads", MountPropagation::PropagationHostToContainer, true)?;
        let apart = with("apart", MountPropagation::PropagationPrivate, false)?;
        let below = HostMount::tmpfs(&shared.0.join("below"))?;
        fs::write(below.0.join("file"), "x")?;
        for container in [&follows, &reads] {
            eventually("the mount to appear", SOON, || {
                container.exec(&["cat", "/data/below/file"])
            })?;
        }
        ensure!(!has(&apart, "/data/below/file")?, "it did not ask for it");
        drop(below);
        eventually("the mount to go", SOON, || {
            ensure!(!has(&follows, "/data/below/file")?, "it is there");
            Ok::<_, anyhow::Error>(())
        })?;
        pod.remove()?;
        drop(shared);
        Ok(())
    })
}

#[test]
fn only_a_recursively_read_only_mount_holds_for_what_is_mounted_below() -> Result<()> {
    with_drupe(|node| {
        let source = directory(node, "source")?;
        let below = HostMount::tmpfs(&source.join("below"))?;
        let pod = node.run_pod("rro")?;
        let with = |name: &str, readonly, recursive_read_only| {
            let mount = Mount {
                readonly,
                recursive_read_only,
                ..at_data(&source)
            };
            start(&pod, name, IDLE, mount)
        };
        let (plain, recursive) = (with("plain", true, false)?, with("recursive", true, true)?);
        plain.exec(&["touch", "/data/below/file"])?;
        ensure!(has(&recursive, "/data/below/file")?, "nothing to see");
        for (container, path) in [
            (&plain, "/data/file"),
            (&recursive, "/data/file"),
            (&recursive, "/data/below/other"),
        ] {
            let answer = container.exec_sync(&["touch", path], 20)?;
            let said = String::from_utf8_lossy(&answer.stderr);
            ensure!(said.contains("Read-only file system"), "{path}: {said}");
        }
        let mounts = recursive.status()?.mounts;
        ensure!(mounts[0].recursive_read_only, "{mounts:?}");
        let mut config = pod.container_config("writes", IDLE);
        config.mounts = vec![Mount {
            recursive_read_only: true,
            ..at_data(&source)
        }];
        refused(
            pod.create(config).map(drop),
            Code::InvalidArgument,
            &["config.mounts[/data].recursive_read_only", "readonly"],
        )?;
        pod.remove()?;
        drop(below);
        Ok(())
    })
}
