//! A pod whose containers are in a user namespace, and image volumes in one.

use std::os::unix::fs::{PermissionsExt, symlink};

use agent_api::{ConfigureSandboxRequest, ImageVolume, UserNamespace};
use serde_json::json;
use tonic::Code;

use crate::harness::{Container, Guest, Image, Options, artifacts, configuration, refused};

fn with_users(host_id: u32, length: u32) -> ConfigureSandboxRequest {
    ConfigureSandboxRequest {
        user_namespace: Some(UserNamespace { host_id, length }),
        ..configuration()
    }
}

#[tokio::test]
async fn a_pod_without_a_network_can_have_a_user_namespace() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::start(&artifacts, Options::default()).await;
    let message = refused(
        guest.agent.configure_sandbox(with_users(1000, 0)).await,
        Code::InvalidArgument,
    );
    assert!(message.starts_with("0 ids from 1000 on"), "{message}");
    guest.configure(with_users(1000, 100_000)).await;
    // The same again does nothing.
    guest.configure(with_users(1000, 100_000)).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "cat /proc/self/uid_map; id -u; hostname; stat -c %u / /bin/sh; \
                  grep -c . /proc/net/dev; echo x > /dev/stdout";
    let (exit, output) = guest.run_to_end(Container::sh("one", &root, script)).await;
    assert_eq!(exit.code, 0, "{output}");
    let words: Vec<&str> = output.split_whitespace().collect();
    // Two lines of headings and the loopback.
    let expected = ["0", "1000", "100000", "0", "test-pod", "0", "0", "3", "x"];
    assert_eq!(words, expected);
    guest.remove("one").await;
    guest.shut_down().await;
}

#[tokio::test]
async fn a_directory_of_an_image_is_a_volume_and_no_link_leads_out_of_it() {
    let Some(artifacts) = artifacts() else { return };
    let tree = tempfile::tempdir().unwrap();
    let at = |name: &str| tree.path().join(name);
    std::fs::set_permissions(tree.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::create_dir(at("dir")).unwrap();
    std::fs::write(at("dir/file"), "of the image\n").unwrap();
    symlink("/dir", at("inside")).unwrap();
    symlink("../../../proc", at("outside")).unwrap();
    let mut guest = Guest::start(&artifacts, Options::default()).await;
    guest.configure(with_users(200_000, 65_536)).await;
    let root = guest.attach(&Image::busybox()).await;
    let disk = guest.attach(&Image::from_trees(&[tree.path()])).await;
    let container = |id: &str, sub_path: &str| {
        let mount =
            json!({ "destination": "/v", "type": "image", "source": "0", "options": ["ro"] });
        let script = "cat /v/file; stat -c %u /v/file; echo x > /v/file";
        let mut container = Container::sh(id, &root, script).mount(mount);
        container.image_volumes = vec![ImageVolume {
            disk: Some(disk.clone()),
            sub_path: sub_path.into(),
            container_path: "/v".into(),
        }];
        container
    };
    for (sub_path, code) in [
        ("outside", Code::NotFound),
        ("nowhere", Code::NotFound),
        ("dir/file", Code::InvalidArgument),
    ] {
        let message = refused(guest.create(container("none", sub_path)).await, code);
        assert!(
            message.starts_with("ImageVolumeMountFailed: /v: "),
            "{message}"
        );
    }
    // Each time the disk was given back.
    for (id, sub_path) in [("a", "dir"), ("b", "inside"), ("c", "../dir")] {
        let (exit, output) = guest.run_to_end(container(id, sub_path)).await;
        assert_eq!(output, "of the image\n0\n", "{sub_path}");
        assert_ne!(exit.code, 0);
        let errors = guest.output(id, "stderr");
        assert!(errors.contains("Read-only file system"), "{errors}");
        guest.remove(id).await;
    }
    guest.shut_down().await;
}
