//! What files and devices a container sees.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::mount::{MsFlags, mount};
use serde_json::json;

use crate::harness::{Container, Guest, Image, artifacts, busybox_tree};

#[tokio::test]
async fn images_of_many_layers_show_the_highest_of_each_file() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let base = busybox_tree();
    let uppers: Vec<tempfile::TempDir> = (0..126)
        .map(|number| {
            let tree = tempfile::tempdir().unwrap();
            fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).unwrap();
            fs::write(
                tree.path().join(format!("file{number}")),
                number.to_string(),
            )
            .unwrap();
            fs::write(tree.path().join("top"), number.to_string()).unwrap();
            tree
        })
        .collect();
    let whiteout = tempfile::tempdir().unwrap();
    fs::set_permissions(whiteout.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let kind = nix::sys::stat::SFlag::S_IFCHR;
    let mode = nix::sys::stat::Mode::empty();
    nix::sys::stat::mknod(&whiteout.path().join("file3"), kind, mode, 0).unwrap();
    let mut trees = vec![base.path()];
    trees.extend(uppers.iter().map(tempfile::TempDir::path));
    trees.push(whiteout.path());
    let image = Image::from_trees(&trees);
    let root = guest.attach(&image).await;
    let script = "cat /top; echo; ls / | grep -c file; ls /file3";
    let (exit, output) = guest.run_to_end(Container::sh("deep", &root, script)).await;
    assert_eq!((exit.code, output.as_str()), (1, "125\n125\n"));
    guest.remove("deep").await;
    // The slot's partitions are gone: another image takes its place.
    guest.control.detach_disk(root.slot).await.unwrap();
    let small = Image::busybox();
    let root = guest.attach(&small).await;
    assert_eq!(
        guest
            .run_to_end(Container::sh("after", &root, "true"))
            .await
            .0
            .code,
        0
    );
    guest.shut_down().await;
}

#[tokio::test]
async fn volumes_come_from_the_shared_directory() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    // What is mounted there can be written; the directory itself cannot.
    let (shared, data) = (guest.path("shared"), guest.path("data"));
    for dir in [&data, &shared.join("data")] {
        fs::create_dir(dir).unwrap();
    }
    fs::set_permissions(&data, fs::Permissions::from_mode(0o777)).unwrap();
    let none = None::<&str>;
    mount(
        Some(&data),
        &shared.join("data"),
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
    fs::write(data.join("in"), "from the host\n").unwrap();
    fs::write(shared.join("hosts"), "1.2.3.4 kubelet\n").unwrap();
    let bind = |target: &str, source: &str, mode: &str| {
        json!({ "destination": target, "type": "bind", "source": format!("/run/drupe/shared/{source}"),
                "options": ["rbind", "rprivate", mode] })
    };
    let script = "cat /data/in /etc/hosts; echo out > /data/out; touch /ro/x || echo read-only; \
                  cat /etc/resolv.conf; touch /bin/x || echo root; ls /proc/keys; cat /proc/keys; \
                  echo 1 > /proc/sys/vm/swappiness || echo sys";
    let container = Container::sh("vol", &root, script)
        .mount(bind("/data", "data", "rw"))
        .mount(bind("/ro", "data", "ro"))
        .mount(bind("/etc/hosts", "hosts", "rw"))
        .set("/root/readonly", json!(true));
    let (exit, output) = guest.run_to_end(container).await;
    assert_eq!(exit.code, 0);
    let expected = "from the host\n1.2.3.4 kubelet\nread-only\nroot\n/proc/keys\nsys\n";
    assert_eq!(output, expected, "{}", guest.output("vol", "stderr"));
    assert_eq!(fs::read_to_string(data.join("out")).unwrap(), "out\n");
    guest.shut_down().await;
}

#[tokio::test]
async fn a_container_cannot_use_the_guests_disks() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "mknod /dev/disk b $(cut -d: -f1 /sys/block/vda/dev) 0 && head -c 1 /dev/disk; \
                  head -c 1 /dev/zero | wc -c; echo x > /dev/null && echo fine";
    let (_, output) = guest.run_to_end(Container::sh("dev", &root, script)).await;
    assert_eq!(output, "1\nfine\n");
    let errors = guest.output("dev", "stderr");
    assert!(
        errors.contains("/dev/disk: Operation not permitted"),
        "{errors}"
    );

    let root = guest.attach(&Image::busybox()).await;
    let script =
        "mknod /dev/disk b $(cut -d: -f1 /sys/block/vda/dev) 0; head -c 1 /dev/disk | wc -c";
    let all = json!({ "devices": [{ "allow": true, "access": "rwm" }] });
    let container = Container::sh("all", &root, script).set("/linux/resources", all);
    assert_eq!(guest.run_to_end(container).await.1, "1\n");
    guest.shut_down().await;
}
