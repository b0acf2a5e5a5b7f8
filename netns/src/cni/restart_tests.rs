//! A daemon that is killed in the midst of an attachment, and its successor.
//! The daemon is this test's own executable, run again; the plugins are
//! Debian's, held up at chosen points by scripts around them.

use std::{
    env,
    process::{Child, Command, Stdio},
};

use tokio::{
    fs::File as AsyncFile,
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::unix::pipe,
    time::timeout,
};

use super::{
    tests::{Census, bridge_then, census, names, netns, only, script},
    *,
};
use crate::{
    Netns,
    testing::{Host, PLUGINS, bridge_network, cni, cni_in, pod},
};

const DIR: &str = "NETNS_TEST_DIR";
const STEP: &str = "NETNS_TEST_STEP";
/// For a step that a loaded machine takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a call that has to wait is watched waiting.
const WATCHED: Duration = Duration::from_millis(300);

/// What a script does where it is held up: tells `at`, waits for `gate`.
const STOP: &str = "echo here > at; read open < gate";

#[tokio::test]
#[ignore = "the daemon of the tests in this file"]
async fn daemon() {
    let dir = PathBuf::from(env::var_os(DIR).unwrap());
    let cni = cni_in(&dir);
    if env::var(STEP).unwrap() == "DEL" {
        cni.del("p", "eth0").await.unwrap();
        return;
    }
    let network = std::fs::read(dir.join("network")).unwrap();
    let network: NetworkList = serde_json::from_slice(&network).unwrap();
    cni.add(&network, &wants(&dir).await).await.unwrap();
}

async fn wants(dir: &Path) -> PodNetwork {
    let ns = Netns::open(&dir.join("netns"), "pod").await.unwrap();
    let mut wants = pod("p", &ns);
    wants.port_mappings = vec![PortMapping {
        host_port: 8080.try_into().unwrap(),
        container_port: 80.try_into().unwrap(),
        protocol: Protocol::Tcp,
        host_ip: None,
    }];
    wants
}

/// Killed, with the test, if it is not sooner.
struct Daemon(Child);

impl Daemon {
    fn start(host: &Host, step: &str) -> Self {
        let path = env::var("PATH").unwrap();
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "cni::restart_tests::daemon", "--ignored"])
            .env(DIR, host.dir())
            .env(STEP, step)
            // Before the machine's own iptables.
            .env("PATH", format!("{}/sbin:{path}", host.dir().display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// The test's ends of `at` and `gate`.
struct Stop {
    at: BufReader<pipe::Receiver>,
    gate: PathBuf,
}

impl Stop {
    fn new(host: &Host) -> Self {
        for name in ["at", "gate"] {
            run_in(host, &format!("mkfifo {name}"));
        }
        // For reading and writing: there is no end of file before a writer.
        let at = pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(host.dir().join("at"))
            .unwrap();
        Self {
            at: BufReader::new(at),
            gate: host.dir().join("gate"),
        }
    }

    async fn reached(&mut self) {
        let mut line = String::new();
        timeout(PATIENCE, self.at.read_line(&mut line))
            .await
            .expect("the plugin reaches its stop")
            .unwrap();
        assert_eq!(line, "here\n");
    }

    /// Opens the gate for the one that waits at it.
    fn open(&self) {
        // Non-blocking: fails unless somebody waits.
        let mut gate = pipe::OpenOptions::new().open_sender(&self.gate).unwrap();
        assert_eq!(gate.try_write(b"go\n").unwrap(), 3);
        let _ = &mut gate;
    }
}

fn run_in(host: &Host, command: &str) {
    let dir = host.dir().display();
    crate::testing::run("sh", &["-c", &format!("cd {dir} && {command}")]);
}

/// A host on which a first pod has made what all pods share; with the
/// configuration that the daemon is to use.
async fn prepare(host: &Host, network: &NetworkList) -> Census {
    let cni = cni(host);
    let first = netns(host, "first").await;
    let mut wants = pod("first", &first);
    wants.port_mappings = wants_ports();
    cni.add(&bridge_network(host), &wants).await.unwrap();
    cni.del("first", "eth0").await.unwrap();
    first.remove().await.unwrap();
    let before = census(host);
    netns(host, "pod").await;
    let bytes = serde_json::to_vec(network).unwrap();
    std::fs::write(host.dir().join("network"), bytes).unwrap();
    before
}
