//! Volumes, images and what the pod gives its containers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::eventually;
use e2e::pod::{IDLE, security};
use tonic::Code;

use super::{NETWORK, PATIENCE, container_config, idle, run};
use crate::{refused, with_drupe, with_node};

#[test]
fn mounts_travel_as_the_volume_says() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "mounter", NETWORK)?;
        let shared = node.dir.join("shared");
        fs::create_dir(&shared)?;
        let sh = |script: &str| node.netns.output("sh", &["-c", script]).map(drop);
        let at = shared.display();
        sh(&format!(
            "mount --bind {at} {at} && mount --make-shared {at}"
        ))?;
        let test = || -> Result<()> {
            let volume = |propagation: MountPropagation| Mount {
                container_path: "/v".to_owned(),
                host_path: shared.display().to_string(),
                propagation: propagation.into(),
                ..Default::default()
            };
            let with = |name: &str, propagation| {
                let mut config = container_config(&pod, name, IDLE, NETWORK);
                config.mounts = vec![volume(propagation)];
                security(&mut config).privileged = true;
                pod.start_with(config)
            };
            let both = with("both", MountPropagation::PropagationBidirectional)?;
            let down = with("down", MountPropagation::PropagationHostToContainer)?;
            let none = with("none", MountPropagation::PropagationPrivate)?;
            both.exec(&[
                "sh",
                "-c",
                "mkdir /v/a && mount -t tmpfs t /v/a && echo up > /v/a/f",
            ])?;
            assert_eq!(fs::read_to_string(shared.join("a/f"))?, "up\n");
            assert_eq!(down.exec(&["cat", "/v/a/f"])?, "up");
            ensure!(none.exec(&["cat", "/v/a/f"]).is_err(), "it travelled");
            down.exec(&[
                "sh",
                "-c",
                "mkdir /v/b && mount -t tmpfs t /v/b && echo x > /v/b/f",
            ])?;
            ensure!(!shared.join("b/f").exists(), "it travelled up");
            sh(&format!("umount {at}/a"))?;
            for container in [&both, &down, &none] {
                container.stop(0)?;
            }
            Ok(())
        };
        let tested = test();
        sh(&format!("umount -R {at}"))?;
        tested?;
        // A promise that cannot be kept is not made.
        let private = node.dir.join("private");
        fs::create_dir(&private)?;
        let at = private.display();
        sh(&format!(
            "mount --bind {at} {at} && mount --make-private {at}"
        ))?;
        let mut config = container_config(&pod, "refused", IDLE, NETWORK);
        config.mounts = vec![Mount {
            container_path: "/v".to_owned(),
            host_path: private.display().to_string(),
            propagation: MountPropagation::PropagationBidirectional.into(),
            ..Default::default()
        }];
        let created = pod.create(config).map(|container| container.id);
        sh(&format!("umount {at}"))?;
        refused(created, Code::InvalidArgument, &["private", "not shared"])?;
        Ok(())
    })
}

#[test]
fn images_profiles_and_read_only_trees_are_as_in_any_pod() -> Result<()> {
    with_drupe(|node| {
        let tree = node.dir.join("tree");
        fs::create_dir_all(tree.join("below"))?;
        let below = tree.join("below").display().to_string();
        let sh = |script: &str| node.netns.output("sh", &["-c", script]).map(drop);
        let profile = node.dir.join("profile.json");
        let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}"#;
        fs::write(&profile, text)?;
        let pod = run(node, "usual", NETWORK)?;
        let mut config = container_config(&pod, "c", IDLE, NETWORK);
        security(&mut config).seccomp = Some(SecurityProfile {
            profile_type: security_profile::ProfileType::Localhost.into(),
            localhost_ref: profile.display().to_string(),
        });
        let image = |at: &str, sub_path: &str| Mount {
            container_path: at.to_owned(),
            image: Some(ImageSpec {
                image: e2e::node::BUSYBOX.to_owned(),
                ..Default::default()
            }),
            image_sub_path: sub_path.to_owned(),
            readonly: true,
            ..Default::default()
        };
        config.mounts = vec![
            image("/image", ""),
            Mount {
                container_path: "/tree".to_owned(),
                host_path: tree.display().to_string(),
                readonly: true,
                recursive_read_only: true,
                ..Default::default()
            },
            image("/tools", "bin"),
        ];
        sh(&format!("mount -t tmpfs t {below}"))?;
        let container = pod.start_with(config.clone());
        let test = || -> Result<()> {
            let container = container?;
            container.exec(&["/image/bin/busybox", "true"])?;
            container.exec(&["/tools/busybox", "true"])?;
            for path in ["/image/x", "/tools/x", "/tree/x", "/tree/below/x"] {
                let answer = container.exec_sync(&["touch", path], 20)?;
                let said = String::from_utf8_lossy(&answer.stderr);
                ensure!(said.contains("Read-only file system"), "{path}: {said}");
            }
            let answer = container.exec_sync(&["mkdir", "/tmp/x"], 20)?;
            let said = String::from_utf8_lossy(&answer.stderr);
            ensure!(said.contains("Operation not permitted"), "{said}");
            Ok(container.stop(0)?)
        };
        let tested = test();
        sh(&format!("umount {below}"))?;
        tested?;

        config.metadata.get_or_insert_default().attempt = 1;
        config.mounts = vec![image("/image", "no/such")];
        refused(
            pod.create(config).map(|container| container.id),
            Code::NotFound,
            &["ImageVolumeMountFailed", "/image", "no/such"],
        )?;
        idle(&pod, "after", NETWORK).map(drop)
    })
}

#[test]
fn a_volumes_path_that_is_not_there_becomes_a_directory() -> Result<()> {
    with_node(|node| {
        let pod = run(node, "first", NETWORK)?;
        let path = node.dir.join("not/there/yet");
        let mut config = container_config(&pod, "c", IDLE, NETWORK);
        config.mounts = vec![Mount {
            container_path: "/data".to_owned(),
            host_path: path.display().to_string(),
            ..Default::default()
        }];
        let container = pod.start_with(config)?;
        container.exec(&["touch", "/data/x"])?;
        ensure!(path.join("x").exists(), "it is elsewhere");
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o755);
        Ok(())
    })
}

#[test]
fn a_volume_at_etc_or_dev_does_not_hide_what_the_pod_has_there() -> Result<()> {
    with_node(|node| {
        let etc = node.dir.join("etc");
        fs::create_dir(&etc)?;
        fs::write(etc.join("own"), "of the volume")?;
        for name in ["passwd", "group"] {
            fs::write(etc.join(name), "")?;
        }
        let pod = run(node, "covered", NETWORK)?;
        let volume = |from: &str, to: &str| Mount {
            container_path: to.to_owned(),
            host_path: from.to_owned(),
            ..Default::default()
        };
        let mut config = container_config(&pod, "c", IDLE, NETWORK);
        config.mounts = vec![
            volume(&etc.display().to_string(), "/etc"),
            volume("/dev", "/dev"),
        ];
        let container = pod.start_with(config)?;
        assert_eq!(container.exec(&["cat", "/etc/own"])?, "of the volume");
        let hosts = container.exec(&["cat", "/etc/hosts"])?;
        assert_eq!(hosts.trim(), fs::read_to_string("/etc/hosts")?.trim());
        // Nor is the node's shared memory the pod's.
        let mounts = container.exec(&["cat", "/proc/mounts"])?;
        let last = |at: &str| {
            mounts
                .lines()
                .rev()
                .find(|l| l.split(' ').nth(1) == Some(at))
        };
        ensure!(
            last("/dev/shm").is_some_and(|l| l.starts_with("shm ")),
            "{mounts}"
        );
        ensure!(
            last("/dev/pts").is_some_and(|l| l.starts_with("devpts ")),
            "{mounts}"
        );
        Ok(())
    })
}

#[test]
fn what_is_written_to_the_pods_files_is_on_disk_and_goes_with_the_pod() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "filler", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        container.exec(&["sh", "-c", "head -c 3000000 /dev/zero >> /etc/hosts"])?;
        let of = |dir: &Path| -> Result<bool> {
            let files = e2e::leaks::files_below(dir)?;
            Ok(files.iter().any(|file| {
                file.ends_with("etc/hosts")
                    && fs::metadata(file).is_ok_and(|metadata| metadata.len() >= 3_000_000)
            }))
        };
        ensure!(of(&node.root())?, "it is not below the root");
        pod.stop()?;
        ensure!(!of(&node.root().join("scratch"))?, "it is left");
        eventually("it to be deleted", PATIENCE, || {
            let left = fs::read_dir(node.root().join("trash"))?.count();
            ensure!(left == 0, "{left} left");
            Ok::<_, anyhow::Error>(())
        })?;
        pod.remove()?;
        node.assert_no_pod_left()
    })
}
