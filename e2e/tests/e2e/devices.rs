//! Devices of the node in containers, by CRI's `devices`.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::pod::{IDLE, security};
use e2e::{Container, Node, Pod, eventually};
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::{refused, with_drupe};

const SOON: Duration = Duration::from_secs(20);
const MIB: usize = 1 << 20;
/// The handler of pods on the node's kernel.
const HOST: &str = "host";
/// The daemon's default.
const DISK_SLOTS: usize = 8;

/// A block device of the node: a loop device over a file, both made by the
/// test.
struct Loop {
    device: PathBuf,
    file: PathBuf,
}

impl Loop {
    /// One of `size` bytes, none of which is zero.
    fn new(node: &Node, name: &str, size: usize) -> Result<Self> {
        let file = node.dir.join(name);
        fs::write(&file, vec![0x5a; size])?;
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&file)
            .output()
            .context("losetup")?;
        ensure!(
            made.status.success(),
            "losetup: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let device = PathBuf::from(String::from_utf8(made.stdout)?.trim());
        Ok(Self { device, file })
    }

    /// What the node reads from it.
    fn read(&self, at: u64, count: usize) -> Result<Vec<u8>> {
        let mut file = File::open(&self.file)?;
        file.seek(SeekFrom::Start(at))?;
        let mut bytes = vec![0; count];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Fails while anybody has it open: only then can it be detached at once.
    fn is_free(&self) -> Result<()> {
        let name = self.device.file_name().context("no name")?;
        let detached = Command::new("losetup")
            .arg("--detach")
            .arg(&self.device)
            .status()?;
        ensure!(detached.success(), "losetup --detach failed");
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        eventually("the loop device to be let go", SOON, || {
            ensure!(!backing.exists(), "somebody has it open");
            Ok::<_, anyhow::Error>(())
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // It may be detached, and another test's, by now.
        let of_file = Command::new("losetup").arg("-j").arg(&self.file).output();
        let listed = of_file.map(|out| out.stdout).unwrap_or_default();
        if !listed.is_empty() {
            let status = Command::new("losetup").arg("-d").arg(&self.device).status();
            if !status.is_ok_and(|status| status.success()) {
                eprintln!("cannot detach {}", self.device.display());
            }
        }
    }
}

fn device(host: &Path, container: &str, permissions: &str) -> Device {
    Device {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        permissions: permissions.to_owned(),
    }
}

pub(crate) fn config(pod: &Pod, name: &str, devices: Vec<Device>) -> ContainerConfig {
    ContainerConfig {
        devices,
        ..pod.container_config(name, IDLE)
    }
}

pub(crate) fn on_host(node: &Node, name: &str) -> Result<Pod> {
    let config = node.pod_config(name);
    fs::create_dir_all(&config.log_directory)?;
    let request = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: HOST.to_owned(),
    };
    let id = node.cri()?.run_pod_sandbox(request)?.pod_sandbox_id;
    Pod::known(node, &id, config)
}

pub(crate) fn fails(container: &Container, script: &str) -> Result<()> {
    let answer = container.exec_sync(&["sh", "-c", script], 60)?;
    ensure!(answer.exit_code != 0, "{script} succeeded");
    Ok(())
}

pub(crate) fn sh(container: &Container, script: &str) -> Result<String> {
    container.exec(&["sh", "-c", script])
}

#[test]
fn a_pod_on_the_nodes_kernel_has_the_devices_it_asks_for_and_no_others() -> Result<()> {
    with_drupe(|node| {
        let pod = on_host(node, "devices")?;
        let dir = node.dir.join("devices");
        fs::create_dir(&dir)?;
        std::os::unix::fs::symlink("/dev/full", dir.join("link"))?;
        let asked = vec![
            device(&dir.join("link"), "/dev/mine", "rw"),
            device(Path::new("/dev/net"), "/dev/tuns", "rwm"),
            device(Path::new("/dev/fuse"), "/dev/only-read", "r"),
        ];
        let container = pod.start_with(config(&pod, "c", asked))?;
        assert_eq!(sh(&container, "stat -c %t:%T /dev/mine")?, "1:7");
        fails(&container, "echo x > /dev/mine")?;
        assert_eq!(sh(&container, "head -c 3 /dev/mine | wc -c")?, "3");
        assert_eq!(sh(&container, "stat -c %t:%T /dev/tuns/tun")?, "a:c8");
        sh(&container, "exec 3<> /dev/tuns/tun")?;
        sh(&container, "exec 3< /dev/only-read")?;
        fails(&container, "exec 3> /dev/only-read")?;
        // Its number is nobody else's to use.
        let other = pod.start_idle("other")?;
        sh(&other, "mknod /fuse c 10 229")?;
        fails(&other, "exec 3<> /fuse")?;

        let file = node.dir.join("file");
        fs::write(&file, "x")?;
        for (host, parts) in [
            (file.as_path(), ["config.devices[/dev/x]", "no device"]),
            (
                Path::new("/dev/no-such"),
                ["config.devices[/dev/x]", "/dev/no-such"],
            ),
        ] {
            let asked = vec![device(host, "/dev/x", "r")];
            refused(
                pod.create(config(&pod, "bad", asked)),
                Code::InvalidArgument,
                &parts,
            )?;
        }
        Ok(())
    })
}

#[test]
fn a_pod_with_its_own_kernel_has_that_kernels_devices_and_no_others_of_the_node() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("own")?;
        let asked = ["/dev/fuse", "/dev/net/tun", "/dev/kmsg"];
        let asked = asked.map(|path| device(Path::new(path), path, "rwm"));
        let container = pod.start_with(config(&pod, "c", asked.to_vec()))?;
        sh(&container, "exec 3<> /dev/fuse; exec 4<> /dev/net/tun")?;
        let kernel = sh(
            &container,
            "timeout 1 cat /dev/kmsg | grep -o 'Linux version [^ ]*'; true",
        )?;
        let release = container.exec(&["uname", "-r"])?;
        assert_eq!(kernel, format!("Linux version {release}"));

        let plain = pod.start_idle("plain")?;
        fails(&plain, "test -e /dev/fuse")?;
        sh(&plain, "mknod /fuse c 10 229")?;
        fails(&plain, "exec 3<> /fuse")?;

        let asked = vec![device(Path::new("/dev/kvm"), "/dev/kvm", "rw")];
        refused(
            pod.create(config(&pod, "kvm", asked)),
            Code::FailedPrecondition,
            &["config.devices[/dev/kvm]", "its own kernel", "\"host\""],
        )
        .map(drop)
    })
}

#[test]
fn a_block_device_is_a_disk_of_the_pod_byte_for_byte() -> Result<()> {
    with_drupe(|node| {
        let disk = Loop::new(node, "disk", 8 * MIB)?;
        let pod = node.run_pod("block")?;
        let asked = vec![device(&disk.device, "/dev/block", "mrw")];
        let writer = pod.start_with(config(&pod, "writer", asked.clone()))?;
        assert_eq!(
            sh(&writer, "busybox blockdev --getsize64 /dev/block")?,
            (8 * MIB).to_string()
        );
        assert_eq!(
            sh(
                &writer,
                "head -c 4 /dev/block; head -c 1048576 /dev/urandom > /data"
            )?,
            "ZZZZ"
        );
        sh(
            &writer,
            "dd if=/data of=/dev/block bs=64k seek=3 conv=notrunc,fsync",
        )?;
        let sum = sh(&writer, "sha256sum < /data")?;
        let written = disk.read(3 * 65536, MIB)?;
        assert_eq!(sum.split(' ').next(), Some(sha256(&written).as_str()));
        assert_eq!(disk.read(0, 3 * 65536)?, vec![0x5a; 3 * 65536]);
        let after = 3 * 65536 + MIB;
        assert_eq!(disk.read(after as u64, 65536)?, vec![0x5a; 65536]);

        // Another container of the pod sees the same, and may do less.
        let asked = vec![device(&disk.device, "/dev/other", "r")];
        let reader = pod.start_with(config(&pod, "reader", asked))?;
        let read = "dd if=/dev/other bs=64k skip=3 count=16 2> /dev/null | sha256sum";
        assert_eq!(sh(&reader, read)?, sum);
        fails(&reader, "echo x > /dev/other")?;

        // What was not written back is, by the time that the container has gone.
        sh(&writer, "echo -n late | dd of=/dev/block conv=notrunc")?;
        writer.stop(0)?;
        writer.remove()?;
        reader.stop(0)?;
        reader.remove()?;
        assert_eq!(disk.read(0, 5)?, b"lateZ");
        disk.is_free()
    })
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_read_only_block_device_is_not_written_by_anybody_in_the_pod() -> Result<()> {
    with_drupe(|node| {
        let disk = Loop::new(node, "disk", MIB)?;
        let pod = node.run_pod("read-only")?;
        let asked = vec![device(&disk.device, "/dev/block", "r")];
        let mut privileged = config(&pod, "privileged", asked.clone());
        security(&mut privileged).privileged = true;
        for config in [config(&pod, "plain", asked), privileged] {
            let container = pod.start_with(config)?;
            assert_eq!(sh(&container, "head -c 4 /dev/block")?, "ZZZZ");
            // Whatever the guest's own kernel is told.
            let write = "dd if=/dev/zero of=/dev/block bs=4k count=1 conv=notrunc,fsync";
            fails(&container, write)?;
            fails(
                &container,
                &format!("busybox blockdev --setrw /dev/block; {write}"),
            )?;
        }
        let asked = vec![device(&disk.device, "/dev/block", "rwm")];
        refused(
            pod.create(config(&pod, "writer", asked)),
            Code::FailedPrecondition,
            &["config.devices[/dev/block]", "read-only"],
        )?;
        assert_eq!(disk.read(0, MIB)?, vec![0x5a; MIB]);
        Ok(())
    })
}

#[test]
fn a_removed_container_gives_its_disk_back() -> Result<()> {
    with_drupe(|node| {
        let disks = [
            Loop::new(node, "one", MIB)?,
            Loop::new(node, "two", 2 * MIB)?,
        ];
        let pod = node.run_pod("again")?;
        for round in 0..=DISK_SLOTS {
            // One after the other in the same slot, and an image after them.
            let disk = &disks[round % 2];
            let asked = vec![device(&disk.device, "/dev/block", "rw")];
            let container = pod.start_with(config(&pod, &format!("c{round}"), asked))?;
            let size = sh(&container, "busybox blockdev --getsize64 /dev/block")?;
            assert_eq!(size, ((1 + round % 2) * MIB).to_string());
            let mark = format!("round {round}");
            sh(
                &container,
                &format!("echo -n '{mark}' | dd of=/dev/block conv=notrunc"),
            )?;
            container.stop(0)?;
            container.remove()?;
            assert_eq!(disk.read(0, mark.len())?, mark.as_bytes());
        }
        // More than there is room for is refused, and takes nothing.
        let many: Vec<Loop> = (0..DISK_SLOTS)
            .map(|number| Loop::new(node, &format!("many{number}"), MIB))
            .collect::<Result<_>>()?;
        let asked = |count: usize| {
            let named = many[..count].iter().enumerate();
            let named = named.map(|(n, disk)| device(&disk.device, &format!("/dev/b{n}"), "rw"));
            named.collect::<Vec<_>>()
        };
        let message = refused(
            pod.create(config(&pod, "many", asked(DISK_SLOTS))),
            Code::ResourceExhausted,
            &["disk_slots", "block device"],
        )?;
        ensure!(message.contains("needs 9"), "{message}");
        let most = pod.start_with(config(&pod, "most", asked(DISK_SLOTS - 1)))?;
        sh(&most, "for n in 0 1 2 3 4 5 6; do head -c 1 /dev/b$n; done")?;
        most.stop(0)?;
        most.remove()?;
        disks.iter().chain(&many).try_for_each(Loop::is_free)
    })
}

#[test]
fn a_disk_outlives_the_daemon_and_goes_with_its_container() -> Result<()> {
    with_drupe(|node| {
        let disk = Loop::new(node, "disk", MIB)?;
        let pod = node.run_pod("restart")?;
        let asked = vec![device(&disk.device, "/dev/block", "rw")];
        let container = pod.start_with(config(&pod, "c", asked.clone()))?;
        node.kill_server()?;
        node.start_server()?;
        sh(&container, "echo -n kept | dd of=/dev/block conv=notrunc")?;
        let sharing = pod.start_with(config(&pod, "sharing", asked.clone()))?;
        assert_eq!(sh(&sharing, "head -c 4 /dev/block")?, "kept");
        sharing.stop(0)?;
        sharing.remove()?;
        assert_eq!(sh(&container, "head -c 4 /dev/block")?, "kept");
        node.kill_server()?;
        node.start_server()?;
        container.stop(0)?;
        container.remove()?;
        assert_eq!(disk.read(0, 4)?, b"kept");
        let next = pod.start_with(config(&pod, "next", asked))?;
        assert_eq!(sh(&next, "head -c 4 /dev/block")?, "kept");
        pod.stop()?;
        pod.remove()?;
        disk.is_free()
    })
}

#[test]
fn a_block_device_in_a_user_namespace_belongs_to_its_root() -> Result<()> {
    with_drupe(|node| {
        let disk = Loop::new(node, "disk", MIB)?;
        let mut config_of_pod = node.pod_config("userns");
        let mapping = || IdMapping {
            host_id: 131_072,
            container_id: 0,
            length: 65536,
        };
        let options = UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![mapping()],
            gids: vec![mapping()],
        };
        let linux = config_of_pod.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        context
            .namespace_options
            .get_or_insert_default()
            .userns_options = Some(options.clone());
        let pod = node.run_pod_with(config_of_pod)?;
        let mut config = config(&pod, "c", vec![device(&disk.device, "/dev/block", "rw")]);
        let namespaces = security(&mut config)
            .namespace_options
            .get_or_insert_default();
        namespaces.userns_options = Some(options);
        let container = pod.start_with(config)?;
        assert_eq!(sh(&container, "stat -c %u /dev/block")?, "0");
        sh(
            &container,
            "echo -n mapped | dd of=/dev/block conv=notrunc,fsync",
        )?;
        assert_eq!(disk.read(0, 6)?, b"mapped");
        Ok(())
    })
}
