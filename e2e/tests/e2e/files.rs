//! Host files and directories in a container, and its own writable root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{Result, ensure};
use cri_api::v1::*;

use crate::with_node;

fn mount(host: &std::path::Path, container: &str, readonly: bool) -> Mount {
    Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Default::default()
    }
}

#[test]
fn a_host_directory_is_seen_and_written_from_the_container() -> Result<()> {
    with_node(|node| {
        let shared = node.dir.join("shared");
        fs::create_dir(&shared)?;
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o777))?;
        fs::write(shared.join("from-host"), "host\n")?;
        let pod = node.run_pod("volumes")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config.mounts = vec![mount(&shared, "/data", false)];
        let container = pod.start_with(config)?;
        assert_eq!(container.exec(&["cat", "/data/from-host"])?, "host");
        container.exec(&["sh", "-c", "mkdir /data/sub && echo guest > /data/sub/from-guest && chmod 640 /data/sub/from-guest"])?;
        let written = shared.join("sub/from-guest");
        assert_eq!(fs::read_to_string(&written)?, "guest\n");
        assert_eq!(fs::metadata(&written)?.mode() & 0o777, 0o640);
        // What the host changes is seen at once, as configMap updates need.
        fs::write(shared.join("later"), "later\n")?;
        assert_eq!(container.exec(&["cat", "/data/later"])?, "later");
        let rename = "mv /data/later /data/moved && ln -s moved /data/link && cat /data/link && rm /data/moved";
        assert_eq!(container.exec(&["sh", "-c", rename])?, "later");
        ensure!(!shared.join("later").exists() && !shared.join("moved").exists());
        Ok(())
    })
}

#[test]
fn a_read_only_mount_refuses_writes() -> Result<()> {
    with_node(|node| {
        let shared = node.dir.join("shared");
        fs::create_dir(&shared)?;
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o777))?;
        fs::write(shared.join("file"), "original")?;
        let pod = node.run_pod("readonly")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config.mounts = vec![
            mount(&shared, "/data", true),
            mount(&shared.join("file"), "/etc/one-file", true),
        ];
        let container = pod.start_with(config)?;
        for script in [
            "echo x > /data/new",
            "echo x > /data/file",
            "rm /data/file",
            "echo x > /etc/one-file",
        ] {
            let answer = container.exec_sync(&["sh", "-c", script], 20)?;
            ensure!(answer.exit_code != 0, "{script} succeeded");
            let said = String::from_utf8_lossy(&answer.stderr);
            ensure!(said.contains("Read-only file system"), "{script}: {said}");
        }
        assert_eq!(fs::read_to_string(shared.join("file"))?, "original");
        Ok(())
    })
}

#[test]
fn a_single_host_file_is_mounted_over_the_images() -> Result<()> {
    with_node(|node| {
        let file = node.dir.join("hosts");
        fs::write(&file, "192.0.2.1 from-the-kubelet\n")?;
        let pod = node.run_pod("onefile")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config.mounts = vec![mount(&file, "/etc/hosts", false)];
        let container = pod.start_with(config)?;
        assert_eq!(
            container.exec(&["cat", "/etc/hosts"])?,
            "192.0.2.1 from-the-kubelet"
        );
        Ok(())
    })
}

#[test]
fn two_containers_share_a_volume() -> Result<()> {
    with_node(|node| {
        let shared = node.dir.join("shared");
        fs::create_dir(&shared)?;
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o777))?;
        let pod = node.run_pod("sharing")?;
        let start = |name: &str| {
            let mut config = pod.container_config(name, e2e::pod::IDLE);
            config.mounts = vec![mount(&shared, "/data", false)];
            pod.start_with(config)
        };
        let (writer, reader) = (start("writer")?, start("reader")?);
        let write = "dd if=/dev/urandom of=/data/blob bs=64k count=160 2> /dev/null && sha256sum < /data/blob";
        assert_eq!(
            writer.exec(&["sh", "-c", write])?,
            reader.exec(&["sh", "-c", "sha256sum < /data/blob"])?
        );
        Ok(())
    })
}

#[test]
fn what_a_container_writes_is_its_own() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("own")?;
        let first = pod.start_idle("first")?;
        first.exec(&[
            "sh",
            "-c",
            "echo changed > /etc/passwd; rm /etc/group; mkdir /etc/new",
        ])?;
        let second = pod.start_idle("second")?;
        ensure!(second.exec(&["cat", "/etc/passwd"])?.starts_with("root:"));
        second.exec(&["sh", "-c", "test -e /etc/group && test ! -e /etc/new"])?;
        Ok(())
    })
}

#[test]
fn a_read_only_root_stays_as_the_image_is() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("fixed")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        e2e::pod::security(&mut config).readonly_rootfs = true;
        let container = pod.start_with(config)?;
        let answer = container.exec_sync(&["sh", "-c", "echo x > /new"], 20)?;
        ensure!(
            answer.exit_code != 0,
            "a write to a read-only root succeeded"
        );
        container
            .exec(&["sh", "-c", "echo x > /dev/shm/new"])
            .map(drop)
    })
}
