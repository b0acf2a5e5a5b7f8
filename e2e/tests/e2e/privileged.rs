//! What a privileged container may do, and where there may be one.

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::Node;
use e2e::pod::{Container, IDLE, Pod, security};
use tonic::Code;

use crate::{refused, with_drupe, with_node};

/// What the kubelet sends whenever ProcMount is Default, for privileged
/// containers as well.
const MASKED: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

fn as_the_kubelet(mut config: ContainerConfig, privileged: bool) -> ContainerConfig {
    let list = |paths: &[&str]| paths.iter().map(|&path| path.to_owned()).collect();
    let context = security(&mut config);
    context.privileged = privileged;
    context.masked_paths = list(MASKED);
    context.readonly_paths = list(READ_ONLY);
    config
}

fn start(pod: &Pod, name: &str, privileged: bool) -> Result<Container> {
    pod.start_with(as_the_kubelet(pod.container_config(name, IDLE), privileged))
}

fn succeeds(container: &Container, script: &str) -> Result<bool> {
    Ok(container.exec_sync(&["sh", "-c", script], 20)?.exit_code == 0)
}

#[test]
fn kernel_parameters_are_a_privileged_containers_to_set() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("tuned")?;
        let set = "echo core.e2e > /proc/sys/kernel/core_pattern";
        let plain = start(&pod, "plain", false)?;
        let answer = plain.exec_sync(&["sh", "-c", set], 20)?;
        let said = String::from_utf8_lossy(&answer.stderr);
        ensure!(said.contains("Read-only file system"), "{said}");
        let masked = "grep -c ' /proc/interrupts ' /proc/mounts";
        ensure!(succeeds(&plain, masked)?, "it is not masked");

        let privileged = start(&pod, "privileged", true)?;
        privileged.exec(&["sh", "-c", set])?;
        let read = ["cat", "/proc/sys/kernel/core_pattern"];
        assert_eq!(plain.exec(&read)?, "core.e2e");
        ensure!(!succeeds(&privileged, masked)?, "it is masked");
        Ok(())
    })
}

#[test]
fn nothing_is_masked_in_a_privileged_container_of_the_nodes_kernel() -> Result<()> {
    with_drupe(|node| {
        let pod = on_the_nodes_network(node, "tuned-node")?;
        let paths = "grep -cE ' /proc/(sys|interrupts) ' /proc/mounts";
        let in_pod = |mut config: ContainerConfig| {
            let options = security(&mut config)
                .namespace_options
                .get_or_insert_default();
            options.network = NamespaceMode::Node.into();
            pod.start_with(config)
        };
        let plain = in_pod(as_the_kubelet(pod.container_config("plain", IDLE), false))?;
        assert_eq!(plain.exec(&["sh", "-c", paths])?, "2");
        let privileged = in_pod(as_the_kubelet(pod.container_config("all", IDLE), true))?;
        ensure!(!succeeds(&privileged, paths)?, "something is restricted");
        Ok(())
    })
}

fn on_the_nodes_network(node: &Node, name: &str) -> Result<Pod> {
    let mut config = node.pod_config(name);
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    let options = context.namespace_options.get_or_insert_default();
    options.network = NamespaceMode::Node.into();
    node.run_pod_with(config)
}

#[test]
fn the_guests_devices_are_there_but_not_its_disks() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("devices")?;
        let privileged = start(&pod, "privileged", true)?;
        let files = "for f in /dev/fuse /dev/net/tun /dev/loop-control /dev/kmsg; do
                         test -c $f || echo no $f
                     done";
        assert_eq!(privileged.exec(&["sh", "-c", files])?, "");
        // The guest has disks: this container's root is on one of them.
        let disks = "ls /sys/block | grep -c '^vd'";
        ensure!(
            privileged.exec(&["sh", "-c", disks])? != "0",
            "no disk at all"
        );
        let hidden = "find /dev -type b ! -name 'loop*'; ls -d /dev/vd* /dev/vsock /dev/vport* \
                      /dev/hvc* /dev/ttyS* /dev/tty0 2> /dev/null; true";
        assert_eq!(privileged.exec(&["sh", "-c", hidden])?, "");

        // They work.
        privileged.exec(&["busybox", "tunctl", "-t", "tap-e2e"])?;
        privileged.exec(&["ip", "link", "show", "tap-e2e"])?;
        let of_loop = "dd if=/dev/zero of=/image bs=1M count=8 2> /dev/null &&
                       busybox mke2fs -F /image > /dev/null && mkdir /mnt &&
                       mount -t ext4 -o loop /image /mnt &&
                       echo kept > /mnt/file && umount /mnt &&
                       mount -t ext4 -o loop,ro /image /mnt && cat /mnt/file && umount /mnt";
        assert_eq!(privileged.exec(&["sh", "-c", of_loop])?, "kept");
        privileged.exec(&["sh", "-c", "echo e2e was here > /dev/kmsg"])?;

        let plain = start(&pod, "plain", false)?;
        assert_eq!(
            plain.exec(&[
                "sh",
                "-c",
                "find /dev -type b; ls -d /dev/fuse /dev/kmsg 2> /dev/null; true"
            ])?,
            ""
        );
        Ok(())
    })
}

#[test]
fn a_privileged_container_is_one_of_a_privileged_pod() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("unprivileged")?;
        let mut config = pod.container_config("c", IDLE);
        security(&mut config).privileged = true;
        let created = pod.try_create(config, pod.config.clone());
        if crate::shares_the_hosts_kernel(node) {
            ensure!(created.is_err());
            return Ok(());
        }
        let field = "config.linux.security_context.privileged";
        let parts = [field, "sandbox_config.linux.security_context.privileged"];
        refused(created, Code::InvalidArgument, &parts)?;
        // The name is free.
        pod.start_idle("c").map(drop)
    })
}

#[test]
fn a_user_that_is_not_root_has_the_capabilities_that_are_ambient() -> Result<()> {
    with_drupe(|node| {
        const NET_BIND_SERVICE: u64 = 1 << 10;
        let ambient = |pod: &Pod, options: NamespaceOption| -> Result<()> {
            let mut config = pod.container_config("ambient", IDLE);
            let context = security(&mut config);
            context.namespace_options = Some(options);
            context.run_as_user = Some(Int64Value { value: 1000 });
            context.no_new_privs = true;
            context.capabilities = Some(Capability {
                add_ambient_capabilities: vec!["NET_BIND_SERVICE".to_owned()],
                drop_capabilities: vec!["ALL".to_owned()],
                ..Default::default()
            });
            let container = pod.start_with(config)?;
            // Of the first process and of a command.
            for process in ["1", "self"] {
                let status = container.exec(&["cat", &format!("/proc/{process}/status")])?;
                for set in ["CapAmb:", "CapInh:", "CapPrm:", "CapEff:"] {
                    let bits = status.lines().find_map(|line| line.strip_prefix(set));
                    let bits = u64::from_str_radix(bits.unwrap_or_default().trim(), 16)?;
                    assert_eq!(bits, NET_BIND_SERVICE, "{set} of {process}");
                }
            }
            Ok(())
        };
        let own = NamespaceOption {
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        };
        ambient(&node.run_pod("ambient")?, own.clone())?;
        let shared = NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..own
        };
        ambient(&on_the_nodes_network(node, "ambient-node")?, shared)
    })
}
