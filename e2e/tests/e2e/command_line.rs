//! What the program tells beside serving: pods, consoles, its own description.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cri_api::v1::*;
use e2e::{Machine, Node, Server, artifacts, eventually, patient, pod};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::{drupe, on_drupe};

/// What takes longer than this hangs.
const SOON: Duration = Duration::from_secs(20);

pub fn drupe_command(node: &Node, args: &[&str]) -> Result<Command> {
    let mut command = Command::new(artifacts::daemon()?);
    command.args(args).arg("--config").arg(node.config_file());
    Ok(command)
}

/// What it prints when it succeeds.
pub fn prints(node: &Node, args: &[&str]) -> Result<String> {
    let output = drupe_command(node, args)?.output().context("drupe")?;
    ensure!(
        output.status.success(),
        "{args:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Fails unless it failed with one line that has all of `parts`.
pub fn fails(output: &Output, parts: &[&str]) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(output.stdout.is_empty(), "{output:?}");
    ensure!(said.trim_end().lines().count() == 1, "not one line: {said}");
    for part in parts {
        ensure!(said.contains(part), "{part:?} is not in: {said}");
    }
    Ok(())
}

#[test]
fn a_shell_and_man_are_told_every_command() -> Result<()> {
    let run = |args: &[&str]| {
        let output = Command::new(artifacts::daemon()?).args(args).output()?;
        Ok::<_, anyhow::Error>((output.status.code(), String::from_utf8(output.stdout)?))
    };
    for shell in ["bash", "zsh", "fish"] {
        let (code, text) = run(&["completions", shell])?;
        assert_eq!(code, Some(0));
        for word in ["serve", "pods", "logs", "console"] {
            ensure!(text.contains(word), "{word} is not in {shell}'s: {text}");
        }
    }
    let (code, page) = run(&["man"])?;
    assert_eq!(code, Some(0));
    ensure!(page.contains(".TH drupe 8"), "{page}");
    let (code, page) = run(&["man", "logs"])?;
    assert_eq!(code, Some(0));
    ensure!(page.contains("\\-\\-console"), "{page}");
    assert_eq!(run(&["man", "none"])?.0, Some(2));
    Ok(())
}

#[test]
fn pods_are_listed_with_what_their_start_took() -> Result<()> {
    let node = drupe()?;
    let table = prints(&node, &["pods"])?;
    assert_eq!(table.lines().count(), 1, "{table}");
    assert_eq!(prints(&node, &["pods", "-o", "json"])?, "[]\n");

    let gone = node.run_pod("gone")?;
    gone.stop()?;
    let pod = node.run_pod("web")?;
    let table = prints(&node, &["pods"])?;
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let address = pod.addresses()?.swap_remove(0);
    assert_eq!(lines.len(), 3, "{table}");
    // The newest first.
    let [id, name, handler, machine, state, _age, start, ip] = lines[1][..] else {
        bail!("{table}");
    };
    assert_eq!(
        [id, name, handler, machine, state, ip],
        [
            &pod.id[..13],
            "e2e/web",
            "microvm",
            Machine::under_test()?.name(),
            "ready",
            &*address
        ]
    );
    let start: u64 = start.strip_suffix("ms").context("no unit")?.parse()?;
    let steps = pod::timeline(&node, &pod.id)?;
    ensure!(start > 0 && !steps.is_empty(), "{table}");
    assert_eq!(lines[2][0], &gone.id[..13]);
    assert_eq!(lines[2][4], "stopped");
    assert_eq!(lines[2][7], "-");

    let list: Value = serde_json::from_str(&prints(&node, &["pods", "-o", "json"])?)?;
    assert_eq!(list[0]["id"], json!(pod.id));
    assert_eq!(list[0]["namespace"], "e2e");
    assert_eq!(list[0]["name"], "web");
    assert_eq!(list[0]["machine"], Machine::under_test()?.name());
    assert_eq!(list[0]["addresses"], json!(pod.addresses()?));
    let micros = list[0]["startMicros"].as_u64().context("no time")?;
    assert_eq!(micros / 1000, start);
    node.finish()
}

#[test]
fn a_pods_console_is_found_by_its_name_or_id() -> Result<()> {
    let node = talkative()?;
    let pod = node.run_pod("web")?;
    let by_name = prints(&node, &["logs", "--console", "e2e/web"])?;
    ensure!(by_name.contains("Linux version"), "{by_name}");
    let by_id = prints(&node, &["logs", "--console", &pod.id[..8]])?;
    ensure!(by_id.starts_with(&by_name), "{by_id}");
    prints(&node, &["logs", "--console", &pod.id])?;

    let console = |wanted: &str| {
        let mut command = drupe_command(&node, &["logs", "--console", wanted])?;
        command.output().context("drupe")
    };
    fails(&console("e2e/none")?, &["e2e/none", "drupe pods"])?;
    let mut config = node.pod_config("on-the-host");
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    let options = context.namespace_options.get_or_insert_default();
    options.network = NamespaceMode::Node.into();
    let on_host = node.run_pod_with(config)?;
    fails(
        &console("e2e/on-the-host")?,
        &[&on_host.id[..13], "node's kernel", "crictl logs"],
    )?;
    let twins = [node.run_pod("twin")?, node.run_pod("twin")?];
    let both = [&twins[0].id[..13], &twins[1].id[..13]];
    let said = ["more than one pod", both[0], both[1], "give one's id"];
    fails(&console("e2e/twin")?, &said)?;
    // Of two with one name the one that is ready is meant.
    twins[0].stop()?;
    prints(&node, &["logs", "--console", "e2e/twin"])?;

    pod.stop()?;
    fails(&console("e2e/web")?, &[&pod.id[..13], "is stopped"])?;
    node.finish()
}

/// A node whose guests print all that their kernels say; usually they are told
/// to be quiet.
fn talkative() -> Result<Node> {
    Node::builder()
        .server(Server::Drupe)
        .config(|config| {
            config["runtimes"]["microvm"]["kernel_args"] = json!(["ignore_loglevel"]);
        })
        .start()
}

/// A follower and the lines it prints.
struct Follower {
    child: Child,
    lines: Receiver<String>,
}

impl Follower {
    fn start(node: &Node, pod: &str) -> Result<Self> {
        let mut command = drupe_command(node, &["logs", "--console", "-f", pod])?;
        let mut child = command.stdout(Stdio::piped()).spawn().context("drupe")?;
        let output = child.stdout.take().context("no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines })
    }

    fn await_line(&self, part: &str) -> Result<()> {
        loop {
            let line = self.lines.recv_timeout(patient(SOON));
            if line
                .with_context(|| format!("no line with {part:?}"))?
                .contains(part)
            {
                return Ok(());
            }
        }
    }

    fn await_end(&mut self) -> Result<()> {
        let status = eventually("the follower to end", SOON, || {
            self.child.try_wait()?.context("it runs")
        })?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // After its end both fail, and nothing is left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_console_is_followed_until_its_machine_ends() -> Result<()> {
    on_drupe(talkative()?, |node| {
        node.pull_busybox()?;
        let pod = node.run_pod("talks")?;
        let mut config = pod.container_config("c", &["sleep", "1000"]);
        pod::security(&mut config).privileged = true;
        let container = pod.start_with(config)?;

        let mut follower = Follower::start(node, "e2e/talks")?;
        follower.await_line("Linux version")?;
        let say =
            |what: &str| container.exec(&["sh", "-c", &format!("echo '<1>{what}' > /dev/kmsg")]);
        say("once")?;
        follower.await_line("once")?;
        say("and again")?;
        follower.await_line("and again")?;

        // One whose output nobody reads any more ends.
        let mut unread = Follower::start(node, "e2e/talks")?;
        let (_, nobody) = channel();
        drop(std::mem::replace(&mut unread.lines, nobody));
        say("to nobody")?;
        follower.await_line("to nobody")?;
        say("to nobody again")?;
        unread.await_end()?;

        // A daemon that restarts takes no follower along.
        node.kill_server()?;
        node.start_server()?;
        pod.stop()?;
        follower.await_end()?;
        Ok(())
    })
}

#[test]
fn without_a_daemon_the_remedy_is_told() -> Result<()> {
    let node = Node::builder().server(Server::Drupe).prepare()?;
    let socket = node.socket().display().to_string();
    for args in [&["pods"][..], &["logs", "--console", "x/y"]] {
        let output = drupe_command(&node, args)?.output()?;
        fails(&output, &[&socket, "systemctl start drupe", "--config"])?;
    }
    node.finish_without_server()
}

#[test]
fn systemd_is_told_when_requests_are_taken() -> Result<()> {
    let node = Node::builder().server(Server::Drupe).prepare()?;
    let path = node.dir.join("notify.sock");
    let told = UnixDatagram::bind(&path)?;
    told.set_read_timeout(Some(patient(SOON)))?;
    let next = || {
        let mut text = [0; 256];
        let len = told.recv(&mut text).context("systemd is told nothing")?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&text[..len]).into_owned())
    };
    let log = fs::File::create(node.dir.join("notify.log"))?;
    let mut command = drupe_command(&node, &["serve"])?;
    command.env("NOTIFY_SOCKET", &path).stderr(log);
    let mut daemon = node.netns.run(|| command.spawn().context("drupe"))?;
    let outcome = (|| {
        assert_eq!(next()?.trim(), "READY=1");
        UnixStream::connect(node.socket()).context("it says ready and is not")?;
        kill(Pid::from_raw(i32::try_from(daemon.id())?), Signal::SIGTERM)?;
        assert_eq!(next()?.trim(), "STOPPING=1");
        Ok::<_, anyhow::Error>(())
    })();
    if outcome.is_err() {
        daemon.kill()?;
    }
    let status = daemon.wait()?;
    outcome?;
    ensure!(status.success(), "{status}");
    node.finish_without_server()
}
