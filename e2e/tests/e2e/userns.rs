//! Pods with a user namespace of their own (hostUsers: false): root of their
//! containers is nobody outside of it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::pod::IDLE;
use e2e::{Container, Node, Pod, artifacts, debian, http, image, layer};
use tonic::Code;

use crate::{debugging, refused, with_drupe};

const FIRST: u32 = 131_072;
const COUNT: u32 = 65_536;

fn mappings() -> Vec<IdMapping> {
    vec![IdMapping {
        host_id: FIRST,
        container_id: 0,
        length: COUNT,
    }]
}

fn own_users() -> Option<UserNamespace> {
    Some(UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: mappings(),
        gids: mappings(),
    })
}

fn run_pod_with(
    node: &Node,
    name: &str,
    change: impl FnOnce(&mut LinuxPodSandboxConfig),
) -> Result<Pod> {
    let mut config = node.pod_config(name);
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    let options = security.namespace_options.get_or_insert_default();
    options.userns_options = own_users();
    change(linux);
    node.run_pod_with(config)
}

pub fn run_pod(node: &Node, name: &str) -> Result<Pod> {
    run_pod_with(node, name, |_| {})
}

/// What the kubelet sends for a container of such a pod.
fn container(pod: &Pod, name: &str, command: &[&str], mounts: Vec<Mount>) -> ContainerConfig {
    let mut config = pod.container_config(name, command);
    let context = e2e::pod::security(&mut config);
    let options = context.namespace_options.get_or_insert_default();
    options.userns_options = own_users();
    config.mounts = mounts
        .into_iter()
        .map(|mount| Mount {
            uid_mappings: mappings(),
            gid_mappings: mappings(),
            ..mount
        })
        .collect();
    config
}

pub fn start(pod: &Pod, name: &str, mounts: Vec<Mount>) -> Result<Container> {
    pod.start_with(container(pod, name, IDLE, mounts))
}

fn volume(host: &Path, at: &str) -> Mount {
    Mount {
        host_path: host.display().to_string(),
        container_path: at.to_owned(),
        ..Default::default()
    }
}

/// A directory of the node for everybody.
fn shared(node: &Node) -> Result<std::path::PathBuf> {
    let dir = node.dir.join("shared");
    fs::create_dir(&dir)?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
    Ok(dir)
}

#[test]
fn root_of_a_container_is_mapped_and_finds_everything_its_own() -> Result<()> {
    with_drupe(|node| {
        let pod = run_pod(node, "mapped")?;
        let c = start(&pod, "c", Vec::new())?;
        assert_eq!(c.exec(&["id", "-u"])?, "0");
        for map in ["uid_map", "gid_map"] {
            let map = c.exec(&["cat", &format!("/proc/self/{map}")])?;
            let numbers: Vec<&str> = map.split_whitespace().collect();
            assert_eq!(numbers, ["0", "131072", "65536"]);
        }
        // Commands, the first process, and other containers are in one.
        let namespace = "(readlink /proc/1/ns/user; readlink /proc/self/ns/user) | sort -u";
        let of_first = c.exec(&["sh", "-c", namespace])?;
        assert_eq!(of_first.lines().count(), 1, "{of_first}");
        let second = start(&pod, "second", Vec::new())?;
        assert_eq!(second.exec(&["sh", "-c", namespace])?, of_first);

        let owners = c.exec(&[
            "stat",
            "-c",
            "%u:%g %n",
            "/",
            "/bin",
            "/bin/busybox",
            "/etc/hosts",
            "/etc/resolv.conf",
            "/dev",
            "/dev/null",
            "/dev/pts",
            "/dev/shm",
            "/dev/mqueue",
            "/home/alice/greeting",
        ])?;
        for line in owners.lines() {
            let expected = if line.ends_with("greeting") {
                "1000:1000 "
            } else {
                "0:0 "
            };
            ensure!(line.starts_with(expected), "{owners}");
        }
        let script = "echo x > /etc/hosts && mkdir /new && echo x > /new/file && chown 33:44 /new/file \
                      && stat -c %u:%g /new/file && chmod 4755 /new/file && rm -r /new \
                      && head -c 3 /dev/zero | wc -c && echo x > /dev/null && echo x > /dev/shm/x \
                      && ls -l /dev/fd/ > /dev/null && cat /sys/fs/cgroup/cgroup.controllers > /dev/null \
                      && ls /sys/class/net && echo all";
        let said = c.exec(&["sh", "-c", script])?;
        assert_eq!(said, "33:44\n3\neth0\nlo\nall");
        // What is the guest's stays the guest's.
        for script in [
            "mknod /tmp/disk b 254 0",
            "echo 1 > /proc/sys/kernel/panic",
            "echo x > /proc/1/oom_score_adj",
        ] {
            let answer = c.exec_sync(&["sh", "-c", script], 20)?;
            ensure!(answer.exit_code != 0, "{script} succeeded");
        }
        let shown = pod.status()?.linux.unwrap_or_default().namespaces;
        let options = shown.unwrap_or_default().options.unwrap_or_default();
        assert_eq!(options.userns_options, own_users());
        Ok(())
    })
}

#[test]
fn files_of_volumes_have_the_containers_owners_on_the_node() -> Result<()> {
    with_drupe(|node| {
        let dir = shared(node)?;
        for (name, id) in [
            ("roots", 0),
            ("alices", 1000),
            ("strangers", 70_000),
            ("unmapped", FIRST),
        ] {
            let path = dir.join(name);
            fs::write(&path, name)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            chown(&path, Some(id), Some(id))?;
        }
        let pod = run_pod(node, "owners")?;
        let mounts = || {
            vec![
                volume(&dir, "/data"),
                volume(&dir.join("roots"), "/etc/one"),
            ]
        };
        let root = start(&pod, "root", mounts())?;
        let seen = root.exec(&[
            "sh",
            "-c",
            "cd /data && stat -c '%u %n' roots alices strangers unmapped /etc/one",
        ])?;
        assert_eq!(
            seen,
            "0 roots\n1000 alices\n65534 strangers\n65534 unmapped\n0 /etc/one"
        );
        let read = |name: &str| root.exec_sync(&["cat", &format!("/data/{name}")], 20);
        assert_eq!(read("alices")?.stdout, b"alices");
        for name in ["strangers", "unmapped"] {
            ensure!(read(name)?.exit_code != 0, "{name} was read");
        }
        root.exec(&["sh", "-c", "cd /data && echo x > made && mkdir dir && ln -s made link && echo x > given && chown 33:44 given"])?;

        let mut config = container(&pod, "alice", IDLE, mounts());
        let context = e2e::pod::security(&mut config);
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.run_as_group = Some(Int64Value { value: 1000 });
        let alice = pod.start_with(config)?;
        alice.exec(&["sh", "-c", "cd /data && echo x > by-alice && cat alices"])?;
        ensure!(alice.exec_sync(&["cat", "/data/roots"], 20)?.exit_code != 0);
        let owner = |name: &str| -> Result<(u32, u32)> {
            let metadata = fs::symlink_metadata(dir.join(name))?;
            Ok((metadata.uid(), metadata.gid()))
        };
        for (name, expected) in [
            ("made", (0, 0)),
            ("dir", (0, 0)),
            ("link", (0, 0)),
            ("given", (33, 44)),
            ("by-alice", (1000, 1000)),
        ] {
            assert_eq!(owner(name)?, expected, "{name}");
        }
        Ok(())
    })
}

#[test]
fn set_user_id_programs_of_image_and_volume_work() -> Result<()> {
    with_drupe(|node| {
        let dir = shared(node)?;
        let bash = debian::file(&artifacts::deb("bash-static")?, "bin/bash-static")?;
        let mut image = image::busybox()?;
        let layer = layer::LayerBuilder::default().file("bin/as-root", 0o4755, &bash)?;
        image.layers.push(layer.build(layer::Compression::Gzip)?);
        node.registry()?.push("setuid", "latest", &image)?;
        let name = "127.0.0.1:5000/setuid:latest";
        node.cri()?.pull(name)?;
        let pod = run_pod(node, "setuid")?;
        let of_image = |mut config: ContainerConfig| {
            config.image.get_or_insert_default().image = name.to_owned();
            config
        };
        let root = pod.start_with(of_image(container(
            &pod,
            "root",
            IDLE,
            vec![volume(&dir, "/data")],
        )))?;
        root.exec(&[
            "sh",
            "-c",
            "cp /bin/as-root /data/as-root && chmod 4755 /data/as-root",
        ])?;
        let mut config = of_image(container(&pod, "alice", IDLE, vec![volume(&dir, "/data")]));
        e2e::pod::security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
        let alice = pod.start_with(config)?;
        for program in ["/bin/as-root", "/data/as-root"] {
            let ids = alice.exec(&[program, "-p", "-c", "echo $UID $EUID"])?;
            assert_eq!(ids, "1000 0", "{program}");
        }
        Ok(())
    })
}

#[test]
fn the_pods_network_and_kernel_parameters_belong_to_its_root() -> Result<()> {
    with_drupe(|node| {
        let sysctls = [
            ("kernel.shm_rmid_forced", "1"),
            ("net.ipv4.ip_local_port_range", "20000 30000"),
            ("fs.mqueue.msg_max", "20"),
        ];
        let pod = run_pod_with(node, "network", |linux| {
            let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            linux.sysctls = sysctls.iter().map(pair).collect();
        })?;
        let mut config = container(&pod, "c", IDLE, Vec::new());
        let context = e2e::pod::security(&mut config);
        context.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".to_owned(), "SYS_ADMIN".to_owned()],
            ..Default::default()
        });
        let c = pod.start_with(config)?;
        assert_eq!(c.exec(&["hostname"])?, "network");
        for (name, value) in sysctls {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            let set = c.exec(&["cat", &path])?;
            let words: Vec<&str> = set.split_whitespace().collect();
            assert_eq!(words.join(" "), value, "{name}");
        }
        c.exec(&["sh", "-c", "ip addr add 192.0.2.77/32 dev eth0 && ip link set lo down && ip link set lo up && ping -c 1 127.0.0.1"])?;
        // A mount namespace that is its own, too.
        c.exec(&[
            "sh",
            "-c",
            "mkdir /m && mount -t tmpfs t /m && echo x > /m/x && umount /m",
        ])?;
        c.exec(&[
            "sh",
            "-c",
            "mkdir /www && echo hello > /www/index.html && httpd -p 81 -h /www",
        ])?;
        let address = pod.addresses()?.remove(0);
        let get = || http::get(&format!("{address}:81"), "/index.html");
        let page = node.netns.run(get)?;
        assert_eq!(
            (page.status, page.body.as_slice()),
            (200, b"hello\n".as_slice())
        );
        Ok(())
    })
}

#[test]
fn containers_that_share_processes_and_terminals_are_in_the_namespace_too() -> Result<()> {
    with_drupe(|node| {
        let pod = run_pod_with(node, "together", |linux| {
            let security = linux.security_context.get_or_insert_default();
            let options = security.namespace_options.get_or_insert_default();
            options.pid = NamespaceMode::Pod.into();
        })?;
        let sharing = |name: &str, command: &[&str]| {
            let mut config = container(&pod, name, command, Vec::new());
            let context = e2e::pod::security(&mut config);
            context.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
            config
        };
        let first = pod.start_with(sharing("first", &["sleep", "4321"]))?;
        let second = pod.start_with(sharing("second", IDLE))?;
        let find =
            "for p in /proc/[0-9]*; do grep -q 4321 $p/cmdline && stat -c %u $p; done | sort -u";
        assert_eq!(second.exec(&["sh", "-c", find])?, "0");
        second.exec(&["sh", "-c", "kill $(pidof sleep | tr ' ' '\\n' | while read p; do grep -q 4321 /proc/$p/cmdline && echo $p; done)"])?;
        assert_eq!(first.wait_exit()?.exit_code, 143);

        let mut config = sharing(
            "terminal",
            &[
                "sh",
                "-c",
                "tty; stat -c %u:%g $(tty); echo x > /dev/console",
            ],
        );
        config.tty = true;
        let terminal = pod.start_with(config)?;
        assert_eq!(terminal.wait_exit()?.exit_code, 0);
        let said = terminal.stdout()?.replace('\r', "");
        ensure!(said.starts_with("/dev/pts/0\n0:5\nx"), "{said:?}");
        Ok(())
    })
}

#[test]
fn a_debugger_in_the_namespace_sees_its_target() -> Result<()> {
    with_drupe(|node| {
        let pod = run_pod(node, "debugged")?;
        let command = ["sh", "-c", "echo found > /only-here; exec sleep 54321"];
        let target = pod.start_with(container(&pod, "target", &command, Vec::new()))?;
        let config = container(&pod, "debugger", IDLE, Vec::new());
        let debugger = pod.start_with(debugging::aimed_at(config, &target.id))?;
        debugging::sees_its_target(&debugger, &target)?;
        let namespace = ["readlink", "/proc/self/ns/user"];
        assert_eq!(debugger.exec(&namespace)?, target.exec(&namespace)?);
        debugger.stop(0)?;
        target.exec(&["true"]).map(drop)
    })
}

#[test]
fn a_privileged_container_is_so_in_its_own_namespace_only() -> Result<()> {
    with_drupe(|node| {
        let pod = run_pod(node, "privileged")?;
        let mut config = container(&pod, "c", IDLE, Vec::new());
        e2e::pod::security(&mut config).privileged = true;
        let c = pod.start_with(config)?;
        let own = "hostname other && mkdir /m && mount -t proc p /m && test -d /m/1 && umount /m \
                   && mkdir /sys/fs/cgroup/sub && echo $$ > /sys/fs/cgroup/sub/cgroup.procs \
                   && cat /proc/self/cgroup";
        let cgroup = c.exec(&["sh", "-c", own])?;
        ensure!(cgroup.ends_with("/sub"), "{cgroup}");
        for script in [
            "mknod /tmp/disk b 254 0",
            "echo 1 > /proc/sys/kernel/panic",
            "echo max > /sys/fs/cgroup/memory.max",
        ] {
            let answer = c.exec_sync(&["sh", "-c", script], 20)?;
            ensure!(answer.exit_code != 0, "{script} succeeded");
        }
        // Of the guest's devices it has those that are for everybody.
        c.exec(&["busybox", "tunctl", "-t", "tap-e2e"])?;
        let mine = "ls -d /dev/loop* /dev/kmsg /dev/vd* 2> /dev/null; test -c /dev/fuse";
        assert_eq!(c.exec(&["sh", "-c", mine])?, "");
        Ok(())
    })
}

#[test]
fn a_daemon_that_was_killed_finds_the_pod_as_it_was() -> Result<()> {
    with_drupe(|node| {
        let pod = run_pod(node, "kept")?;
        let c = start(&pod, "c", Vec::new())?;
        let namespace = c.exec(&["readlink", "/proc/self/ns/user"])?;
        node.kill_server()?;
        node.start_server()?;
        assert_eq!(c.exec(&["readlink", "/proc/self/ns/user"])?, namespace);
        let later = start(&pod, "later", Vec::new())?;
        assert_eq!(later.exec(&["readlink", "/proc/self/ns/user"])?, namespace);
        Ok(())
    })
}

#[test]
fn what_is_not_the_pods_mapping_is_refused_by_name() -> Result<()> {
    with_drupe(|node| {
        let dir = shared(node)?;
        let field = "config.linux.security_context.namespace_options.userns_options";
        let pod = run_pod(node, "strict")?;
        let plain = pod.container_config("plain", IDLE);
        refused(pod.create(plain), Code::InvalidArgument, &[field, "131072"])?;
        let mut unmapped = container(&pod, "unmapped", IDLE, vec![volume(&dir, "/data")]);
        unmapped.mounts[0].uid_mappings.clear();
        unmapped.mounts[0].gid_mappings.clear();
        refused(
            pod.create(unmapped),
            Code::InvalidArgument,
            &["config.mounts[/data].uid_mappings"],
        )?;
        let mut stranger = container(&pod, "stranger", IDLE, Vec::new());
        e2e::pod::security(&mut stranger).run_as_user = Some(Int64Value { value: 70_000 });
        refused(
            pod.create(stranger),
            Code::InvalidArgument,
            &["user 70000", "65536"],
        )?;

        let without = node.run_pod("without")?;
        let other = container(&without, "other", IDLE, Vec::new());
        refused(without.create(other), Code::InvalidArgument, &[field])?;
        let mut mapped = without.container_config("mapped", IDLE);
        mapped.mounts = container(&without, "x", IDLE, vec![volume(&dir, "/data")]).mounts;
        refused(
            without.create(mapped),
            Code::InvalidArgument,
            &["config.mounts[/data].uid_mappings"],
        )?;
        Ok(())
    })
}
