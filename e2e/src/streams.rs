//! crictl as a client of exec, attach and port-forward: a process whose
//! standard streams are the container's.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{Container, Node, artifacts};

/// What [`cat`] sends, over and over.
const BLOCK: usize = 1 << 20;

/// crictl, in the node's network, where the server of streams is.
pub fn client(node: &Node, arguments: &[&str]) -> Result<Child> {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("exec {} \"$@\"", crictl_line(node)?), "sh"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    node.netns.run(|| command.spawn().context("crictl"))
}

/// The same for a shell, up to its arguments.
pub fn crictl_line(node: &Node) -> Result<String> {
    Ok(format!(
        "{} --config /dev/null -r unix://{}",
        artifacts::crictl()?.display(),
        node.socket().display()
    ))
}

/// Sends `blocks` MiB through a `cat` in the container and compares what comes
/// back; how long that took.
pub fn cat(node: &Node, transport: &str, container: &Container, blocks: usize) -> Result<Duration> {
    let mut sent = vec![0; BLOCK];
    File::open("/dev/urandom")?.read_exact(&mut sent)?;
    let begun = Instant::now();
    let mut client = client(node, &["exec", "-r", transport, "-i", &container.id, "cat"])?;
    let mut stdin = client.stdin.take().context("its input")?;
    let mut stdout = client.stdout.take().context("its output")?;
    let compared = thread::scope(|scope| {
        let sending = scope.spawn(|| -> Result<()> {
            for _ in 0..blocks {
                stdin.write_all(&sent)?;
            }
            drop(stdin);
            Ok(())
        });
        let mut got = vec![0; BLOCK];
        let mut compare = || -> Result<()> {
            for block in 0..blocks {
                stdout
                    .read_exact(&mut got)
                    .with_context(|| format!("after {block} MiB"))?;
                ensure!(got == sent, "MiB {block} differs");
            }
            ensure!(stdout.read(&mut got)? == 0, "more came back than was sent");
            Ok(())
        };
        let compared = compare();
        // A sender that nobody reads any more ends with its reader.
        drop(stdout);
        let sent = sending
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        compared.and(sent)
    });
    if compared.is_err() {
        client.kill()?;
    }
    let output = client.wait_with_output()?;
    compared.with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    ensure!(output.status.success(), "{output:?}");
    Ok(begun.elapsed())
}
