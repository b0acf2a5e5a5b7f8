//! A daemon that is killed in the midst of an attachment, and its successor.
//! The daemon is the tests' own executable, run again; the plugins are
//! Debian's, held up at chosen points by scripts around them.

use std::{
    env, fs,
    process::{Child, Command, Stdio},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::unix::pipe,
    time::{sleep, timeout},
};

use super::*;
use crate::testing::{cni, cni_in, pod};

const DIR: &str = "NETNS_TEST_DIR";
const VERB: &str = "NETNS_TEST_VERB";
/// The test that is the daemon.
const DAEMON: &str =
    "cni::tests::restart::a_daemon_that_nobody_kills_leaves_nothing_to_its_successor";
/// For what a loaded machine does in one second.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a call that has to wait is seen to wait.
const WATCHED: Duration = Duration::from_millis(300);
/// In a script: tells that it got here and waits for the test, the first time.
const HOLD: &str = "mkdir held 2>/dev/null && { echo here > at; read go < gate; }";

/// Told by its environment it is the daemon of this test and of those below:
/// what is killed has to be a process of its own, and cargo builds no helper
/// programs for tests that see a crate's inside.
#[tokio::test]
async fn a_daemon_that_nobody_kills_leaves_nothing_to_its_successor() {
    if let Some(dir) = env::var_os(DIR) {
        return be_the_daemon(&PathBuf::from(dir)).await;
    }
    let host = Host::enter();
    let network = network(&host, "bridge", "host-local", "portmap");
    let clean = prepare(&host, &network).await;
    for (verb, attachments) in [(Verb::Add, 1), (Verb::Del, 0)] {
        let mut daemon = Daemon::start(&host, verb);
        assert!(daemon.0.wait().unwrap().success(), "{verb:?}");
        assert_eq!(cni(&host).attachments().await.unwrap().len(), attachments);
    }
    assert_eq!(census(&host), clean);
}

async fn be_the_daemon(dir: &Path) {
    let cni = cni_in(dir);
    if env::var(VERB).unwrap() == "DEL" {
        cni.del("p", "eth0").await.unwrap();
        return;
    }
    let network = fs::read(dir.join("network")).unwrap();
    let network = serde_json::from_slice(&network).unwrap();
    let ns = Netns::open(&dir.join("netns"), "pod").await.unwrap();
    cni.add(&network, &with_port(pod("p", &ns))).await.unwrap();
}

struct Daemon(Child);

impl Daemon {
    fn start(host: &Host, verb: Verb) -> Self {
        let path = env::var("PATH").unwrap();
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", DAEMON])
            .env(DIR, host.dir())
            .env(VERB, verb.name())
            // Before the machine's own iptables.
            .env("PATH", format!("{}/sbin:{path}", host.dir().display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Daemon {
    /// `kill -9`.
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The test's ends of what [`HOLD`] talks to.
struct Held {
    at: BufReader<pipe::Receiver>,
    gate: pipe::Sender,
}

impl Held {
    fn new(host: &Host) -> Self {
        let fifo = |name: &str| {
            let path = host.dir().join(name);
            run("mkfifo", &[path.to_str().unwrap()]);
            path
        };
        // For reading and writing: nobody has to be at the other end yet.
        let mut both = pipe::OpenOptions::new();
        both.read_write(true);
        Self {
            at: BufReader::new(both.open_receiver(fifo("at")).unwrap()),
            gate: both.open_sender(fifo("gate")).unwrap(),
        }
    }

    async fn reached(&mut self) {
        let mut line = String::new();
        timeout(PATIENCE, self.at.read_line(&mut line))
            .await
            .expect("a plugin tells where it is")
            .unwrap();
        assert_eq!(line, "here\n");
    }

    async fn let_go(&mut self) {
        self.gate.write_all(b"go\n").await.unwrap();
    }
}

fn with_port(mut pod: PodNetwork) -> PodNetwork {
    pod.port_mappings = vec![forwarded(8080)];
    pod
}

/// Debian's bridge and portmap, under names that a test may give to scripts.
fn network(host: &Host, bridge: &str, ipam: &str, portmap: &str) -> NetworkList {
    let list = bridge_network(host);
    let mut first = list.plugins[0].config.clone();
    first["type"] = json!(bridge);
    first["ipam"]["type"] = json!(ipam);
    let second = json!({"type": portmap, "capabilities": {"portMappings": true}});
    only("1.0.0", &json!([first, second]))
}

/// A plugin that is Debian's `real`, with something done before and after its
/// `verb`.
fn around(host: &Host, name: &str, real: &str, verb: &str, before: &str, after: &str) {
    let text = format!(
        r#"in=$(cat)
        [ $CNI_COMMAND = {verb} ] && {{ {before}; }}
        out=$(printf %s "$in" | /usr/lib/cni/{real}); code=$?
        [ $CNI_COMMAND = {verb} ] && {{ {after}; }}
        printf %s "$out"; exit $code"#
    );
    script(host, name, &text);
}

/// Makes what all pods share, the pod's namespace and the daemon's
/// configuration; returns what is there without the pod.
async fn prepare(host: &Host, network: &NetworkList) -> Census {
    fs::write(
        host.dir().join("network"),
        serde_json::to_vec(network).unwrap(),
    )
    .unwrap();
    let cni = cni(host);
    let ns = netns(host, "pod").await;
    let plain = bridge_network(host);
    cni.add(&plain, &with_port(pod("first", &ns)))
        .await
        .unwrap();
    cni.del("first", "eth0").await.unwrap();
    let clean = census(host);
    assert!(leases(host).is_empty());
    assert!(names(&host.dir().join("records")).is_empty());
    clean
}

/// Kills the daemon while its plugin is held up in `verb`. The next daemon's
/// DEL has to wait for the plugin, and then leaves nothing.
async fn killed_while_held(host: &Host, network: &NetworkList, verb: Verb) {
    let clean = prepare(host, network).await;
    if verb == Verb::Del {
        let ns = Netns::open(&host.dir().join("netns"), "pod").await.unwrap();
        let pod = with_port(pod("p", &ns));
        cni(host).add(network, &pod).await.unwrap();
    }
    let mut held = Held::new(host);
    let daemon = Daemon::start(host, verb);
    held.reached().await;
    drop(daemon);
    let next = cni(host);
    {
        let mut del = std::pin::pin!(next.del("p", "eth0"));
        let early = timeout(WATCHED, &mut del).await;
        assert!(early.is_err(), "DEL beside a plugin: {early:?}");
        held.let_go().await;
        timeout(PATIENCE, del).await.unwrap().unwrap();
    }
    assert_eq!(census(host), clean);
}

#[tokio::test]
async fn killed_before_the_bridge_plugin_began() {
    let host = Host::enter();
    around(&host, "held", "bridge", "ADD", HOLD, ":");
    let network = network(&host, "held", "host-local", "portmap");
    killed_while_held(&host, &network, Verb::Add).await;
}

#[tokio::test]
async fn killed_before_an_address_was_given() {
    let host = Host::enter();
    around(&host, "held", "host-local", "ADD", HOLD, ":");
    let network = network(&host, "bridge", "held", "portmap");
    killed_while_held(&host, &network, Verb::Add).await;
}

#[tokio::test]
async fn killed_after_an_address_was_given() {
    let host = Host::enter();
    around(&host, "held", "host-local", "ADD", ":", HOLD);
    let network = network(&host, "bridge", "held", "portmap");
    killed_while_held(&host, &network, Verb::Add).await;
}

/// The bridge plugin's DEL beside this ADD fails: "Chain does not exist".
#[tokio::test]
async fn killed_before_the_masquerade_chain_was_made() {
    let host = Host::enter();
    iptables_at(&host, "-N CNI-", HOLD);
    let network = network(&host, "bridge", "host-local", "portmap");
    killed_while_held(&host, &network, Verb::Add).await;
}

#[tokio::test]
async fn killed_before_the_masquerade_rule_was_made() {
    let host = Host::enter();
    iptables_at(&host, "-A POSTROUTING", HOLD);
    let network = network(&host, "bridge", "host-local", "portmap");
    killed_while_held(&host, &network, Verb::Add).await;
}

/// The daemon's iptables, with something done before the command that has `at`.
fn iptables_at(host: &Host, at: &str, before: &str) {
    let dir = host.dir().display();
    let text = format!(
        r#"case "$*" in *"{at}"*) cd {dir}; {before} ;; esac
        exec /usr/sbin/iptables "$@""#
    );
    executable(&host.dir().join("sbin/iptables"), &text);
}

#[tokio::test]
async fn killed_before_the_bridge_plugin_answered() {
    let host = Host::enter();
    around(&host, "held", "bridge", "ADD", ":", HOLD);
    let network = network(&host, "held", "host-local", "portmap");
    killed_while_held(&host, &network, Verb::Add).await;
}

#[tokio::test]
async fn killed_in_the_second_plugin() {
    let host = Host::enter();
    around(&host, "held", "portmap", "ADD", HOLD, ":");
    let network = network(&host, "bridge", "host-local", "held");
    killed_while_held(&host, &network, Verb::Add).await;
}

#[tokio::test]
async fn killed_in_a_del() {
    let host = Host::enter();
    around(&host, "held", "bridge", "DEL", ":", HOLD);
    let network = network(&host, "held", "host-local", "portmap");
    killed_while_held(&host, &network, Verb::Del).await;
}

/// Here the plugin dies, not the daemon: nothing makes what is missing.
#[tokio::test]
async fn the_bridge_plugin_killed_before_its_masquerade_chain_is_undone() {
    let host = Host::enter();
    iptables_at(
        &host,
        "-N CNI-",
        "mkdir reached 2>/dev/null && kill -9 $PPID",
    );
    let network = network(&host, "bridge", "host-local", "portmap");
    let clean = prepare(&host, &network).await;
    let mut daemon = Daemon::start(&host, Verb::Add);
    assert!(!daemon.0.wait().unwrap().success(), "ADD has to fail");
    assert!(host.dir().join("reached").exists());
    assert_eq!(census(&host), clean);
}

/// Unaltered plugins, and no chosen point: what is tried is the time.
#[tokio::test]
async fn killed_at_any_time() {
    let host = Host::enter();
    script(
        &host,
        "tell",
        "[ $CNI_COMMAND = ADD ] && echo here > at; exec /usr/lib/cni/bridge",
    );
    let network = network(&host, "tell", "host-local", "portmap");
    let clean = prepare(&host, &network).await;
    let mut held = Held::new(&host);
    for millis in [0, 10, 20, 40, 60, 80, 110, 150, 200, 300] {
        let daemon = Daemon::start(&host, Verb::Add);
        held.reached().await;
        sleep(Duration::from_millis(millis)).await;
        drop(daemon);
        cni(&host).del("p", "eth0").await.unwrap();
        assert_eq!(census(&host), clean, "killed after {millis} ms");
    }
}

#[tokio::test]
async fn a_plugin_that_outlives_the_wait_is_told_and_undone_later() {
    let host = Host::enter();
    around(&host, "held", "bridge", "ADD", HOLD, ":");
    let network = network(&host, "held", "host-local", "portmap");
    let clean = prepare(&host, &network).await;
    let mut held = Held::new(&host);
    let daemon = Daemon::start(&host, Verb::Add);
    held.reached().await;
    drop(daemon);
    let hasty = Cni::new(CniOptions {
        bin_dirs: Vec::new(),
        record_dir: host.dir().join("records"),
        timeout: Duration::from_millis(500),
    });
    let error = hasty.del("p", "eth0").await.unwrap_err();
    assert!(error.timed_out());
    assert_eq!(
        error.to_string(),
        "an earlier CNI plugin run for pod p (eth0) still goes on after 2.5 s"
    );
    assert_eq!(cni(&host).attachments().await.unwrap().len(), 1);
    held.let_go().await;
    collect(&cni(&host), None, &BTreeSet::new()).await;
    assert_eq!(census(&host), clean);
}
