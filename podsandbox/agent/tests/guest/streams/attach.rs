//! Clients of a container's own streams.

use podsandbox::{ErrorKind, Session};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::{MIB, all, client, converse, held, until, until_held, watcher};
use crate::harness::{Container, Guest, Image, PATIENCE, artifacts};

#[tokio::test]
async fn clients_come_to_a_container_and_go() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    guest.run(watcher(&root)).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "while read line; do echo got $line; echo err $line >&2; done; echo end; exit 4";
    let container = Container {
        stdin: true,
        ..Container::sh("talk", &root, script)
    };
    guest.run(container).await;
    let daemon = guest.daemon.clone();
    daemon.list().await.unwrap();
    let before = held(&mut guest).await;

    // Detached by dropping it, then by the end of its input; the container
    // and its log go on.
    let mut session = daemon.attach(client("talk", true)).await.unwrap();
    assert!(session.resize.is_none());
    let (mut one, mut two) = (
        session.stdin.take().unwrap(),
        session.stdout.take().unwrap(),
    );
    one.write_all(b"one\n").await.unwrap();
    until(&mut *two, "got one\n").await;
    until(session.stderr.as_mut().unwrap(), "err one\n").await;
    let mut watching = daemon.attach(client("talk", false)).await.unwrap();
    drop((session, one, two));
    let done = converse(daemon.attach(client("talk", true)).await.unwrap(), b"two\n").await;
    assert_eq!(done.exit, Ok(0));
    assert_eq!(
        until(watching.stdout.as_mut().unwrap(), "got two\n").await,
        "got two\n"
    );
    guest.until_output("talk", "got two\n").await;
    drop(watching);
    until_held(&mut guest, &before).await;

    // One that stops reading is dropped in the end; no byte of the log is lost.
    let root = guest.attach(&Image::busybox()).await;
    let script = "read go; head -c 8388608 /dev/zero | tr '\\0' 'x'; echo; echo end; exit 6";
    let container = Container {
        stdin: true,
        stdin_once: true,
        ..Container::sh("flood", &root, script)
    };
    guest.run(container).await;
    let stuck = daemon.attach(client("flood", false)).await;
    let Session {
        stdout: unread,
        exit: dropped,
        ..
    } = stuck.unwrap();
    let mut session = daemon.attach(client("flood", true)).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"go\n").await.unwrap();
    let done = converse(session, b"").await;
    assert_eq!(done.exit, Ok(6));
    let count = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'x').count();
    assert_eq!(count(&done.stdout), 8 * MIB);
    drop(unread);
    let why = timeout(PATIENCE, dropped).await.unwrap().unwrap_err();
    assert!(why.contains("took no output of container flood"), "{why}");
    let log = guest.until_output("flood", "end\n").await;
    assert_eq!(count(log.as_bytes()), 8 * MIB);
    drop(stdin);

    // Standard input that belongs to the first client ends with it.
    let root = guest.attach(&Image::busybox()).await;
    let once = Container {
        stdin: true,
        stdin_once: true,
        ..Container::sh("once", &root, "cat; echo over; exit 3")
    };
    guest.run(once).await;
    let done = converse(daemon.attach(client("once", true)).await.unwrap(), b"in\n").await;
    assert_eq!((done.text().as_str(), done.exit), ("in\nover\n", Ok(3)));
    let gone = daemon.attach(client("once", true)).await.err().unwrap();
    assert_eq!(gone.kind(), ErrorKind::FailedPrecondition, "{gone}");
    guest.shut_down().await;
}

#[tokio::test]
async fn a_terminal_is_attached_to_and_resized() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let container = Container {
        stdin: true,
        stdin_once: true,
        ..Container::new("tty", &root, &["sh"]).set("/process/terminal", json!(true))
    };
    guest.run(container).await;
    for word in ["first", "second"] {
        let session = guest.daemon.attach(client("tty", true)).await.unwrap();
        let Session {
            stdin,
            stdout,
            stderr,
            resize,
            exit,
        } = session;
        assert!(stderr.is_none());
        let (mut stdin, mut stdout) = (stdin.unwrap(), stdout.unwrap());
        stdin
            .write_all(format!("echo $((1+1)){word}\n").as_bytes())
            .await
            .unwrap();
        until(&mut *stdout, &format!("2{word}\r\n")).await;
        let resize = resize.unwrap();
        resize.send((70, 30)).await.unwrap();
        let sized = async {
            loop {
                stdin.write_all(b"stty size; echo d''one\n").await.unwrap();
                if until(&mut *stdout, "done\r\n").await.contains("30 70") {
                    return;
                }
            }
        };
        timeout(PATIENCE, sized).await.expect("its size");
        if word == "second" {
            stdin.write_all(b"exit 9\n").await.unwrap();
            all(Some(stdout)).await;
            assert_eq!(exit.await, Ok(9));
        }
    }
    guest.shut_down().await;
}
