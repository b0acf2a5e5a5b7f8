//! Machines that cannot be made, do not come up or lose a part of the node:
//! told by that part's name, and nothing left.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::{PodSandboxState, PodSandboxStatusRequest};
use e2e::machine::Machine;
use e2e::{Container, Node, Pod, Server, artifacts};
use serde_json::json;
use tonic::Code;

use crate::command_line::drupe_command;
use crate::machine::{assert_ended, await_end};
use crate::{on_drupe, pod_refused, took_less, with_drupe};

#[test]
fn a_guest_kernel_that_does_not_boot_is_told_with_its_last_words() -> Result<()> {
    let node = Node::builder()
        .config(|config| {
            config["runtimes"]["microvm"]["kernel_args"] = json!(["rdinit=/no/such/init"])
        })
        .start()?;
    on_drupe(node, |node| {
        let begun = Instant::now();
        // The panic's reason, and the console's lines around it.
        pod_refused(
            node,
            "panics",
            Code::Internal,
            &[
                "phase boot",
                "kernel panic: ",
                "console",
                "Kernel panic - not syncing",
            ],
        )?;
        took_less(begun, Duration::from_secs(20))?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_missing_guest_kernel_is_named() -> Result<()> {
    let node = Node::builder()
        .config(|config| config["runtimes"]["microvm"]["kernel"] = json!("/no/such/kernel"))
        .start()?;
    on_drupe(node, |node| {
        pod_refused(
            node,
            "kernelless",
            Code::Internal,
            &["phase vmm", "/no/such/kernel", "No such file"],
        )?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_guest_kernel_that_is_no_kernel_is_named() -> Result<()> {
    let node = Node::builder().prepare()?;
    let broken = node.dir.join("broken-kernel");
    fs::write(&broken, "not a kernel")?;
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755))?;
    node.edit_config(|config| config["runtimes"]["microvm"]["kernel"] = json!(broken))?;
    node.start_server()?;
    on_drupe(node, |node| {
        pod_refused(
            node,
            "kernelless",
            Code::Internal,
            &["phase vmm", "broken-kernel", "is no kernel"],
        )?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_guest_that_never_reports_ready_is_given_up_with_its_last_words() -> Result<()> {
    let node = Node::builder()
        .config(|config| config["runtimes"]["microvm"]["boot_timeout_seconds"] = json!(2))
        .prepare()?;
    let initramfs = silent_initramfs(&node)?;
    node.edit_config(|config| config["runtimes"]["microvm"]["initramfs"] = json!(initramfs))?;
    node.start_server()?;
    on_drupe(node, |node| {
        let begun = Instant::now();
        pod_refused(
            node,
            "silent",
            Code::DeadlineExceeded,
            &["phase boot", "2 s", "console", "no agent in here"],
        )?;
        took_less(begun, Duration::from_secs(20))?;
        node.assert_no_pod_left()
    })
}

/// An initramfs that boots, says something and then nothing.
fn silent_initramfs(node: &Node) -> Result<std::path::PathBuf> {
    let script = "set -e; mkdir -p tree/bin tree/dev; cd tree; cp /bin/busybox bin; \
                  printf '#!/bin/busybox sh\nbusybox mount -t devtmpfs none /dev\n\
                  echo no agent in here > /dev/console\nexec busybox sleep 100000\n' > init; \
                  chmod 755 init; find . | cpio --quiet -o -H newc > ../silent";
    let output = std::process::Command::new("sh")
        .args(["-c", script])
        .current_dir(&node.dir)
        .output()
        .context("sh")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(node.dir.join("silent"))
}

#[test]
fn an_initramfs_larger_than_the_guests_memory_is_named() -> Result<()> {
    let node = Node::builder().prepare()?;
    let large = node.dir.join("large");
    fs::File::create(&large)?.set_len(4 << 30)?;
    node.edit_config(|config| config["runtimes"]["microvm"]["initramfs"] = json!(large))?;
    node.start_server()?;
    on_drupe(node, |node| {
        pod_refused(
            node,
            "large",
            Code::Internal,
            &[
                "phase vmm",
                "the initramfs of 4294967296 bytes",
                "memory of",
            ],
        )?;
        node.assert_no_pod_left()
    })
}

#[test]
fn virtual_machines_that_the_node_does_not_let_drupe_have_are_named() -> Result<()> {
    let node = Node::builder().without_kvm().prepare()?;
    let kernel = artifacts::guest_kernel(Machine::Kvm)?;
    node.edit_config(|config| {
        config["runtimes"]["microvm"]["machine"] = json!("kvm");
        config["runtimes"]["microvm"]["kernel"] = json!(kernel);
    })?;
    node.start_server()?;
    on_drupe(node, |node| {
        pod_refused(
            node,
            "kvm",
            Code::FailedPrecondition,
            &["phase vmm", "/dev/kvm", "`drupe check`"],
        )?;
        ensure!(
            node.log()?.contains("pods of this handler cannot start"),
            "no word of it when the daemon started"
        );
        node.assert_no_pod_left()
    })
}

#[test]
fn pods_that_have_had_kvm_are_not_given_uml_unless_somebody_says_so() -> Result<()> {
    let has_kvm = Machine::under_test()? == Machine::Kvm;
    let node = Node::builder().server(Server::Drupe).prepare()?;
    let kernels = artifacts::guest_kernel(Machine::Uml)?.with_file_name("kernel-{machine}");
    let choose = |machine: &str| {
        node.edit_config(|config| {
            config["runtimes"]["microvm"]["machine"] = json!(machine);
            config["runtimes"]["microvm"]["kernel"] = json!(kernels);
            // The mode that an emulated CPU, which has no XSAVE, can as well.
            config["runtimes"]["microvm"]["uml_mode"] = json!("ptrace");
        })
    };
    choose("auto")?;
    let kept = node.root().join("machines.json");
    let mut before = None;
    if has_kvm {
        node.start_server()?;
        let pod = node.run_pod("before")?;
        assert_eq!(machine_of(&node, &pod)?, "kvm");
        before = Some(pod);
        node.stop_server()?;
    } else {
        // As a daemon leaves it on a node that has kvm.
        let entry = json!({ "machine": "kvm", "why": "auto: the CPU has svm and /dev/kvm opens" });
        fs::write(&kept, json!({ "microvm": entry }).to_string())?;
    }

    node.let_have_kvm(false);
    node.start_server()?;
    let words = [
        "\"microvm\"",
        "have had kvm on this node",
        "/dev/kvm opens",
        "`machine: uml`",
    ];
    pod_refused(&node, "fallen", Code::FailedPrecondition, &words)?;
    ensure!(
        node.log()?.contains("pods of this handler cannot start"),
        "no word of it when the daemon started"
    );
    if let Some(pod) = before {
        assert_eq!(pod.status()?.state(), PodSandboxState::SandboxReady);
        pod.stop()?;
        pod.remove()?;
    } else {
        let output = drupe_command(&node, &["check"])?.output()?;
        let said = String::from_utf8(output.stdout)?;
        assert_eq!(output.status.code(), Some(1), "{said}");
        let line = said.lines().find(|line| line.contains("handler microvm "));
        let line = line.with_context(|| said.clone())?;
        ensure!(
            line.starts_with("BAD") && line.contains("have had kvm"),
            "{line}"
        );
    }
    ensure!(
        fs::read_to_string(&kept)?.contains("kvm"),
        "it was forgotten"
    );

    // Who has said it once need not say it again.
    for machine in ["uml", "auto"] {
        node.stop_server()?;
        choose(machine)?;
        node.start_server()?;
        runs_on(&node, machine, "uml")?;
    }
    if has_kvm {
        node.stop_server()?;
        node.let_have_kvm(true);
        node.start_server()?;
        runs_on(&node, "back", "kvm")?;
    }
    node.finish()
}

fn runs_on(node: &Node, name: &str, machine: &str) -> Result<()> {
    let pod = node.run_pod(name)?;
    assert_eq!(machine_of(node, &pod)?, machine);
    pod.stop()?;
    pod.remove()?;
    Ok(())
}

/// What the pod's kernel runs on.
fn machine_of(node: &Node, pod: &Pod) -> Result<String> {
    let status = node.cri()?.pod_sandbox_status(PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    })?;
    let info = status.info.get("info").context("no information")?;
    let info: serde_json::Value = serde_json::from_str(info)?;
    Ok(info["machine"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_disk_that_shrinks_ends_its_pod_by_name() -> Result<()> {
    ends_by_name("shrunk", &["scratch", "shrunk"], |node, pod, container| {
        let disk = fs::read_dir(node.root().join("scratch"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                let name = path.file_stem().and_then(|name| name.to_str());
                name.is_some_and(|name| pod.id.starts_with(name))
            })
            .context("the pod has no scratch disk")?;
        fs::File::options()
            .write(true)
            .open(&disk)?
            .set_len(1 << 20)?;
        // Whatever lies beyond is not there any more.
        let script = "dd if=/dev/zero of=/file bs=1M count=64 && sync && echo 3 > /proc/sys/vm/drop_caches; cat /file";
        let _ended = container.exec_sync(&["sh", "-c", script], 20);
        Ok(())
    })
}

#[test]
fn a_tap_that_vanishes_ends_its_pod_by_name() -> Result<()> {
    ends_by_name("tapless", &["tap0", "gone"], |node, pod, _| {
        let netns = fs::read_dir(node.netns_dir())?
            .next()
            .with_context(|| format!("no network namespace of {}", pod.id))??;
        let enter = format!("--net={}", netns.path().display());
        let arguments = [&enter, "ip", "link", "delete", "tap0"];
        node.netns.output("nsenter", &arguments).map(drop)
    })
}

/// Runs a pod of which `lose` takes something away, and sees it end for a
/// reason that has all of `words`.
fn ends_by_name(
    name: &str,
    words: &[&str],
    lose: impl FnOnce(&Node, &Pod, &Container) -> Result<()>,
) -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod(name)?;
        let container = pod.start_idle("idle")?;
        lose(node, &pod, &container)?;
        let status = await_end(&pod, &container)?;
        for word in words {
            ensure!(status.message.contains(word), "{}", status.message);
        }
        assert_ended(node, &pod, &container)
    })
}
