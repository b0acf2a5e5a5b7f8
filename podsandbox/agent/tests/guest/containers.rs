//! Containers and their way from create to removal.

use std::fs;

use agent_api::User;
use agent_api::container_state::Phase;
use serde_json::json;
use tonic::Code;

use crate::FOREVER;
use crate::harness::{
    Container, Guest, Image, Options, artifacts, configuration, exit_of, refused,
};

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
async fn output_that_does_not_name_the_logs_token_is_not_the_containers() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let mut forger = Container::sh("forger", &root, "echo forged; echo forged >&2");
    forger.log_token[0] ^= 1;
    let (exit, output) = guest.run_to_end(forger).await;
    // It is none of the container's doing, which runs to its end.
    assert_eq!((exit.code, output.as_str()), (0, ""));
    assert_eq!(guest.output("forger", "stderr"), "");
    guest.remove("forger").await;
    let mut request = Container::sh("short", &root, "true").request();
    request.log_token.pop();
    let short = guest.agent.create_container(request).await;
    let why = refused(short, Code::InvalidArgument);
    assert!(why.contains("token has 15 bytes, 16 belong"), "{why}");
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
        let stats = guest.stats().await;
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
