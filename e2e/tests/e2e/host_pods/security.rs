//! What containers may do to the node.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::pod::{IDLE, security};
use e2e::{Pod, Server, eventually};

use super::{NETWORK, PATIENCE, container_config, idle, run};
use crate::{with_drupe, with_node};

#[test]
fn a_privileged_container_is_privileged_on_the_node_and_others_are_not() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "power", NETWORK)?;
        let plain = idle(&pod, "plain", NETWORK)?;
        ensure!(
            plain.exec(&["ls", "/dev/loop-control"]).is_err(),
            "a device"
        );
        let link = ["sh", "-c", "ip link add e2e-link type bridge"];
        ensure!(plain.exec(&link).is_err(), "it changes the node's network");
        ensure!(
            plain.exec(&["sh", "-c", "mount -t tmpfs t /tmp"]).is_err(),
            "it mounts"
        );
        ensure!(
            plain
                .exec(&["sh", "-c", "mknod /d b 7 0 && head -c 1 /d"])
                .is_err(),
            "it reads a disk of the node"
        );
        let mut config = container_config(&pod, "privileged", IDLE, NETWORK);
        security(&mut config).privileged = true;
        let privileged = pod.start_with(config)?;
        privileged.exec(&["ls", "/dev/loop-control", "/dev/kmsg"])?;
        privileged.exec(&link)?;
        let links = node.netns.links()?;
        privileged.exec(&["sh", "-c", "ip link delete e2e-link"])?;
        ensure!(links.iter().any(|link| link == "e2e-link"), "{links:?}");
        Ok(())
    })
}

/// Like [`container_config`], with the profile that is the runtime's.
fn confined(pod: &Pod, name: &str, command: &[&str]) -> ContainerConfig {
    let mut config = container_config(pod, name, command, NETWORK);
    security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: security_profile::ProfileType::RuntimeDefault.into(),
        ..Default::default()
    });
    config
}

#[test]
fn the_default_profile_lets_programs_run() -> Result<()> {
    with_node(|node| {
        let pod = run(node, "confined", NETWORK)?;
        let container = pod.start_with(confined(&pod, "c", IDLE))?;
        assert_eq!(
            container.exec(&["grep", "^Seccomp:", "/proc/1/status"])?,
            "Seccomp:\t2"
        );
        // What programs do: pipes, children, signals, files, clocks, sockets.
        let script = "set -e; seq 1000 | sort -r | head -1; sleep 0.01; mkdir /d; \
            echo x > /d/f; chmod 600 /d/f; chown 1:1 /d/f; ln -s f /d/l; mv /d/f /d/g; \
            touch -d @1 /d/g; stat -c %Y /d/g; rm -r /d; (sleep 5 & kill $!); date > /dev/null; \
            tar c /etc/passwd | tar t; df / > /dev/null; ulimit -n > /dev/null";
        let printed = container.exec(&["sh", "-c", script])?;
        assert_eq!(printed, "999\n1\netc/passwd");
        let serve = "echo hello > /x; exec httpd -f -p 127.0.0.1:8091 -h /";
        let _server = pod.start_with(confined(&pod, "server", &["sh", "-c", serve]))?;
        eventually("the server to answer", PATIENCE, || {
            container.exec(&["wget", "-qO-", "http://127.0.0.1:8091/x"])
        })?;
        // What a capability is for comes with it.
        let mut config = confined(&pod, "admin", IDLE);
        let capabilities = security(&mut config).capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["SYS_ADMIN".to_owned()];
        let admin = pod.start_with(config)?;
        admin.exec(&["mount", "-t", "tmpfs", "t", "/tmp"]).map(drop)
    })
}

#[test]
fn the_default_profile_refuses_namespaces_and_runs_32_bit_programs() -> Result<()> {
    const EPERM: i32 = 1;
    const ENOSYS: i32 = 38;
    const SIGCHLD: u32 = 17;
    const CLONE_NEWUSER: u32 = 0x1000_0000;
    const AF_VSOCK: u32 = 40;
    with_node(|node| {
        let tools = node.dir.join("tools");
        fs::create_dir(&tools)?;
        let install = |name: &str, program: Vec<u8>| -> Result<()> {
            fs::write(tools.join(name), program)?;
            let mode = fs::Permissions::from_mode(0o755);
            Ok(fs::set_permissions(tools.join(name), mode)?)
        };
        let calls = [
            ("unshare", 272, CLONE_NEWUSER, EPERM),
            ("clone", 56, CLONE_NEWUSER | SIGCHLD, EPERM),
            ("clone3", 435, 0, ENOSYS),
            ("socket", 41, AF_VSOCK, EPERM),
            ("keyctl", 250, 0, EPERM),
            ("io_uring_setup", 425, 0, EPERM),
        ];
        for (name, number, first, _) in calls {
            install(name, calling(number, first))?;
        }
        install("exit-7", exit_7())?;
        let pod = run(node, "refused", NETWORK)?;
        let mut config = confined(&pod, "c", IDLE);
        config.mounts = vec![Mount {
            container_path: "/tools".to_owned(),
            host_path: tools.display().to_string(),
            ..Default::default()
        }];
        let container = pod.start_with(config)?;
        let code = |name: &str| -> Result<i32> {
            let path = format!("/tools/{name}");
            Ok(container.exec_sync(&[path.as_str()], 20)?.exit_code)
        };
        for (name, _, _, errno) in calls {
            // containerd 1.6 knows neither of AF_VSOCK nor of io_uring.
            if node.server == Server::Drupe {
                assert_eq!(code(name)?, errno, "{name}");
            }
        }
        assert_eq!(code("exit-7")?, 7);
        Ok(())
    })
}

/// A program that makes one call and exits with its error.
pub(crate) fn calling(number: u32, first: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(number.to_le_bytes());
    code.push(0xbf);
    code.extend(first.to_le_bytes());
    // xor %esi, %esi; xor %edx, %edx; syscall; neg %eax; mov %eax, %edi
    code.extend([0x31, 0xf6, 0x31, 0xd2, 0x0f, 0x05, 0xf7, 0xd8, 0x89, 0xc7]);
    // mov $60, %eax; syscall
    code.extend([0xb8, 60, 0, 0, 0, 0x0f, 0x05]);
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
    let mut program = b"\x7fELF\x02\x01\x01".to_vec();
    program.resize(16, 0);
    put(&mut program, &[(2, 2), (62, 2), (1, 4)]);
    put(
        &mut program,
        &[(BASE + HEADERS, 8), (64, 8), (0, 8), (0, 4)],
    );
    put(
        &mut program,
        &[(64, 2), (56, 2), (1, 2), (0, 2), (0, 2), (0, 2)],
    );
    put(
        &mut program,
        &[(1, 4), (5, 4), (0, 8), (BASE, 8), (BASE, 8)],
    );
    put(&mut program, &[(size, 8), (size, 8), (0x1000, 8)]);
    program.extend(code);
    program
}

/// An i386 program that exits with 7: an ELF header, one segment, three
/// instructions.
fn exit_7() -> Vec<u8> {
    const BASE: u64 = 0x0804_8000;
    const HEADERS: u64 = 52 + 32;
    // mov $1, %eax; mov $7, %ebx; int $0x80
    let code = [0xb8, 1, 0, 0, 0, 0xbb, 7, 0, 0, 0, 0xcd, 0x80];
    let size = HEADERS + code.len() as u64;
    let mut program = b"\x7fELF\x01\x01\x01".to_vec();
    program.resize(16, 0);
    put(&mut program, &[(2, 2), (3, 2), (1, 4)]);
    put(
        &mut program,
        &[(BASE + HEADERS, 4), (52, 4), (0, 4), (0, 4)],
    );
    put(
        &mut program,
        &[(52, 2), (32, 2), (1, 2), (0, 2), (0, 2), (0, 2)],
    );
    put(&mut program, &[(1, 4), (0, 4), (BASE, 4), (BASE, 4)]);
    put(&mut program, &[(size, 4), (size, 4), (5, 4), (0x1000, 4)]);
    program.extend(code);
    program
}

/// Numbers, each in so many bytes.
fn put(program: &mut Vec<u8>, numbers: &[(u64, usize)]) {
    for (number, bytes) in numbers {
        program.extend(&number.to_le_bytes()[..*bytes]);
    }
}
