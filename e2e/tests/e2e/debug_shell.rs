//! `drupe debug`: a root shell in a pod's guest.

mod sessions;
mod terminal;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::{Node, Server, eventually, patient};

use crate::command_line::{drupe_command, fails};
use crate::{drupe, host_pods, on_drupe, userns};

const SOON: Duration = Duration::from_secs(20);

/// A node that has debug shells.
fn with_shells(test: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let node = Node::builder()
        .server(Server::Drupe)
        .config(|config| config["debug"]["shells"] = true.into())
        .start()?;
    node.pull_busybox()?;
    on_drupe(node, test)
}

/// Runs a command in the guest of a pod, with this as its input.
fn debug(node: &Node, args: &[&str], input: &[u8]) -> Result<Output> {
    let mut shell = Shell::start(node, args)?;
    let stdin = shell.stdin.take().context("no input")?;
    let output = std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            let mut stdin = stdin;
            // One that reads nothing is no error.
            let _ = stdin.write_all(input);
        });
        let output = shell.output();
        writer.join().map_err(|_| anyhow::anyhow!("the writer"))?;
        output
    })?;
    Ok(output)
}

/// What a command that succeeds prints, trimmed.
fn says(node: &Node, pod: &str, command: &[&str]) -> Result<String> {
    let args = [&[pod, "--"][..], command].concat();
    let output = debug(node, &args, b"")?;
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// A client of the daemon. It is killed when this is dropped.
struct Shell {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Shell {
    fn start(node: &Node, args: &[&str]) -> Result<Self> {
        // The arguments end with the command.
        let config = node.config_file().display().to_string();
        let all = [&["debug", "--config", &config][..], args].concat();
        let mut command = std::process::Command::new(e2e::artifacts::daemon()?);
        command.args(all);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("drupe")?;
        let stdin = child.stdin.take();
        Ok(Self { child, stdin })
    }

    /// One that reads its standard input until it ends, seen to run.
    fn open(node: &Node, pod: &str) -> Result<Self> {
        let mut shell = Self::start(node, &[pod, "--", "sh", "-c", "echo up; exec cat"])?;
        shell.await_line("up")?;
        Ok(shell)
    }

    fn await_line(&mut self, expected: &str) -> Result<()> {
        let output = self.child.stdout.take().context("no output")?;
        let (sender, lines): (_, Receiver<String>) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let line = lines.recv_timeout(patient(SOON));
        assert_eq!(line.with_context(|| format!("no {expected:?}"))?, expected);
        Ok(())
    }

    fn output(mut self) -> Result<Output> {
        // Its end is the reader's to wait for.
        let mut output = Output {
            status: Default::default(),
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
        std::thread::scope(|scope| -> Result<()> {
            let errors = scope.spawn(|| read_all(stderr));
            output.stdout = read_all(stdout)?;
            let errors = errors.join().map_err(|_| anyhow::anyhow!("the reader"))?;
            output.stderr = errors?;
            Ok(())
        })?;
        output.status = self.child.wait()?;
        Ok(output)
    }

    /// How it ends, and what it says of that.
    fn await_end(mut self) -> Result<Output> {
        eventually("the client to end", SOON, || {
            self.child.try_wait()?.context("it runs")
        })?;
        self.child.stdout = None;
        self.output()
    }
}

fn read_all(from: Option<impl std::io::Read>) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    if let Some(mut from) = from {
        from.read_to_end(&mut all)?;
    }
    Ok(all)
}

impl Drop for Shell {
    fn drop(&mut self) {
        // After its end both fail, and nothing is left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the pods' containers hold of the image store; a debug shell's too.
fn leases(node: &Node) -> Result<usize> {
    let leases = fs::read_dir(node.root().join("images/leases"))?;
    Ok(leases.count())
}

fn await_leases(node: &Node, count: usize) -> Result<()> {
    eventually("the shell's container to be gone", SOON, || {
        let now = leases(node)?;
        ensure!(now == count, "{now} leases");
        Ok::<_, anyhow::Error>(())
    })
}

#[test]
fn they_are_off_unless_the_configuration_says_otherwise() -> Result<()> {
    let node = drupe()?;
    node.pull_busybox()?;
    let pod = node.run_pod("web")?;
    pod.start_idle("c")?;
    let output = drupe_command(&node, &["debug", "e2e/web"])?.output()?;
    fails(&output, &["debug.shells", "systemctl restart drupe"])?;
    node.finish()
}

#[test]
fn it_is_root_of_the_guest() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("web")?;
        let web = pod.start("web", &["sh", "-c", "echo mine > /file; exec sleep 54321"])?;
        let guest = |command: &[&str]| says(node, "e2e/web", command);
        // The agent and the containers, each with its files.
        ensure!(guest(&["ps", "-o", "args"])?.contains("sleep 54321"));
        let agent = guest(&["cat", "/proc/1/comm"])?;
        let inside = web.exec(&["cat", "/proc/1/comm"])?;
        ensure!(agent != inside, "PID 1 is {agent}");
        assert_eq!(guest(&["cat", "/guest/run/drupe/etc/hostname"])?, "web");
        let files = "cat /proc/$(pidof sleep)/root/file";
        assert_eq!(guest(&["sh", "-c", files])?, "mine");
        ensure!(guest(&["ls", "/guest/dev"])?.contains("vd"), "no disks");
        // What the guest's own root may.
        let status = guest(&["grep", "-E", "CapEff|Seccomp:", "/proc/self/status"])?;
        ensure!(status.contains("1ffffffffff"), "{status}");
        ensure!(status.ends_with("Seccomp:\t0"), "{status}");
        guest(&["sh", "-c", "echo 1 > /proc/sys/vm/drop_caches"])?;
        ensure!(guest(&["ls", "/sys/fs/cgroup/pod"])?.contains(&web.id));
        // The pod's network.
        let addresses = guest(&["ip", "addr", "show", "eth0"])?;
        for address in pod.addresses()? {
            ensure!(addresses.contains(&address), "{addresses}");
        }
        // Its own files are no other's.
        guest(&["sh", "-c", "echo > /own"])?;
        let others = debug(node, &[&pod.id, "--", "test", "-e", "/own"], b"")?;
        assert_eq!(others.status.code(), Some(1));
        assert_eq!(web.exec(&["cat", "/file"])?, "mine");
        Ok(())
    })
}

#[test]
fn it_fits_into_a_pipe() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("piped")?;
        pod.start_idle("c")?;
        let id = &pod.id[..9];
        let script = b"echo $((6 * 7)); echo wrong >&2; exit 7\n";
        let output = debug(node, &[id], script)?;
        assert_eq!(output.status.code(), Some(7));
        assert_eq!(output.stdout, b"42\n");
        assert_eq!(output.stderr, b"wrong\n");
        let killed = debug(node, &[id, "--", "sh", "-c", "kill -9 $$"], b"")?;
        assert_eq!(killed.status.code(), Some(137));
        // More than all queues on the way hold.
        let much: Vec<u8> = (0..8_u32 << 20).map(|n| (n / 3) as u8).collect();
        let output = debug(node, &[id, "--", "cat"], &much)?;
        ensure!(output.status.success(), "{:?}", output.status);
        ensure!(output.stdout == much, "{} bytes", output.stdout.len());
        // A command may leave its input to nobody.
        let output = debug(node, &[id, "--", "true"], &much)?;
        ensure!(output.status.success(), "{output:?}");
        await_leases(node, 1)
    })
}

#[test]
fn it_is_root_of_the_guest_of_a_pod_with_a_user_namespace() -> Result<()> {
    with_shells(|node| {
        let pod = userns::run_pod(node, "mapped")?;
        let inside = userns::start(&pod, "c", Vec::new())?;
        let mapped = inside.exec(&["cat", "/proc/self/uid_map"])?;
        ensure!(mapped.contains("131072"), "{mapped}");
        let map = says(node, &pod.id, &["cat", "/proc/self/uid_map"])?;
        let numbers: Vec<&str> = map.split_whitespace().collect();
        assert_eq!(numbers, ["0", "0", "4294967295"]);
        let owner = says(node, &pod.id, &["stat", "-c", "%u", "/bin/busybox"])?;
        assert_eq!(owner, "0");
        says(
            node,
            &pod.id,
            &["ls", "/guest/run/drupe/scratch/containers"],
        )?;
        says(
            node,
            &pod.id,
            &["sh", "-c", "echo 1 > /proc/sys/vm/drop_caches"],
        )?;
        let addresses = says(node, &pod.id, &["ip", "addr", "show", "eth0"])?;
        ensure!(addresses.contains(&pod.addresses()?[0]), "{addresses}");
        inside.exec(&["true"]).map(drop)
    })
}

#[test]
fn what_cannot_be_is_refused_with_the_remedy() -> Result<()> {
    with_shells(|node| {
        let refused = |args: &[&str], parts: &[&str]| {
            let output = debug(node, args, b"")?;
            fails(&output, parts).with_context(|| format!("{args:?}"))
        };
        refused(&["e2e/none"], &["e2e/none", "drupe pods"])?;
        let empty = node.run_pod("empty")?;
        let id = empty.id.as_str();
        refused(&["e2e/empty"], &[id, "no container", "--image"])?;
        let image = ["--image", e2e::node::BUSYBOX];
        let tools = debug(node, &[image[0], image[1], id, "--", "pwd"], b"")?;
        assert_eq!(tools.stdout, b"/\n", "{tools:?}");
        let other = ["e2e/empty", "--image", "127.0.0.1:5000/none:1"];
        refused(&other, &["127.0.0.1:5000/none:1", "crictl pull"])?;
        let missing = [image[0], image[1], id, "--", "/bin/none"];
        refused(
            &missing,
            &["/bin/none", "no such file", image[1], "--image"],
        )?;
        // Nothing of all that is left.
        await_leases(node, 0)?;

        let on_host = host_pods::run(node, "on-the-host", host_pods::NETWORK)?;
        refused(
            &["e2e/on-the-host", image[0], image[1]],
            &[&on_host.id, "node's kernel", "crictl exec", "kubectl debug"],
        )?;
        empty.stop()?;
        refused(&[id, image[0], image[1]], &[id, "stopped"])
    })
}

#[test]
fn the_kubelet_does_not_see_it() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("seen")?;
        let web = pod.start_idle("web")?;
        let cri = node.cri()?;
        let mut events = cri.container_events()?;
        let shell = Shell::open(node, &pod.id)?;
        assert_eq!(leases(node)?, 2, "it holds its image");

        let only_web = |ids: Vec<String>| {
            ensure!(ids == [web.id.clone()], "{ids:?}");
            Ok(())
        };
        let listed = cri.list_containers(ListContainersRequest::default())?;
        only_web(listed.containers.into_iter().map(|c| c.id).collect())?;
        let streamed = cri.stream_containers(StreamContainersRequest::default())?;
        let streamed = streamed.into_iter().flat_map(|answer| answer.containers);
        only_web(streamed.map(|c| c.id).collect())?;
        let status = cri.pod_sandbox_status(PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        })?;
        only_web(
            status
                .containers_statuses
                .into_iter()
                .map(|c| c.id)
                .collect(),
        )?;
        let of_container = |stats: ContainerStats| stats.attributes.unwrap_or_default().id;
        let stats = cri.list_container_stats(ListContainerStatsRequest::default())?;
        only_web(stats.stats.into_iter().map(of_container).collect())?;
        let stats = cri.pod_sandbox_stats(PodSandboxStatsRequest {
            pod_sandbox_id: pod.id.clone(),
        })?;
        let linux = stats.stats.and_then(|stats| stats.linux).context("none")?;
        only_web(linux.containers.into_iter().map(of_container).collect())?;
        let metrics = cri.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})?;
        let of_pod = metrics.pod_metrics.into_iter();
        let of_containers = of_pod.flat_map(|pod| pod.container_metrics);
        only_web(of_containers.map(|c| c.container_id).collect())?;

        drop(shell);
        await_leases(node, 1)?;
        // Nothing was told of it, neither of its beginning nor of its end.
        let next = pod.start_idle("next")?;
        let told = events.await_next()?.context("the stream ended")?;
        assert_eq!(told.container_id, next.id);
        let known = told.containers_statuses.iter().map(|c| c.id.as_str());
        let mut known: Vec<&str> = known.collect();
        known.sort_unstable();
        let mut both = [web.id.as_str(), next.id.as_str()];
        both.sort_unstable();
        assert_eq!(known, both);
        Ok(())
    })
}
