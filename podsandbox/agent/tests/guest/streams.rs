//! Exec, attach and forwarded ports, through the daemon's own client.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use podsandbox::{AttachOptions, Error, ErrorKind, ExecOptions, Session};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::FOREVER;
use crate::harness::{
    Artifacts, Container, Guest, Image, Options, PATIENCE, artifacts, configuration,
};

const MIB: usize = 1 << 20;

fn command(id: &str, argv: &[&str]) -> ExecOptions {
    ExecOptions {
        container_id: id.into(),
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    }
}

fn client(id: &str, stdin: bool) -> AttachOptions {
    AttachOptions {
        container_id: id.into(),
        stdin,
        stdout: true,
        stderr: true,
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Done {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Result<i32, String>,
}

impl Done {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

async fn all(stream: Option<Box<dyn AsyncRead + Send + Unpin>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        stream.read_to_end(&mut bytes).await.unwrap();
    }
    bytes
}

/// Writes `input`, ends it, and takes everything that comes back.
async fn converse(session: Session, input: &[u8]) -> Done {
    let Session {
        stdin,
        stdout,
        stderr,
        exit,
        ..
    } = session;
    let write = async {
        if let Some(mut stdin) = stdin {
            stdin.write_all(input).await.unwrap();
            stdin.shutdown().await.unwrap();
        }
    };
    let work = async { tokio::join!(write, all(stdout), all(stderr), exit) };
    let ((), stdout, stderr, exit) = timeout(2 * PATIENCE, work).await.expect("an end");
    Done {
        stdout,
        stderr,
        exit,
    }
}

/// Reads until `text` has come.
async fn until(stream: &mut (dyn AsyncRead + Send + Unpin), text: &str) -> String {
    let mut seen = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&seen).contains(text) {
            assert!(
                stream.read_buf(&mut seen).await.unwrap() > 0,
                "no {text:?} in {seen:?}"
            );
        }
    };
    timeout(PATIENCE, read).await.expect(text);
    String::from_utf8_lossy(&seen).into_owned()
}

/// Bytes without a pattern that a lost or doubled buffer would fit into.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// A container that sees the agent and every process of the guest.
fn watcher(root: &agent_api::RootDisk) -> Container {
    let capabilities = ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"];
    Container::sh("watcher", root, FOREVER)
        .set(
            "/linux/namespaces",
            json!([{ "type": "mount" }, { "type": "pid", "path": "/proc/1/ns/pid" }]),
        )
        .set(
            "/process/capabilities",
            json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities }),
        )
}

/// Sockets and other descriptors of the agent, processes of containers, their
/// cgroups, and those of commands.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    text: String,
}

async fn held(guest: &mut Guest) -> Held {
    // The exec that looks has a few descriptors and a cgroup of its own; some
    // that are listed are gone when they are looked at.
    let script = "ls /proc/1/fd 2> /dev/null | wc -l; \
                  ps -o args | grep -e sleep -e '^cat' -e '^yes' | grep -v -e grep -e 'sleep 1$' | sort; \
                  ls -d /sys/fs/cgroup/pod/*/ | wc -l; \
                  find /sys/fs/cgroup/pod -name 'exec-*' | wc -l";
    let done = guest.exec("watcher", &["sh", "-c", script]).await.unwrap();
    assert!(done.stderr.is_empty(), "{done:?}");
    Held { text: done.text() }
}

/// Waits until the guest holds what it held before.
async fn until_held(guest: &mut Guest, before: &Held) {
    let deadline = Instant::now() + PATIENCE / 2;
    loop {
        let now = held(guest).await;
        if now == *before {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "left behind: {now:?}, not {before:?}"
        );
    }
}

async fn guest_with(artifacts: &Artifacts, id: &str) -> Guest {
    let options = Options {
        memory_mib: 512,
        ..Options::default()
    };
    let mut guest = Guest::start(artifacts, options).await;
    guest.configure(configuration()).await;
    let root = guest.attach(&Image::busybox()).await;
    guest.run(watcher(&root)).await;
    let root = guest.attach(&Image::busybox()).await;
    guest.run(Container::sh(id, &root, FOREVER)).await;
    // Its connection is counted from the beginning.
    guest.daemon.list().await.unwrap();
    guest
}

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
    assert!(left.text.contains("sleep 100\n"), "{left:?}");
    guest.signal("web", libc::SIGKILL, true).await;
    guest.remove("web").await;
    let left = held(&mut guest).await;
    assert!(
        !left.text.contains("sleep 100\n") && left.text.ends_with("\n1\n1\n"),
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

#[tokio::test]
async fn ports_of_the_loopback_are_reached() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    guest.run(watcher(&root)).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = format!(
        "echo four > /tmp/index.html; httpd -h /tmp -p 127.0.0.1:8080; \
         httpd -h /tmp -p [::1]:8081; nc -ll -p 9000 -e cat & nc -ll -p 9001 -e sleep 300 & {FOREVER}"
    );
    guest.run(Container::sh("web", &root, &script)).await;
    let daemon = guest.daemon.clone();
    let deadline = Instant::now() + PATIENCE;
    for port in [8080, 8081, 9000, 9001] {
        // Until it listens.
        while let Err(error) = daemon.port_forward("pod", port).await {
            assert!(matches!(error, Error::Forward { .. }), "{error}");
            assert!(Instant::now() < deadline, "{error}");
        }
    }
    let ask = async |port| {
        let mut stream = daemon.port_forward("pod", port).await.unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    for port in [8080, 8081] {
        let answer = timeout(PATIENCE, ask(port)).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1") && answer.ends_with("four\n"),
            "{answer}"
        );
    }
    let answers = (0..50).map(|number| ask([8080, 8081][number % 2]));
    let answers = timeout(PATIENCE, join_all(answers)).await.unwrap();
    assert!(answers.iter().all(|answer| answer.ends_with("four\n")));

    // Half-closed, with all of the answer to come.
    let input = noise(8 * MIB);
    let stream = daemon.port_forward("pod", 9000).await.unwrap();
    let (mut from, mut to) = stream.into_split();
    let mut output = Vec::new();
    let (written, read) = tokio::join!(
        async {
            to.write_all(&input).await.unwrap();
            to.shutdown().await
        },
        timeout(PATIENCE, from.read_to_end(&mut output)),
    );
    written.unwrap();
    read.unwrap().unwrap();
    assert!(output == input, "{} bytes", output.len());

    let refused = daemon.port_forward("the-pod", 9).await.unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("the-pod") && text.contains("port 9"),
        "{text}"
    );
    assert!(text.contains("127.0.0.1") && text.contains("::1"), "{text}");

    // A server that neither reads nor closes does not keep what a client that
    // vanished had.
    let script = "ls -l /proc/1/fd 2> /dev/null | grep -c socket:";
    let count = async |guest: &mut Guest| {
        guest
            .exec("watcher", &["sh", "-c", script])
            .await
            .unwrap()
            .text()
    };
    let settled = Instant::now() + PATIENCE;
    let before = loop {
        let first = count(&mut guest).await;
        if first == count(&mut guest).await || Instant::now() > settled {
            break first;
        }
    };
    let mut streams = Vec::new();
    for number in 0..20 {
        let mut stream = daemon.port_forward("pod", 9001).await.unwrap();
        stream.write_all(b"never read").await.unwrap();
        if number % 2 == 0 {
            stream.shutdown().await.unwrap();
        }
        streams.push(stream);
    }
    let during = count(&mut guest).await;
    assert_ne!(during, before);
    drop(streams);
    let deadline = Instant::now() + PATIENCE / 2;
    loop {
        let now = count(&mut guest).await;
        if now == before {
            break;
        }
        assert!(Instant::now() < deadline, "{now}, not {before}");
    }
    guest.shut_down().await;
}
