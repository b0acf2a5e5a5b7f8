//! Devices by names that vendors' files on the node give a meaning to (CDI).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::Node;
use e2e::pod::IDLE;
use tonic::Code;

use crate::devices::{config, fails, on_host, sh};
use crate::{on_drupe, refused};

/// A node with CDI directories of its own.
fn with_cdi(test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let node = Node::builder().config(|config| {
        let root = PathBuf::from(config["root"].as_str().unwrap_or_default());
        let dir = root.parent().unwrap_or(Path::new("/")).to_owned();
        config["cdi_spec_dirs"] = serde_json::json!([dir.join("cdi-etc"), dir.join("cdi-run")]);
    });
    let node = node.start()?;
    for dir in ["cdi-etc", "cdi-run"] {
        fs::create_dir(node.dir.join(dir))?;
    }
    node.pull_busybox()?;
    on_drupe(node, test)
}

fn by_cdi(mut config: ContainerConfig, names: &[&str]) -> ContainerConfig {
    let device = |name: &&str| CdiDevice {
        name: (*name).to_owned(),
    };
    config.cdi_devices = names.iter().map(device).collect();
    config
}

#[test]
fn a_vendors_device_brings_its_environment_mounts_and_nodes() -> Result<()> {
    with_cdi(|node| {
        let library = node.dir.join("library");
        fs::create_dir(&library)?;
        fs::write(library.join("lib.so"), "code")?;
        let text = format!(
            r#"
cdiVersion: 0.8.0
kind: vendor.com/class
containerEdits:
  env: [VENDOR=all]
devices:
- name: fuse
  containerEdits:
    env: [DEVICE=fuse]
    additionalGids: [4711]
    deviceNodes: [{{path: /dev/vendor, hostPath: /dev/fuse, permissions: rw}}]
    mounts: [{{hostPath: {}, containerPath: /opt/vendor, options: [ro, nosuid, nodev, bind]}}]
"#,
            library.display()
        );
        fs::write(node.dir.join("cdi-etc/vendor.yaml"), text)?;
        fs::write(node.dir.join("cdi-run/broken.json"), "{")?;
        for pod in [node.run_pod("own")?, on_host(node, "host")?] {
            let config = by_cdi(config(&pod, "c", Vec::new()), &["vendor.com/class=fuse"]);
            let container = pod.start_with(config)?;
            assert_eq!(sh(&container, "echo $VENDOR $DEVICE")?, "all fuse");
            assert_eq!(sh(&container, "cat /opt/vendor/lib.so")?, "code");
            fails(&container, "echo x > /opt/vendor/lib.so")?;
            let mounted = sh(&container, "grep ' /opt/vendor ' /proc/mounts")?;
            ensure!(mounted.contains("nosuid"), "{mounted}");
            assert_eq!(sh(&container, "stat -c %t:%T /dev/vendor")?, "a:e5");
            sh(&container, "exec 3<> /dev/vendor")?;
            let groups = sh(&container, "id -G")?;
            ensure!(groups.split(' ').any(|gid| gid == "4711"), "{groups}");

            // The same by annotation, as a device plugin asks.
            let mut annotated = pod.container_config("annotated", &["true"]);
            let key = "cdi.k8s.io/vendor-plugin".to_owned();
            annotated
                .annotations
                .insert(key.clone(), "vendor.com/class=fuse".to_owned());
            annotated.command = ["sh", "-c", "echo $DEVICE"].map(str::to_owned).to_vec();
            let container = pod.start_with(annotated.clone())?;
            container.wait_exit()?;
            assert_eq!(container.stdout()?, "fuse\n");

            annotated.annotations.insert(key, "vendor.com".to_owned());
            annotated.metadata.get_or_insert_default().attempt = 1;
            refused(
                pod.create(annotated),
                Code::InvalidArgument,
                &["cdi.k8s.io/", "\"vendor.com\""],
            )?;
            let unknown = by_cdi(
                pod.container_config("unknown", IDLE),
                &["vendor.com/class=no"],
            );
            refused(
                pod.create(unknown),
                Code::NotFound,
                &[
                    "unresolvable CDI devices vendor.com/class=no",
                    "broken.json",
                ],
            )?;
        }
        Ok(())
    })
}

#[test]
fn a_vendors_hooks_run_for_pods_on_the_nodes_kernel_only() -> Result<()> {
    with_cdi(|node| {
        let (hook, ran) = (node.dir.join("hook.sh"), node.dir.join("ran"));
        let script = format!(
            "#!/bin/sh\ncat > /dev/null\necho \"$1 $WHO\" >> {}\n",
            ran.display()
        );
        fs::write(&hook, script)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&hook, mode)?;
        let spec = serde_json::json!({
            "cdiVersion": "0.6.0",
            "kind": "vendor.com/class",
            "devices": [{
                "name": "hooked",
                "containerEdits": { "hooks": [{
                    "hookName": "createRuntime",
                    "path": hook,
                    "args": ["hook.sh", "made"],
                    "env": ["WHO=vendor", "PATH=/usr/bin:/bin"],
                }] },
            }],
        });
        fs::write(node.dir.join("cdi-run/vendor.json"), spec.to_string())?;
        let names = ["vendor.com/class=hooked"];
        let pod = on_host(node, "host")?;
        pod.start_with(by_cdi(config(&pod, "c", Vec::new()), &names))?;
        assert_eq!(fs::read_to_string(&ran)?, "made vendor\n");

        let pod = node.run_pod("own")?;
        refused(
            pod.create(by_cdi(config(&pod, "c", Vec::new()), &names)),
            Code::FailedPrecondition,
            &[
                "vendor.com/class=hooked",
                "createRuntime",
                "hook.sh",
                "\"host\"",
            ],
        )
        .map(drop)
    })
}
