//! What processes in a container say and are told: commands, output, signals.

use std::time::{Duration, Instant};

use agent_api::exec_sync_event::Event as ExecEvent;
use agent_api::{ExecSyncRequest, User};
use serde_json::json;
use tonic::Code;

use crate::FOREVER;
use crate::harness::{Container, Guest, Image, artifacts, exit_of, refused};

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
    let look = ["sh", "-c", "ps; ls /sys/fs/cgroup"];
    loop {
        let seen = guest.exec("web", &look).await.unwrap().text();
        let groups = seen
            .lines()
            .filter(|line| line.starts_with("exec-"))
            .count();
        assert!(groups >= 1, "this command's own is there: {seen}");
        // A command's group goes after its last process.
        if groups == 1 && !seen.contains("yes") {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "a cancelled command lives on: {seen}"
        );
    }

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
