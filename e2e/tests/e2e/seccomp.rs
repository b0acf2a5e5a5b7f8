//! Seccomp profiles that are files of the node.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, ensure};
use cri_api::v1::security_profile::ProfileType;
use cri_api::v1::*;
use e2e::pod::{IDLE, Pod, security};
use tonic::Code;

use crate::host_pods::security::calling;
use crate::{refused, with_drupe};

const NO_CHMOD: &str = r#"{
    "defaultAction": "SCMP_ACT_ALLOW",
    "archMap": [{ "architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"] }],
    "syscalls": [
        { "names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 },
        { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO",
          "excludes": { "caps": ["CAP_NET_ADMIN"] } }
    ]
}"#;

fn config(pod: &Pod, name: &str, profile: &Path) -> ContainerConfig {
    let mut config = pod.container_config(name, IDLE);
    security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: profile.display().to_string(),
    });
    config
}

#[test]
fn a_profile_of_the_node_holds_for_a_container_and_its_commands() -> Result<()> {
    with_drupe(|node| {
        let profile = node.dir.join("profile.json");
        fs::write(&profile, NO_CHMOD)?;
        let pod = node.run_pod("filtered")?;
        let container = pod.start_with(config(&pod, "c", &profile))?;
        for command in [&["chmod", "400", "/tmp"][..], &["mkdir", "/new"]] {
            let answer = container.exec_sync(command, 20)?;
            let said = String::from_utf8_lossy(&answer.stderr);
            ensure!(
                said.contains("Operation not permitted"),
                "{command:?}: {said}"
            );
        }
        let mut with_capability = config(&pod, "capable", &profile);
        let capabilities = security(&mut with_capability)
            .capabilities
            .get_or_insert_default();
        capabilities.add_capabilities = vec!["NET_ADMIN".to_owned()];
        pod.start_with(with_capability)?.exec(&["mkdir", "/new"])?;

        let mut privileged = config(&pod, "privileged", &profile);
        security(&mut privileged).privileged = true;
        pod.start_with(privileged)?
            .exec(&["chmod", "400", "/tmp"])?;
        Ok(())
    })
}

#[test]
fn a_profile_that_cannot_be_used_is_named() -> Result<()> {
    with_drupe(|node| {
        let garbled = node.dir.join("garbled.json");
        fs::write(&garbled, "{")?;
        let pod = node.run_pod("unfiltered")?;
        for (path, code, part) in [
            (
                node.dir.join("missing.json"),
                Code::NotFound,
                "missing.json",
            ),
            (garbled, Code::InvalidArgument, "garbled.json"),
            (node.dir.clone(), Code::InvalidArgument, "no regular file"),
            (
                "profile.json".into(),
                Code::InvalidArgument,
                "localhost_ref",
            ),
        ] {
            refused(
                pod.create(config(&pod, "c", &path)).map(drop),
                code,
                &[part],
            )?;
        }
        // The name is free.
        pod.start_idle("c").map(drop)
    })
}

#[test]
fn the_default_profile_keeps_containers_from_the_ports_of_their_machine() -> Result<()> {
    const EPERM: i32 = 1;
    const SOCKET: u32 = 41;
    const AF_UNIX: u32 = 1;
    const AF_VSOCK: u32 = 40;
    with_drupe(|node| {
        let tools = node.dir.join("tools");
        fs::create_dir(&tools)?;
        for (name, family) in [("unix", AF_UNIX), ("vsock", AF_VSOCK)] {
            let tool = tools.join(name);
            // With a type that no family has.
            fs::write(&tool, calling(SOCKET, family))?;
            fs::set_permissions(&tool, fs::Permissions::from_mode(0o755))?;
        }
        let pod = node.run_pod("ports")?;
        let start = |name: &str, profile: ProfileType| {
            let mut config = pod.container_config(name, IDLE);
            config.mounts.push(Mount {
                container_path: "/tools".to_owned(),
                host_path: tools.display().to_string(),
                ..Default::default()
            });
            security(&mut config).seccomp = Some(SecurityProfile {
                profile_type: profile.into(),
                ..Default::default()
            });
            pod.start_with(config)
        };
        let confined = start("confined", ProfileType::RuntimeDefault)?;
        let free = start("free", ProfileType::Unconfined)?;
        for (container, tool, refused) in [
            (&confined, "vsock", true),
            (&confined, "unix", false),
            (&free, "vsock", false),
        ] {
            let path = format!("/tools/{tool}");
            let code = container.exec_sync(&[path.as_str()], 20)?.exit_code;
            ensure!(code != 0 && (code == EPERM) == refused, "{tool}: {code}");
        }
        Ok(())
    })
}
