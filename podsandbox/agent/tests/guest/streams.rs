//! Exec, attach and forwarded ports, through the daemon's own client.

mod attach;
mod commands;
mod ports;

use std::time::Instant;

use podsandbox::{AttachOptions, ExecOptions, Session};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::FOREVER;
use crate::harness::{Artifacts, Container, Guest, Image, Options, PATIENCE, configuration};

const MIB: usize = 1 << 20;

fn command(id: &str, argv: &[&str]) -> ExecOptions {
    ExecOptions {
        container_id: id.into(),
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        tty: false,
        size: None,
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

/// What the guest holds for its containers.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    /// Sockets and other descriptors of the agent.
    descriptors: usize,
    /// Processes of containers, their cgroups, and those of commands.
    rest: String,
}

async fn held_now(guest: &mut Guest) -> Held {
    // The exec that looks has a few descriptors and a cgroup of its own; some
    // that are listed are gone when they are looked at.
    let script = "ls /proc/1/fd 2> /dev/null | wc -l; \
                  ps -o args | grep -e sleep -e '^cat' -e '^yes' | grep -v -e grep -e 'sleep 1$' | sort; \
                  ls -d /sys/fs/cgroup/pod/*/ | wc -l; \
                  find /sys/fs/cgroup/pod -name 'exec-*' 2> /dev/null | wc -l";
    let done = guest.exec("watcher", &["sh", "-c", script]).await.unwrap();
    assert!(done.stderr.is_empty(), "{done:?}");
    let text = done.text();
    let (descriptors, rest) = text.split_once('\n').expect("lines");
    Held {
        descriptors: descriptors.trim().parse().expect(descriptors),
        rest: rest.to_owned(),
    }
}

/// What the guest holds once what went before has been let go of.
async fn held(guest: &mut Guest) -> Held {
    let deadline = Instant::now() + PATIENCE / 2;
    let mut last = held_now(guest).await;
    loop {
        let now = held_now(guest).await;
        if now == last {
            return now;
        }
        assert!(Instant::now() < deadline, "never still: {last:?}, {now:?}");
        last = now;
    }
}

/// Waits until the guest holds no more than it held before.
async fn until_held(guest: &mut Guest, before: &Held) {
    let deadline = Instant::now() + PATIENCE / 2;
    loop {
        let now = held_now(guest).await;
        if now.descriptors <= before.descriptors && now.rest == before.rest {
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
