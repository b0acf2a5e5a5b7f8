//! Commands: streams, terminals, many at once, clients that vanish.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use podsandbox::{ErrorKind, ExecOptions, Session};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::{Done, MIB, all, command, converse, guest_with, held, noise, until, until_held};
use crate::harness::{PATIENCE, artifacts};

#[tokio::test]
async fn a_command_has_its_streams_and_its_exit_code() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = guest_with(&artifacts, "web").await;
    let daemon = guest.daemon.clone();

    let script = "cat; echo bad >&2; exit 5";
    let begun = Instant::now();
    let session = daemon.exec(command("web", &["sh", "-c", script])).await;
    println!("exec: {:?}", begun.elapsed());
    let done = converse(session.unwrap(), b"good\n").await;
    println!("exec and its end: {:?}", begun.elapsed());
    assert_eq!(
        done,
        Done {
            stdout: b"good\n".to_vec(),
            stderr: b"bad\n".to_vec(),
            exit: Ok(5)
        }
    );

    // A process that takes no input, and one that is killed.
    let Session { stdin, exit, .. } = daemon.exec(command("web", &["true"])).await.unwrap();
    let mut stdin = stdin.unwrap();
    let broken = async { while stdin.write_all(b"x").await.is_ok() {} };
    timeout(PATIENCE, broken).await.expect("a broken pipe");
    assert_eq!(exit.await, Ok(0));
    let session = daemon
        .exec(command("web", &["sh", "-c", "kill -9 $$"]))
        .await;
    assert_eq!(converse(session.unwrap(), b"").await.exit, Ok(137));

    let error = daemon.exec(command("web", &["nope"])).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("not found in $PATH"), "{error}");
    let error = daemon.exec(command("none", &["true"])).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");

    // What it leaves in the background does not hold the session up.
    let script = "sleep 100 & echo left";
    let session = daemon.exec(command("web", &["sh", "-c", script])).await;
    let done = converse(session.unwrap(), b"").await;
    assert_eq!((done.text().as_str(), done.exit), ("left\n", Ok(0)));
    let left = held(&mut guest).await;
    assert!(left.rest.contains("sleep 100\n"), "{left:?}");
    guest.signal("web", libc::SIGKILL, true).await;
    guest.remove("web").await;
    let left = held(&mut guest).await;
    assert!(
        !left.rest.contains("sleep 100\n") && left.rest.ends_with("\n1\n1\n"),
        "{left:?}"
    );
    guest.shut_down().await;
}

#[tokio::test]
async fn sixty_four_mebibytes_go_there_and_back() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = guest_with(&artifacts, "web").await;
    let before = held(&mut guest).await;
    let input = noise(64 * MIB);
    let begun = Instant::now();
    let session = guest.daemon.exec(command("web", &["cat"])).await.unwrap();
    let done = converse(session, &input).await;
    println!("64 MiB both ways: {:?}", begun.elapsed());
    assert_eq!(done.exit, Ok(0));
    assert!(done.stdout == input, "{} bytes", done.stdout.len());

    // Nobody reads: the process waits, and nothing piles up.
    let session = guest.daemon.exec(command("web", &["yes"])).await.unwrap();
    let memory = guest.stats().await.guest.unwrap().agent_rss_bytes;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let grown = guest.stats().await.guest.unwrap().agent_rss_bytes;
    assert!(grown < memory + 4 * MIB as u64, "{memory} {grown}");
    drop(session);
    until_held(&mut guest, &before).await;
    guest.shut_down().await;
}

#[tokio::test]
async fn a_command_has_a_terminal_of_its_own() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = guest_with(&artifacts, "web").await;
    let before = held(&mut guest).await;
    let script = "trap 'stty size; exit 7' WINCH; tty; echo $TERM; echo err >&2; echo ready; \
                  while :; do sleep 1; done";
    let with_terminal = |argv: &[&str]| ExecOptions {
        tty: true,
        ..command("web", argv)
    };
    let session = guest.daemon.exec(with_terminal(&["sh", "-c", script]));
    let Session {
        stdout,
        stderr,
        resize,
        exit,
        ..
    } = session.await.unwrap();
    assert!(stderr.is_none());
    let mut stdout = stdout.unwrap();
    let text = until(&mut *stdout, "ready").await;
    assert!(
        text.starts_with("/dev/pts/") && text.contains("xterm\r\nerr\r\n"),
        "{text}"
    );
    resize.unwrap().send((100, 40)).await.unwrap();
    let rest = String::from_utf8(all(Some(stdout)).await).unwrap();
    assert!(rest.contains("40 100"), "{rest}");
    assert_eq!(exit.await, Ok(7));

    // Control-C reaches the foreground process; typed lines come back.
    let mut session = guest.daemon.exec(with_terminal(&["cat"])).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"hello\n").await.unwrap();
    until(session.stdout.as_mut().unwrap(), "hello\r\nhello\r\n").await;
    stdin.write_all(b"\x03").await.unwrap();
    assert_eq!(converse(session, b"").await.exit, Ok(130));

    // A client that vanishes takes the shell and its jobs along.
    let mut session = guest.daemon.exec(with_terminal(&["sh"])).await.unwrap();
    let stdin = session.stdin.as_mut().unwrap();
    stdin.write_all(b"sleep 100 & sleep 200\n").await.unwrap();
    until(session.stdout.as_mut().unwrap(), "sleep 200").await;
    drop(session);
    until_held(&mut guest, &before).await;
    guest.shut_down().await;
}

#[tokio::test]
async fn a_client_that_vanishes_takes_its_command_along() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = guest_with(&artifacts, "web").await;
    let before = held(&mut guest).await;
    let scripts = [
        "sleep 100 & sleep 200",
        "yes",
        "cat",
        "exec yes >&2",
        "echo over",
    ];
    for round in 0..4 {
        for script in scripts {
            let session = guest.daemon.exec(command("web", &["sh", "-c", script]));
            if round == 0 {
                // While it is being made.
                let stage = Duration::from_millis(7 * script.len() as u64 % 50);
                drop(timeout(stage, session).await);
                continue;
            }
            let mut session = session.await.unwrap();
            match round {
                1 => session.stdout = None,
                2 => (session.stdin, session.stderr) = (None, None),
                _ => {}
            }
            drop(session);
        }
    }
    until_held(&mut guest, &before).await;
    guest.shut_down().await;
}

#[tokio::test]
async fn two_hundred_commands_run_at_once() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = guest_with(&artifacts, "web").await;
    let before = held(&mut guest).await;
    let begun = Instant::now();
    let daemon = guest.daemon.clone();
    let open = |_| daemon.exec(command("web", &["cat"]));
    let sessions: Vec<Session> = join_all((0..200).map(open))
        .await
        .into_iter()
        .map(|session| session.unwrap())
        .collect();
    println!("200 are open: {:?}", begun.elapsed());
    // The limit is told, and everything else goes on.
    let more = join_all((0..100).map(open)).await;
    let (more, refused): (Vec<_>, Vec<_>) = more.into_iter().partition(Result::is_ok);
    assert_eq!((more.len(), refused.len()), (56, 44));
    for error in refused.into_iter().filter_map(Result::err) {
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    }
    drop(more);
    let inputs: Vec<Vec<u8>> = (0..sessions.len())
        .map(|number| number.to_string().repeat(5000).into_bytes())
        .collect();
    let done = sessions.into_iter().zip(&inputs);
    let done = join_all(done.map(|(session, input)| converse(session, input))).await;
    for (done, input) in done.iter().zip(&inputs) {
        assert!(
            done.stdout == *input && done.exit == Ok(0),
            "{:?}",
            done.exit
        );
    }
    println!("200 are done: {:?}", begun.elapsed());
    until_held(&mut guest, &before).await;
    guest.shut_down().await;
}
