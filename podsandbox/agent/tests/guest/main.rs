//! The agent in a guest of its own kernel, driven over vsock as the daemon
//! drives it. Needs root, a UML kernel (`DRUPE_TEST_KERNEL`), the initramfs
//! (`DRUPE_TEST_INITRAMFS`), drupe-vmm (`DRUPE_TEST_VMM`), a static busybox and
//! mkfs.erofs.

#![allow(clippy::unwrap_used, reason = "a test that fails says where")]

mod harness;
mod network;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use agent_api::container_state::Phase;
use agent_api::{
    Dns, ExecSyncRequest, StatsRequest, UpdateContainerRequest, User,
    exec_sync_event::Event as ExecEvent,
};
use harness::{
    Container, Guest, Image, Options, artifacts, busybox_tree, configuration, exit_of, refused,
};
use serde_json::json;
use tonic::Code;
use vmm_client::UmlMode;

const FOREVER: &str = "trap 'exit 0' TERM; while :; do sleep 1; done";

#[tokio::test]
async fn a_container_runs_on_its_own_kernel_and_its_output_arrives() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "uname -r; hostname; id; pwd; cat /etc/hostname; echo $GREETING $HOME; \
                  echo oops >&2; cat /proc/self/oom_score_adj; grep Cap /proc/self/status; exit 3";
    let container = Container::sh("one", &root, script).set("/process/cwd", json!("/made/for/it"));
    guest.create(container).await.unwrap();
    assert_eq!(guest.phase("one").await, Phase::Created);
    let mut events = guest.events().await;
    guest.start_container("one").await.unwrap();
    let exit = exit_of(&mut events, "one").await;
    assert_eq!(
        (exit.code, exit.oom_killed, exit.start_error.as_str()),
        (3, false, "")
    );

    let output = guest.output("one", "stdout");
    let lines: Vec<&str> = output.lines().collect();
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(lines[0], host.trim());
    assert_eq!(lines[1], "test-pod");
    assert!(lines[2].starts_with("uid=0(root) gid=0(root)"), "{output}");
    assert_eq!(
        lines[3..7],
        ["/made/for/it", "test-pod", "hello /root", "500"]
    );
    assert!(output.contains("CapBnd:\t00000000a80425fb"), "{output}");
    assert_eq!(guest.output("one", "stderr"), "oops\n");
    assert_eq!(guest.state("one").await.exit.unwrap().code, 3);

    guest.remove("one").await;
    let again = Container::sh("one", &root, "echo again");
    assert_eq!(guest.run_to_end(again).await.0.code, 0);
    guest.remove("one").await;
    guest.remove("one").await;
    guest.shut_down().await;
}

#[tokio::test]
async fn a_program_that_cannot_run_is_named() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    for (id, program, grpc, code, why) in [
        (
            "a",
            "nothere",
            Code::NotFound,
            127,
            "executable file not found in $PATH",
        ),
        (
            "b",
            "/bin/nothere",
            Code::NotFound,
            127,
            "no such file or directory",
        ),
        (
            "c",
            "notaprogram",
            Code::PermissionDenied,
            126,
            "permission denied",
        ),
        (
            "d",
            "lostscript",
            Code::NotFound,
            127,
            "its interpreter was not found",
        ),
    ] {
        let mut events = guest.events().await;
        guest
            .create(Container::new(id, &root, &[program]))
            .await
            .unwrap();
        let message = refused(guest.start_container(id).await, grpc);
        let expected = format!("exec: {program:?}: {why}");
        assert_eq!(message, expected);
        let exit = exit_of(&mut events, id).await;
        assert_eq!((exit.code, exit.start_error), (code, expected));
        assert_eq!(guest.phase(id).await, Phase::Exited);
        refused(guest.start_container(id).await, Code::FailedPrecondition);
        guest.remove(id).await;
    }
    guest.shut_down().await;
}

#[tokio::test]
async fn bad_requests_are_refused_and_leave_nothing() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::start(&artifacts, Options::default()).await;
    let root = guest.attach(&Image::busybox()).await;
    let early = guest.create(Container::sh("x", &root, "true")).await;
    refused(early, Code::FailedPrecondition);
    guest.configure(configuration()).await;
    // The same again does nothing; something else is refused.
    guest.configure(configuration()).await;
    let mut other = configuration();
    other.hostname = "other".into();
    refused(
        guest.agent.configure_sandbox(other).await,
        Code::FailedPrecondition,
    );

    let nobody = User {
        username: "nobody".into(),
        ..User::default()
    };
    let unknown = guest
        .create(Container::sh("x", &root, "true").user(nobody))
        .await;
    assert_eq!(
        refused(unknown, Code::InvalidArgument),
        "unable to find user nobody: no matching entries in passwd file"
    );
    let id = guest
        .create(Container {
            log: false,
            ..Container::sh("../x", &root, "true")
        })
        .await;
    assert_eq!(
        refused(id, Code::InvalidArgument),
        "\"../x\" is no container id"
    );
    let mut no_disk = root.clone();
    no_disk.slot = 99;
    let message = refused(
        guest.create(Container::sh("x", &no_disk, "true")).await,
        Code::Internal,
    );
    assert_eq!(message, "the guest has no disk with serial image99");
    let mut beyond = root.clone();
    beyond.layers[0].offset = 1;
    refused(
        guest.create(Container::sh("x", &beyond, "true")).await,
        Code::InvalidArgument,
    );
    let bind = json!({ "destination": "/x", "type": "bind", "source": "/run/drupe/shared/none",
                       "options": ["rbind"] });
    let missing = guest
        .create(Container::sh("x", &root, "true").mount(bind))
        .await;
    let message = refused(missing, Code::Internal);
    assert!(message.contains("\"/run/drupe/shared/none\""), "{message}");
    let below = json!({ "destination": "/bin/sh/dir", "type": "tmpfs", "source": "tmpfs" });
    let blocked = guest
        .create(Container::sh("x", &root, "true").mount(below))
        .await;
    let message = refused(blocked, Code::Internal);
    assert_eq!(
        message,
        "cannot mount tmpfs at /bin/sh/dir: Not a directory"
    );

    guest.run(Container::sh("x", &root, FOREVER)).await;
    refused(
        guest.create(Container::sh("x", &root, "true")).await,
        Code::AlreadyExists,
    );
    let twice = guest.create(Container::sh("z", &root, "true")).await;
    let message = refused(twice, Code::FailedPrecondition);
    assert_eq!(message, "disk image0 is used by another container");
    refused(guest.exec("y", &["true"]).await, Code::NotFound);
    refused(guest.exec("x", &["nothere"]).await, Code::NotFound);
    guest.shut_down().await;
}

#[tokio::test]
async fn commands_run_in_a_container_and_end_in_time() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let web = User {
        username: "web".into(),
        ..User::default()
    };
    guest
        .create(Container::sh("web", &root, FOREVER).user(web))
        .await
        .unwrap();
    refused(guest.exec("web", &["true"]).await, Code::FailedPrecondition);
    guest.start_container("web").await.unwrap();
    let state = guest.state("web").await;
    assert_eq!(
        (state.uid, state.gid, state.supplemental_groups),
        (33, 34, vec![34, 44])
    );

    let done = guest
        .exec(
            "web",
            &["sh", "-c", "id; echo $HOME; echo bad > /dev/stderr; exit 5"],
        )
        .await;
    let done = done.unwrap();
    assert_eq!(
        done.text(),
        "uid=33(web) gid=34(www) groups=34(www),44(log)\n/srv\n"
    );
    assert_eq!(
        (done.stderr.as_slice(), done.exit.code),
        (b"bad\n".as_slice(), 5)
    );
    let ps = guest
        .exec("web", &["ps", "-o", "pid,args"])
        .await
        .unwrap()
        .text();
    assert!(ps.contains("1 sh -c trap"), "its own PID namespace: {ps}");
    for _ in 0..5 {
        guest.exec("web", &["true"]).await.unwrap();
    }

    let begun = Instant::now();
    let script = "sleep 100 & echo started; sleep 100";
    let late = guest
        .exec_for("web", &["sh", "-c", script], 300)
        .await
        .unwrap();
    assert!(
        late.exit.timed_out && late.text() == "started\n",
        "{late:?}"
    );
    assert!(begun.elapsed() < Duration::from_secs(10));
    let ps = guest.exec("web", &["ps"]).await.unwrap().text();
    assert!(
        !ps.contains("sleep 100"),
        "all it had started is dead: {ps}"
    );

    // Cancelled half-way, with output nobody takes.
    let request = ExecSyncRequest {
        container_id: "web".into(),
        argv: vec!["yes".into()],
        timeout_millis: 0,
    };
    let mut stream = guest.agent.exec_sync(request).await.unwrap().into_inner();
    assert!(matches!(
        stream.message().await.unwrap().unwrap().event,
        Some(ExecEvent::Stdout(_))
    ));
    drop(stream);
    let deadline = Instant::now() + Duration::from_secs(10);
    while guest
        .exec("web", &["ps"])
        .await
        .unwrap()
        .text()
        .contains("yes")
    {
        assert!(Instant::now() < deadline, "a cancelled command lives on");
    }
    let dirs = guest
        .exec("web", &["ls", "/sys/fs/cgroup"])
        .await
        .unwrap()
        .text();
    assert!(
        dirs.matches("exec-").count() <= 1,
        "only this command's own: {dirs}"
    );

    let mut events = guest.events().await;
    guest.signal("web", libc::SIGTERM, false).await;
    assert_eq!(exit_of(&mut events, "web").await.code, 0);
    refused(guest.exec("web", &["true"]).await, Code::FailedPrecondition);
    guest.shut_down().await;
}

#[tokio::test]
async fn a_hundred_megabytes_of_output_arrive_whole() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo line $i; done; \
                  head -c 104857600 /dev/zero | tr '\\0' 'x'; echo; printf end";
    let begun = Instant::now();
    let (exit, output) = guest.run_to_end(Container::sh("big", &root, script)).await;
    println!("100 MB: {:?}", begun.elapsed());
    assert_eq!(exit.code, 0);
    let (head, tail) = (&output[..20], &output[output.len() - 10..]);
    assert!(
        head.starts_with("line 1\nline 2\n") && tail.trim_end().ends_with("x\nend"),
        "{head} {tail}"
    );
    assert_eq!(
        output.bytes().filter(|&byte| byte == b'x').count(),
        104_857_600
    );

    // Nobody reads it, and it goes on all the same.
    let root = guest.attach(&Image::busybox()).await;
    let quiet = Container {
        log: false,
        ..Container::sh("quiet", &root, "yes | head -n 1000000")
    };
    let mut events = guest.events().await;
    guest.run(quiet).await;
    assert_eq!(exit_of(&mut events, "quiet").await.code, 0);
    guest.shut_down().await;
}

#[tokio::test]
async fn limits_hold_and_an_oom_kill_is_told() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let limits = json!({ "memory": { "limit": 33_554_432 }, "pids": { "limit": 50 },
                         "cpu": { "shares": 1024, "quota": 50_000, "period": 100_000 } });
    let eat = Container::sh("eat", &root, "tail /dev/zero");
    let (exit, _) = guest
        .run_to_end(eat.set("/linux/resources", limits.clone()))
        .await;
    assert!(exit.oom_killed && exit.code == 137, "{exit:?}");

    let root = guest.attach(&Image::busybox()).await;
    let calm = Container::sh("calm", &root, FOREVER).set("/linux/resources", limits);
    guest.run(calm).await;
    let read = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight memory.oom.group";
    let text = guest
        .exec("calm", &["sh", "-c", read])
        .await
        .unwrap()
        .text();
    assert_eq!(text, "33554432\n50\n50000 100000\n100\n1\n");
    let resources = json!({ "memory": { "limit": 67_108_864 }, "cpu": { "quota": -1 } });
    let update = UpdateContainerRequest {
        id: "calm".into(),
        resources: resources.to_string().into_bytes(),
    };
    guest.agent.update_container(update).await.unwrap();
    let text = guest
        .exec("calm", &["sh", "-c", read])
        .await
        .unwrap()
        .text();
    assert_eq!(text, "67108864\n50\nmax 100000\n100\n1\n");

    let write = "head -c 5000000 /dev/zero > /file; sync";
    guest.exec("calm", &["sh", "-c", write]).await.unwrap();
    let stats = guest
        .agent
        .stats(StatsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let calm = stats
        .containers
        .iter()
        .find(|stats| stats.id == "calm")
        .unwrap();
    assert!(calm.cpu_usage_nanos > 0 && calm.pids >= 1, "{calm:?}");
    assert!(
        calm.memory_working_set_bytes > 0
            && calm.memory_working_set_bytes <= calm.memory_usage_bytes
    );
    assert_eq!(calm.memory_limit_bytes, 67_108_864);
    assert!(
        (5_000_000..6_000_000).contains(&calm.fs_used_bytes),
        "{calm:?}"
    );
    let of_guest = stats.guest.unwrap();
    println!(
        "agent RSS with two containers: {} KiB",
        of_guest.agent_rss_bytes / 1024
    );
    assert!(of_guest.memory_total_bytes > of_guest.memory_available_bytes);
    guest.shut_down().await;
}

#[tokio::test]
async fn the_idle_agent_is_small() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let stats = guest
        .agent
        .stats(StatsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let rss = stats.guest.unwrap().agent_rss_bytes;
    println!("idle agent RSS: {} KiB", rss / 1024);
    assert!(rss <= 6 << 20, "{rss}");
    guest.shut_down().await;
}

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
async fn containers_of_a_pod_share_what_they_should() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::start(&artifacts, Options::default()).await;
    let mut pod = configuration();
    pod.share_process_namespace = true;
    pod.shm_bytes = 8 << 20;
    pod.sysctls = [("net.ipv4.ip_unprivileged_port_start".into(), "0".into())].into();
    guest.configure(pod).await;
    let root = guest.attach(&Image::busybox()).await;
    let shared = json!([{ "type": "mount" }, { "type": "cgroup" }]);
    let first = Container::sh(
        "first",
        &root,
        &format!("echo here > /dev/shm/note; {FOREVER}"),
    )
    .set("/linux/namespaces", shared.clone());
    guest.run(first).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "until [ -e /dev/shm/note ]; do sleep 0.1; done; cat /dev/shm/note; ps; \
                  df /dev/shm | tail -n 1; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                  (sleep 1000 &) ; sleep 0.1";
    let second = Container::sh("second", &root, script).set("/linux/namespaces", shared);
    let (exit, output) = guest.run_to_end(second).await;
    assert_eq!(exit.code, 0);
    assert!(output.starts_with("here\n"), "{output}");
    assert!(
        output.contains("sh -c echo here"),
        "sees the other's processes: {output}"
    );
    assert!(
        output.contains("8192") && output.ends_with("\n0\n"),
        "{output}"
    );
    let ps = guest.exec("first", &["ps"]).await.unwrap().text();
    assert!(
        !ps.contains("sleep 1000"),
        "what the second left is dead: {ps}"
    );
    assert!(ps.contains("echo here"), "and the first is not: {ps}");
    guest.remove("second").await;
    guest.remove("first").await;
    guest.shut_down().await;
}

#[tokio::test]
async fn a_terminal_is_one_stream() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "tty; test -t 0 && test -t 2 && echo terminal; stty size; echo err >&2; \
                  echo over > /dev/console";
    let container = Container::sh("tty", &root, script)
        .set("/process/terminal", json!(true))
        .set("/process/consoleSize", json!({ "height": 24, "width": 80 }));
    let (exit, output) = guest.run_to_end(container).await;
    assert_eq!(exit.code, 0);
    let lines: Vec<&str> = output.lines().map(str::trim_end).collect();
    assert_eq!(lines, ["/dev/pts/0", "terminal", "24 80", "err", "over"]);
    guest.shut_down().await;
}

#[tokio::test]
async fn volumes_come_from_the_shared_directory() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let shared = guest.path("shared");
    fs::create_dir(shared.join("data")).unwrap();
    fs::set_permissions(shared.join("data"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(shared.join("data/in"), "from the host\n").unwrap();
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
    assert_eq!(
        fs::read_to_string(shared.join("data/out")).unwrap(),
        "out\n"
    );
    guest.shut_down().await;
}

#[tokio::test]
async fn a_seccomp_profile_and_signals_reach_the_process() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }]
    });
    for nnp in [true, false] {
        let root = guest.attach(&Image::busybox()).await;
        let script = format!("mkdir /x 2>&1; grep Seccomp: /proc/self/status; {FOREVER}");
        let id = format!("nnp-{nnp}");
        let web = User {
            username: "33".into(),
            ..User::default()
        };
        let container = Container::sh(&id, &root, &script)
            .user(web)
            .set("/linux/seccomp", profile.clone())
            .set("/process/noNewPrivileges", json!(nnp));
        guest.run(container).await;
        let output = guest.until_output(&id, "Seccomp:\t").await;
        assert!(
            output.contains("not implemented") && output.contains("Seccomp:\t2"),
            "{output}"
        );
        let done = guest.exec(&id, &["mkdir", "/tmp/y"]).await.unwrap();
        assert_eq!(done.exit.code, 1);
        assert!(
            String::from_utf8_lossy(&done.stderr).contains("not implemented"),
            "{done:?}"
        );
        let mut events = guest.events().await;
        guest.signal(&id, libc::SIGKILL, true).await;
        assert_eq!(exit_of(&mut events, &id).await.code, 137);
    }
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

#[tokio::test]
async fn the_pod_has_its_address_and_routes() {
    let Some(artifacts) = artifacts() else { return };
    let network = network::Network::create();
    let (netns, tap) = network.descriptors();
    let options = Options {
        network: Some((netns, tap, network::MAC)),
        ..Options::default()
    };
    let mut guest = Guest::start(&artifacts, options).await;
    let mut pod = configuration();
    pod.interface = Some(network::interface());
    pod.dns = Some(Dns {
        servers: vec!["10.231.8.1".into()],
        ..Dns::default()
    });
    pod.sysctls = [("net.ipv4.conf.eth0.arp_notify".into(), "1".into())].into();
    guest.configure(pod).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "ip addr show eth0; ip route; ip -6 route; cat /etc/hosts /etc/resolv.conf; \
                  cat /proc/sys/net/ipv4/conf/eth0/arp_notify; ping -c 1 -W 5 10.231.8.1; \
                  ping -c 1 -W 5 fd07:231::1; ping -c 1 -W 5 127.0.0.1";
    let (exit, output) = guest.run_to_end(Container::sh("net", &root, script)).await;
    assert_eq!(exit.code, 0, "{output}");
    for expected in [
        "link/ether 02:d7:00:00:01:01",
        "mtu 1400",
        "inet 10.231.8.5/24",
        "inet6 fd07:231::5/64",
        "default via 10.231.8.1 dev eth0",
        "192.0.2.1 dev eth0 scope link",
        "198.51.100.0/24 via 192.0.2.1",
        "default via fd07:231::1",
        "10.231.8.5\ttest-pod\nfd07:231::5\ttest-pod\n",
        "nameserver 10.231.8.1\n1\n",
    ] {
        assert!(output.contains(expected), "{expected}:\n{output}");
    }
    assert_eq!(output.matches(" 0% packet loss").count(), 3, "{output}");
    network.ping("10.231.8.5");
    let stats = guest
        .agent
        .stats(StatsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let nic = stats
        .guest
        .unwrap()
        .interfaces
        .into_iter()
        .find(|nic| nic.name == "eth0")
        .unwrap();
    assert!(nic.rx_bytes > 0 && nic.tx_bytes > 0, "{nic:?}");
    guest.shut_down().await;
}

#[tokio::test]
async fn many_containers_one_after_another_leave_nothing_in_the_guest() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let mut rss = Vec::new();
    for round in 0..40 {
        let id = format!("round-{round}");
        let quiet = Container {
            log: false,
            ..Container::sh(&id, &root, "echo x > /file")
        };
        let mut events = guest.events().await;
        guest.run(quiet).await;
        assert_eq!(exit_of(&mut events, &id).await.code, 0);
        guest.remove(&id).await;
        let stats = guest
            .agent
            .stats(StatsRequest::default())
            .await
            .unwrap()
            .into_inner();
        rss.push(stats.guest.unwrap().agent_rss_bytes);
    }
    println!("agent RSS: {rss:?}");
    assert!(rss[39] <= rss[9] + (512 << 10), "{rss:?}");
    let look = Container::sh(
        "look",
        &root,
        "ls /sys/block/vdb | grep -c vdb; ls /sys/fs/cgroup",
    );
    let output = guest.run_to_end(look).await.1;
    assert!(
        output.starts_with("1\n"),
        "one partition, its own: {output}"
    );
    guest.shut_down().await;
}

#[tokio::test]
async fn ptrace_mode_works_as_well() {
    let Some(artifacts) = artifacts() else { return };
    let options = Options {
        mode: UmlMode::Ptrace,
        ..Options::default()
    };
    let mut guest = Guest::start(&artifacts, options).await;
    guest.configure(configuration()).await;
    let root = guest.attach(&Image::busybox()).await;
    guest.run(Container::sh("slow", &root, FOREVER)).await;
    for _ in 0..3 {
        assert_eq!(
            guest.exec("slow", &["echo", "hi"]).await.unwrap().text(),
            "hi\n"
        );
    }
    guest.remove("slow").await;
    guest.shut_down().await;
}
