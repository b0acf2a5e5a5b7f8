//! Pods that share the node's kernel, because they share its network, IPC or
//! process ids or because they ask for it: kube-proxy, network plugins, node
//! agents.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::pod::{IDLE, security};
use e2e::{Container, Node, Pod, Server, eventually, log};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tonic::Code;

use crate::{refused, with_drupe, with_node};

const PATIENCE: Duration = Duration::from_secs(20);
const HANDLER: &str = "host";

/// What a pod shares with the node.
#[derive(Clone, Copy, Default)]
struct Shared {
    network: bool,
    ipc: bool,
    pid: bool,
}

const NETWORK: Shared = Shared {
    network: true,
    ipc: false,
    pid: false,
};

impl Shared {
    fn options(self) -> NamespaceOption {
        let mode = |shared, own: NamespaceMode| match shared {
            true => NamespaceMode::Node.into(),
            false => own.into(),
        };
        NamespaceOption {
            network: mode(self.network, NamespaceMode::Pod),
            ipc: mode(self.ipc, NamespaceMode::Pod),
            pid: mode(self.pid, NamespaceMode::Container),
            ..Default::default()
        }
    }
}

fn pod_config(node: &Node, name: &str, shared: Shared) -> PodSandboxConfig {
    let mut config = node.pod_config(name);
    let linux = config.linux.get_or_insert_default();
    linux
        .security_context
        .get_or_insert_default()
        .namespace_options = Some(shared.options());
    config
}

fn run(node: &Node, name: &str, shared: Shared) -> Result<Pod> {
    node.run_pod_with(pod_config(node, name, shared))
}

/// A pod of the handler of its name; it shares nothing unless it says so.
fn run_by_handler(node: &Node, config: PodSandboxConfig) -> Result<Pod> {
    fs::create_dir_all(&config.log_directory)?;
    let request = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: HANDLER.to_owned(),
    };
    let id = node.cri()?.run_pod_sandbox(request)?.pod_sandbox_id;
    Pod::known(node, &id, config)
}

fn container_config(pod: &Pod, name: &str, command: &[&str], shared: Shared) -> ContainerConfig {
    let mut config = pod.container_config(name, command);
    security(&mut config).namespace_options = Some(shared.options());
    config
}

fn idle(pod: &Pod, name: &str, shared: Shared) -> Result<Container> {
    pod.start_with(container_config(pod, name, IDLE, shared))
}

fn kernel(of: &str) -> String {
    of.trim().to_owned()
}

fn namespace(path: &str) -> Result<String> {
    let link = fs::read_link(path).with_context(|| path.to_owned())?;
    Ok(link.display().to_string())
}

/// The pod's supervisor, by process id.
fn supervisor(node: &Node) -> Result<u32> {
    let processes = node.pod_processes()?;
    let of_shim = |line: &&String| line.contains("drupe-shim") && line.contains("supervise");
    let found: BTreeMap<_, _> = processes.iter().filter(|(_, l)| of_shim(l)).collect();
    ensure!(found.len() == 1, "supervisors: {found:?}");
    found
        .keys()
        .next()
        .map(|pid| **pid)
        .context("no supervisor")
}

#[test]
fn a_pod_on_the_nodes_network_has_its_interfaces_name_and_no_address() -> Result<()> {
    with_node(|node| {
        let links_before = node.netns.links()?;
        let pod = run(node, "agent", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        let seen = container.exec(&["ls", "/sys/class/net"])?;
        for link in node.netns.links()? {
            ensure!(seen.split_whitespace().any(|s| s == link), "{link}: {seen}");
        }
        assert_eq!(node.netns.links()?, links_before, "it has made a link");
        assert_eq!(
            container.exec(&["hostname"])?,
            kernel(&fs::read_to_string("/proc/sys/kernel/hostname")?)
        );
        assert_eq!(
            container.exec(&["uname", "-r"])?,
            kernel(&fs::read_to_string("/proc/sys/kernel/osrelease")?)
        );
        assert_eq!(
            container.exec(&["cat", "/etc/hosts"])?.trim(),
            fs::read_to_string("/etc/hosts")?.trim()
        );
        let status = pod.status()?;
        let network = status.network.context("no network status")?;
        assert_eq!(network.ip, "");
        let options = status.linux.and_then(|linux| linux.namespaces);
        let options = options.and_then(|n| n.options).context("no namespaces")?;
        assert_eq!(options.network(), NamespaceMode::Node);
        assert_eq!(options.ipc(), NamespaceMode::Pod);
        // What it serves is on the node.
        let serve = &[
            "sh",
            "-c",
            "echo hello > /x; exec httpd -f -p 127.0.0.1:8090 -h /",
        ];
        let _server = pod.start_with(container_config(&pod, "server", serve, NETWORK))?;
        eventually("the node to reach it", PATIENCE, || {
            let answer = get(node, 8090, "/x")?;
            ensure!(answer.ends_with("hello\n"), "{answer}");
            Ok::<_, anyhow::Error>(())
        })
    })
}

#[test]
fn a_pod_on_the_nodes_network_needs_no_network_plugin() -> Result<()> {
    let node = Node::builder()
        .cni(|conflist| *conflist = json!(null))
        .start()?;
    node.pull_busybox()?;
    let pod = run(&node, "plugin", NETWORK)?;
    idle(&pod, "c", NETWORK)?.exec(&["true"])?;
    refused(
        node.try_run_pod(node.pod_config("other")).map(|pod| pod.id),
        if node.server == Server::Drupe {
            Code::Unavailable
        } else {
            Code::Unknown
        },
        &[],
    )?;
    node.finish()
}

#[test]
fn the_nodes_processes_and_shared_memory_are_seen_when_shared() -> Result<()> {
    with_drupe(|node| {
        let processes = Shared {
            pid: true,
            ..Shared::default()
        };
        let pod = run(node, "watcher", processes)?;
        let container = idle(&pod, "c", processes)?;
        let list = container.exec(&["ps"])?;
        ensure!(list.contains("drupe") && list.contains("serve"), "{list}");
        // Its network is its own.
        let seen = container.exec(&["ls", "/sys/class/net"])?;
        ensure!(!seen.contains("cni0") && seen.contains("eth0"), "{seen}");

        let memory = Shared {
            ipc: true,
            ..Shared::default()
        };
        let pod = run(node, "memory", memory)?;
        let container = idle(&pod, "c", memory)?;
        let of = |container: &Container, kind: &str| {
            container.exec(&["readlink", &format!("/proc/self/ns/{kind}")])
        };
        assert_eq!(of(&container, "ipc")?, namespace("/proc/self/ns/ipc")?);
        let note = format!("/dev/shm/drupe-e2e-{}", std::process::id());
        fs::write(&note, "shared")?;
        let read = container.exec(&["cat", &note]);
        fs::remove_file(&note)?;
        assert_eq!(read?, "shared");
        for kind in ["pid", "net", "uts", "mnt"] {
            ensure!(
                of(&container, kind)? != namespace(&format!("/proc/self/ns/{kind}"))?,
                "{kind} is the node's"
            );
        }
        Ok(())
    })
}

#[test]
fn a_pod_that_asks_for_the_handler_has_namespaces_of_its_own() -> Result<()> {
    with_drupe(|node| {
        let mut config = pod_config(node, "plain", Shared::default());
        config.linux.get_or_insert_default().sysctls = [
            (
                "net.ipv4.ip_unprivileged_port_start".to_owned(),
                "77".to_owned(),
            ),
            ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
        ]
        .into();
        let pod = run_by_handler(node, config)?;
        let first = idle(&pod, "first", Shared::default())?;
        let second = idle(&pod, "second", Shared::default())?;
        assert_eq!(
            first.exec(&["uname", "-r"])?,
            kernel(&fs::read_to_string("/proc/sys/kernel/osrelease")?)
        );
        assert_eq!(first.exec(&["hostname"])?, "plain");
        assert_eq!(first.exec(&["cat", "/etc/hostname"])?, "plain");
        let sysctl = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
        assert_eq!(second.exec(&["cat", sysctl])?, "77");
        ensure!(kernel(&fs::read_to_string(sysctl)?) != "77", "the node's");
        assert_eq!(
            second.exec(&["cat", "/proc/sys/kernel/shm_rmid_forced"])?,
            "1"
        );
        // Network, IPC and name are the pod's, processes the container's.
        for kind in ["net", "ipc", "uts"] {
            let path = format!("/proc/self/ns/{kind}");
            let of = |container: &Container| container.exec(&["readlink", &path]);
            assert_eq!(of(&first)?, of(&second)?, "{kind}");
            ensure!(of(&first)? != namespace(&path)?, "{kind} is the node's");
        }
        ensure!(!first.exec(&["ps"])?.contains("drupe"), "it sees the node");
        assert_eq!(first.exec(&["cat", "/proc/1/comm"])?, "sh");
        first.exec(&["sh", "-c", "echo x > /dev/shm/note"])?;
        assert_eq!(second.exec(&["cat", "/dev/shm/note"])?, "x");
        // It has the network that plugins make.
        let addresses = pod.addresses()?;
        let shown = first.exec(&["ip", "addr", "show", "eth0"])?;
        for address in &addresses {
            ensure!(shown.contains(address.as_str()), "{address}: {shown}");
        }
        let hosts = first.exec(&["cat", "/etc/hosts"])?;
        ensure!(
            hosts.contains(&format!("{}\tplain", addresses[0])),
            "{hosts}"
        );
        first.exec(&["ping", "-c", "1", "-W", "5", "10.88.0.1"])?;
        assert_eq!(pod.status()?.runtime_handler, HANDLER);
        Ok(())
    })
}

#[test]
fn containers_share_process_ids_when_the_pod_says_so_or_one_joins_another() -> Result<()> {
    with_drupe(|node| {
        let mut config = pod_config(node, "sharing", Shared::default());
        let linux = config.linux.get_or_insert_default();
        let options = NamespaceOption {
            pid: NamespaceMode::Pod.into(),
            ..Default::default()
        };
        linux
            .security_context
            .get_or_insert_default()
            .namespace_options = Some(options.clone());
        let pod = run_by_handler(node, config)?;
        let with_pid = |name: &str, options: NamespaceOption| {
            let mut config = pod.container_config(name, IDLE);
            security(&mut config).namespace_options = Some(options);
            pod.start_with(config)
        };
        let first = with_pid("first", options.clone())?;
        let second = with_pid("second", options)?;
        let pids = |container: &Container| container.exec(&["readlink", "/proc/self/ns/pid"]);
        assert_eq!(pids(&first)?, pids(&second)?);
        ensure!(
            pids(&first)? != namespace("/proc/self/ns/pid")?,
            "the node's"
        );
        // What one leaves behind goes with it, though the namespace stays.
        let _ = first.exec(&["sh", "-c", "sleep 4321 & exit 0"])?;
        ensure!(second.exec(&["ps"])?.contains("sleep 4321"), "not seen");
        first.stop(0)?;
        ensure!(!second.exec(&["ps"])?.contains("sleep 4321"), "left behind");

        let pod = run_by_handler(node, pod_config(node, "debugged", Shared::default()))?;
        let target = idle(&pod, "target", Shared::default())?;
        let mut config = pod.container_config("debugger", IDLE);
        security(&mut config).namespace_options = Some(NamespaceOption {
            pid: NamespaceMode::Target.into(),
            target_id: target.id.clone(),
            ..Default::default()
        });
        let debugger = pod.start_with(config)?;
        assert_eq!(pids(&debugger)?, pids(&target)?);
        Ok(())
    })
}

#[test]
fn output_exit_codes_users_and_volumes_are_as_in_any_pod() -> Result<()> {
    with_node(|node| {
        let pod = run(node, "usual", NETWORK)?;
        let volume = node.dir.join("volume");
        fs::create_dir(&volume)?;
        fs::write(volume.join("given"), "from the node")?;
        let script = "echo out; echo err >&2; id -u; cat /v/given; echo back > /v/taken; exit 3";
        let mut config = container_config(&pod, "c", &["sh", "-c", script], NETWORK);
        config.mounts = vec![Mount {
            container_path: "/v".to_owned(),
            host_path: volume.display().to_string(),
            ..Default::default()
        }];
        let container = pod.start_with(config)?;
        let status = container.wait_exit()?;
        assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
        ensure!(status.finished_at >= status.started_at, "{status:?}");
        assert_eq!(container.stdout()?, "out\n0\nfrom the node");
        ensure!(container.output()?.contains("err\n"), "no error output");
        assert_eq!(fs::read_to_string(volume.join("taken"))?, "back\n");

        let mut config = container_config(&pod, "user", &["sh", "-c", "id; echo ~"], NETWORK);
        security(&mut config).run_as_username = "alice".to_owned();
        let container = pod.start_with(config)?;
        container.wait_exit()?;
        let printed = container.stdout()?;
        ensure!(
            printed.contains("uid=1000(alice) gid=1000(alice)") && printed.contains("50(staff)"),
            "{printed}"
        );
        ensure!(printed.ends_with("/home/alice\n"), "{printed}");

        let config = container_config(&pod, "missing", &["/no/such/program"], NETWORK);
        let missing = pod.create(config)?;
        let why = missing.start().unwrap_err();
        ensure!(why.message().contains("/no/such/program"), "{why}");
        let status = missing.wait_exit()?;
        assert_eq!(status.exit_code, 128);

        // A container that ends is replaced by the next attempt.
        let mut config = container_config(&pod, "c", &["echo", "again"], NETWORK);
        config.metadata.get_or_insert_default().attempt = 1;
        config.log_path = "again.log".to_owned();
        let again = pod.start_with(config)?;
        assert_eq!(again.wait_exit()?.exit_code, 0);
        assert_eq!(again.stdout()?, "again\n");
        Ok(())
    })
}

#[test]
fn limits_hold_and_a_container_beyond_its_memory_is_oom_killed() -> Result<()> {
    with_node(|node| {
        let _other_tests_look_later = e2e::cgroup::lock_parent_of_daemon();
        // Below the node's own group, which has processes in it, version 2
        // limits nothing.
        let mut config = pod_config(node, "limited", NETWORK);
        config.linux.get_or_insert_default().cgroup_parent = String::new();
        let pod = node.run_pod_with(config)?;
        let limit = 48 << 20;
        let mut config = container_config(&pod, "hungry", &["tail", "/dev/zero"], NETWORK);
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: limit,
            ..Default::default()
        });
        let status = pod.start_with(config)?.wait_exit()?;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "OOMKilled")
        );

        let mut config = container_config(&pod, "busy", IDLE, NETWORK);
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: limit,
            cpu_period: 100_000,
            cpu_quota: 20_000,
            ..Default::default()
        });
        let busy = pod.start_with(config)?;
        let work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; head -c 3000000 /dev/zero > /f; sync";
        busy.exec(&["sh", "-c", work])?;
        let stats = busy.stats()?;
        let value = |value: Option<UInt64Value>| value.map_or(0, |v| v.value);
        let cpu = value(stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds));
        ensure!(cpu > 1_000_000, "{cpu} ns of CPU");
        let memory = stats.memory.context("no memory")?;
        let used = value(memory.working_set_bytes);
        ensure!(used > 0 && used < limit as u64, "{used} bytes of memory");
        // containerd 1.6 gives no more.
        if node.server == Server::Drupe {
            ensure!(value(memory.available_bytes) < limit as u64, "{memory:?}");
            let layer = stats.writable_layer.context("no writable layer")?;
            ensure!(value(layer.used_bytes) >= 3_000_000, "{layer:?}");
        }
        pod.stop()?;
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn commands_terminals_and_ports_are_streamed() -> Result<()> {
    with_node(|node| {
        let pod = run(node, "streams", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        // ExecSync with both streams, an exit code, and a time limit.
        let answer = container.exec_sync(&["sh", "-c", "echo a; echo b >&2; exit 4"], 20)?;
        assert_eq!(
            (answer.exit_code, answer.stdout.as_slice()),
            (4, b"a\n".as_slice())
        );
        assert_eq!(answer.stderr, b"b\n");
        let slow = container.exec_sync(&["sh", "-c", "sleep 1234 & sleep 1234"], 1);
        assert_eq!(slow.unwrap_err().code(), Code::DeadlineExceeded);
        if node.server == Server::Drupe {
            let left = node.pod_processes()?;
            ensure!(!left.values().any(|l| l.contains("1234")), "{left:?}");
        }

        let mut data = vec![0; 4 << 20];
        fs::File::open("/dev/urandom")?.read_exact(&mut data)?;
        let mut child = client(node, &["exec", "-i", &container.id, "cat"])?;
        let mut input = child.stdin.take().context("its input")?;
        let sent = data.clone();
        let writer = std::thread::spawn(move || input.write_all(&sent));
        let output = child.wait_with_output()?;
        writer.join().unwrap()?;
        ensure!(
            output.status.success() && output.stdout == data,
            "bytes differ"
        );

        let line = format!(
            "stty rows 33 cols 111; exec {} exec -it {} sh -c 'sleep 1; stty size; tty'",
            crictl(node)?,
            container.id
        );
        let shown = node.netns.output("script", &["-qec", &line, "/dev/null"])?;
        ensure!(
            shown.contains("33 111") && shown.contains("/dev/pts/"),
            "{shown}"
        );

        let mut config = container_config(
            &pod,
            "echo",
            &["sh", "-c", "while read l; do echo got $l; done"],
            NETWORK,
        );
        config.stdin = true;
        let echo = pod.start_with(config)?;
        let mut child = client(node, &["attach", "-i", &echo.id])?;
        writeln!(child.stdin.as_mut().context("its input")?, "this")?;
        let mut answer = [0; 9];
        child
            .stdout
            .as_mut()
            .context("its output")?
            .read_exact(&mut answer)?;
        assert_eq!(&answer, b"got this\n");
        child.kill()?;
        child.wait()?;
        assert_eq!(echo.status()?.state(), ContainerState::ContainerRunning);
        assert_eq!(echo.stdout()?, "got this\n");

        let mut config = container_config(&pod, "terminal", &["sh", "-c", "tty; cat"], NETWORK);
        (config.tty, config.stdin) = (true, true);
        let terminal = pod.start_with(config)?;
        eventually("the terminal's name", PATIENCE, || {
            let written = terminal.stdout()?;
            ensure!(written.contains("/dev/pts/"), "{written:?}");
            Ok::<_, anyhow::Error>(())
        })?;
        terminal.stop(0)?;
        Ok(())
    })
}

#[test]
fn a_port_of_a_pod_with_a_network_of_its_own_is_forwarded() -> Result<()> {
    with_drupe(|node| {
        let pod = run_by_handler(node, pod_config(node, "ports", Shared::default()))?;
        let serve = "echo forwarded > /x; exec httpd -f -p 127.0.0.1:8000 -h /";
        let config = container_config(&pod, "c", &["sh", "-c", serve], Shared::default());
        let container = pod.start_with(config)?;
        eventually("the server to listen", PATIENCE, || {
            container.exec(&["wget", "-qO-", "http://127.0.0.1:8000/x"])
        })?;
        let mut forward = client(node, &["port-forward", &pod.id, "18000:8000"])?;
        let answer = eventually("the forwarded port to answer", PATIENCE, || {
            get(node, 18000, "/x")
        });
        forward.kill()?;
        forward.wait()?;
        let answer = answer?;
        ensure!(answer.ends_with("forwarded\n"), "{answer}");
        Ok(())
    })
}

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
fn the_daemon_may_die_while_it_runs_writes_and_ends() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "survivor", NETWORK)?;
        let count = "n=0; while :; do echo $n; n=$((n+1)); sleep 0.1; done";
        let counter = container_config(&pod, "counter", &["sh", "-c", count], NETWORK);
        let counter = pod.start_with(counter)?;
        let created = pod.create(container_config(&pod, "late", &["echo", "late"], NETWORK))?;
        let gate = node.dir.join("gate");
        fs::create_dir(&gate)?;
        let wait = "while [ ! -e /gate/open ]; do sleep 0.05; done; echo bye; exit 9";
        let mut config = container_config(&pod, "ending", &["sh", "-c", wait], NETWORK);
        config.mounts = vec![Mount {
            container_path: "/gate".to_owned(),
            host_path: gate.display().to_string(),
            ..Default::default()
        }];
        let ending = pod.start_with(config)?;
        let (pod_before, counter_before) = (pod.status()?, counter.status()?);

        node.kill_server()?;
        fs::write(gate.join("open"), "")?;
        let before = counter.stdout()?.lines().count();
        eventually("output while the daemon is dead", PATIENCE, || {
            let now = counter.stdout()?.lines().count();
            ensure!(now > before + 10, "{now} lines");
            ensure!(ending.stdout()? == "bye\n", "it has not ended");
            Ok::<_, anyhow::Error>(())
        })?;
        node.start_server()?;

        assert_eq!(pod.status()?, pod_before);
        assert_eq!(counter.status()?, counter_before);
        let status = ending.wait_exit()?;
        assert_eq!((status.exit_code, status.reason.as_str()), (9, "Error"));
        created.start()?;
        assert_eq!(created.wait_exit()?.exit_code, 0);
        assert_eq!(counter.exec(&["echo", "still here"])?, "still here");
        // Its log is rotated as any other.
        let rotated = counter.log.with_extension("1");
        fs::rename(&counter.log, &rotated)?;
        node.cri()?
            .reopen_container_log(ReopenContainerLogRequest {
                container_id: counter.id.clone(),
            })?;
        eventually("lines in the new log", PATIENCE, || {
            ensure!(!counter.stdout()?.is_empty(), "none yet");
            Ok::<_, anyhow::Error>(())
        })?;
        counter.stop(0)?;
        let mut records = log::read(&rotated)?;
        records.extend(log::read(&counter.log)?);
        let written = log::written(&records, log::Stream::Stdout);
        let written = String::from_utf8(written)?;
        let lines = written.lines().count();
        let expected: String = (0..lines).map(|n| format!("{n}\n")).collect();
        ensure!(written == expected, "a line was lost or doubled");
        idle(&pod, "after", NETWORK)?.exec(&["true"]).map(drop)
    })
}

#[test]
fn without_its_supervisor_a_pod_is_not_ready_and_runs_nothing() -> Result<()> {
    with_drupe(|node| {
        let end = |pid: u32| -> Result<()> {
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL).context("kill")
        };
        let over = |pod: &Pod, container: &Container| {
            eventually("the pod to be over", PATIENCE, || {
                ensure!(
                    pod.status()?.state() == PodSandboxState::SandboxNotready,
                    "it is ready"
                );
                ensure!(
                    container.status()?.state() == ContainerState::ContainerExited,
                    "its container runs"
                );
                ensure!(node.pod_processes()?.is_empty(), "processes are left");
                Ok::<_, anyhow::Error>(())
            })
        };
        let pod = run(node, "orphaned", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        end(supervisor(node)?)?;
        over(&pod, &container)?;
        let told = node.crictl_ok(&["inspectp", &pod.id])?;
        ensure!(told.contains("supervisor ended"), "{told}");
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()?;

        // The same while nobody looks.
        let pod = run(node, "unseen", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        let pid = supervisor(node)?;
        node.kill_server()?;
        end(pid)?;
        node.start_server()?;
        over(&pod, &container)?;
        ensure!(container.status()?.exit_code != 0, "it ended with 0");
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()
    })
}

#[test]
fn a_daemon_that_dies_during_the_start_leaves_nothing() -> Result<()> {
    with_drupe(|node| {
        for delay in [0, 20, 40, 80, 120, 160] {
            let config = pod_config(node, "cut-off", Shared::default());
            fs::create_dir_all(&config.log_directory)?;
            let cri = node.cri()?;
            let request = RunPodSandboxRequest {
                config: Some(config),
                runtime_handler: HANDLER.to_owned(),
            };
            let start = std::thread::spawn(move || cri.run_pod_sandbox(request).is_ok());
            std::thread::sleep(Duration::from_millis(delay));
            node.kill_server()?;
            let _answered = start.join();
            node.start_server()?;
            eventually("the half-made pod to be gone", PATIENCE, || {
                node.remove_all_pods()?;
                node.assert_no_pod_left()
            })?;
        }
        Ok(())
    })
}

#[test]
fn nothing_is_left_of_stopped_and_removed_pods() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "tidy", NETWORK)?;
        let running = idle(&pod, "running", NETWORK)?;
        running.exec(&["sh", "-c", "echo x > /file"])?;
        let ended = pod.start_with(container_config(&pod, "ended", &["true"], NETWORK))?;
        ended.wait_exit()?;
        ended.remove()?;
        let never = pod.create(container_config(&pod, "never", &["true"], NETWORK))?;
        never.remove()?;
        pod.stop()?;
        node.assert_no_running_pod_left()?;
        pod.stop()?;
        assert_eq!(pod.status()?.state(), PodSandboxState::SandboxNotready);
        assert_eq!(running.status()?.state(), ContainerState::ContainerExited);
        pod.remove()?;
        node.assert_no_pod_left()
    })
}

#[test]
fn an_operator_can_refuse_such_pods_and_is_told_what_is_missing() -> Result<()> {
    let with = |config: fn(&mut serde_json::Value), parts: &[&str]| -> Result<()> {
        let node = Node::builder()
            .server(Server::Drupe)
            .config(config)
            .start()?;
        let config = pod_config(&node, "unwanted", NETWORK);
        refused(
            node.try_run_pod(config).map(|pod| pod.id),
            Code::FailedPrecondition,
            parts,
        )?;
        node.finish()
    };
    with(
        |config| config["runtimes"]["microvm"]["host_namespaces"] = json!("refuse"),
        &["network", "refuse", "host_namespaces"],
    )?;
    with(
        |config| config["runtimes"]["host"]["oci"] = json!("no-such-runtime"),
        &["no-such-runtime", "install", "runtimes.host.oci"],
    )?;
    with(
        |config| {
            config["runtimes"]
                .as_object_mut()
                .map(|all| all.remove("host"));
        },
        &["network", "\"host\"", "not configured"],
    )
}

#[test]
fn what_would_change_the_node_is_refused() -> Result<()> {
    with_drupe(|node| {
        let mut config = pod_config(node, "sysctl", NETWORK);
        let name = "net.ipv4.ip_forward".to_owned();
        config.linux.get_or_insert_default().sysctls = [(name, "0".to_owned())].into();
        refused(
            node.try_run_pod(config).map(|pod| pod.id),
            Code::InvalidArgument,
            &["net.ipv4.ip_forward", "host's network"],
        )?;
        // Nor does a container of a microVM reach the node.
        let pod = node.run_pod("virtual")?;
        let config = container_config(&pod, "c", IDLE, NETWORK);
        refused(
            pod.create(config).map(|container| container.id),
            Code::Unimplemented,
            &["network", "host's network"],
        )?;
        node.assert_no_running_pod_left().unwrap_err();
        pod.stop()?;
        pod.remove()?;
        node.assert_no_pod_left()
    })
}

#[test]
fn the_handler_is_listed_and_checked() -> Result<()> {
    with_drupe(|node| {
        let request = StatusRequest { verbose: false };
        let handlers = node.cri()?.status(request)?.runtime_handlers;
        let host = handlers.iter().find(|handler| handler.name == HANDLER);
        ensure!(host.is_some(), "{handlers:?}");
        let output = Command::new(e2e::artifacts::daemon()?)
            .args(["check", "--config"])
            .arg(node.config_file())
            .output()?;
        let told = String::from_utf8_lossy(&output.stdout);
        let line = told.lines().find(|line| line.contains("handler host"));
        ensure!(line.is_some_and(|line| line.contains("runc")), "{told}");
        Ok(())
    })
}

/// What an HTTP server on the node's loopback answers.
fn get(node: &Node, port: u16, path: &str) -> Result<String> {
    let connect = || Ok(TcpStream::connect(("127.0.0.1", port))?);
    let mut stream = node.netns.run(connect)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn crictl(node: &Node) -> Result<String> {
    let socket = node.socket().display().to_string();
    let crictl = e2e::artifacts::crictl()?;
    Ok(format!(
        "{} --config /dev/null -r unix://{socket} -i unix://{socket}",
        crictl.display()
    ))
}

/// crictl beside the node's network, its streams ours.
fn client(node: &Node, args: &[&str]) -> Result<Child> {
    let line = format!("exec {} \"$@\"", crictl(node)?);
    let mut command = Command::new("sh");
    command
        .args(["-c", &line, "sh"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir(Path::new("/"));
    node.netns.run(|| command.spawn().context("crictl"))
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
fn limits_change_before_the_start_and_after_it() -> Result<()> {
    with_drupe(|node| {
        let pod = run(node, "changing", NETWORK)?;
        let container = pod.create(container_config(&pod, "c", IDLE, NETWORK))?;
        let update = |linux: LinuxContainerResources| {
            node.cri()?
                .update_container_resources(UpdateContainerResourcesRequest {
                    container_id: container.id.clone(),
                    linux: Some(linux),
                    ..Default::default()
                })
                .context("update")
        };
        let score = || container.exec(&["cat", "/proc/1/oom_score_adj"]);
        update(LinuxContainerResources {
            oom_score_adj: 700,
            cpuset_cpus: "0".to_owned(),
            ..Default::default()
        })?;
        container.start()?;
        assert_eq!(score()?, "700");
        let allowed = ["sh", "-c", "grep Cpus_allowed_list /proc/1/status"];
        ensure!(container.exec(&allowed)?.ends_with("\t0"), "CPUs");
        update(LinuxContainerResources {
            oom_score_adj: 800,
            ..Default::default()
        })?;
        assert_eq!(score()?, "800");
        // A command has it as soon as the runtime has made it.
        let wait = "while [ $(cat /proc/$$/oom_score_adj) != 800 ]; do :; done";
        container.exec(&["sh", "-c", wait])?;
        ensure!(
            container.exec(&allowed)?.ends_with("\t0"),
            "CPUs were given"
        );
        Ok(())
    })
}

#[test]
fn a_user_namespace_of_the_pods_own_is_refused() -> Result<()> {
    with_drupe(|node| {
        let mut config = pod_config(node, "users", Shared::default());
        let ids = || {
            vec![IdMapping {
                host_id: 1 << 20,
                container_id: 0,
                length: 65_536,
            }]
        };
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        let options = context.namespace_options.get_or_insert_default();
        options.userns_options = Some(UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: ids(),
            gids: ids(),
        });
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: HANDLER.to_owned(),
        };
        refused(
            node.cri()?.run_pod_sandbox(request),
            Code::FailedPrecondition,
            &["userns_options", "host's kernel"],
        )?;
        Ok(())
    })
}
