//! One run of critest: its command line, and its output followed as it comes.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result};

use crate::artifacts;
use crate::node::{Node, Server};

use super::Report;

/// How long ginkgo lets the whole suite take before it interrupts it.
const SUITE_WITHIN: &str = "90m";

/// The one spec that cannot pass with images of one's own: it pulls an image
/// by the digest that only the original has.
pub const FOREIGN_DIGEST: &str = "public image with digest should be pulled and removed";

/// The one spec that only containers on the node's own kernel can pass: it
/// looks on the node for what a container has mounted.
pub const ON_THE_NODE: &str = "mount with 'rshared' should support propagation from host";

/// What separates the specs in ginkgo's verbose output.
const RULE: &str = "------------------------------";

/// What the name of each spec begins with.
const SPEC: &str = "[k8s.io] ";

/// Which specs run, and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Specs that run at once.
    pub parallel: u32,
    /// Regular expressions over the specs' names.
    pub focus: Option<String>,
    pub skip: Option<String>,
    /// Streams over WebSocket instead of SPDY.
    pub websocket: bool,
    /// The runtime handler of all pods; none: the node's default.
    pub handler: Option<String>,
}

impl Options {
    /// Whether nothing is left out that could pass, with the pods that a node
    /// makes unasked.
    #[must_use]
    pub fn whole(&self) -> bool {
        self.focus.is_none() && self.skip.is_none() && self.handler.is_none()
    }

    fn arguments(&self, node: &Node) -> Vec<String> {
        let endpoint = format!("unix://{}", node.socket().display());
        let mut arguments = vec![
            format!("-runtime-endpoint={endpoint}"),
            format!("-image-endpoint={endpoint}"),
            "-ginkgo.v".into(),
            "-ginkgo.no-color".into(),
            format!("-ginkgo.timeout={SUITE_WITHIN}"),
            format!("-ginkgo.json-report={REPORT}"),
            format!("-ginkgo.skip={FOREIGN_DIGEST}"),
        ];
        match &self.handler {
            Some(handler) => arguments.push(format!("-runtime-handler={handler}")),
            None if node.server == Server::Drupe => {
                arguments.push(format!("-ginkgo.skip={ON_THE_NODE}"));
            }
            None => {}
        }
        // critest alone would take it for a mistake.
        if self.parallel > 1 {
            arguments.push(format!("-parallel={}", self.parallel));
        }
        arguments.extend(self.focus.iter().map(|f| format!("-ginkgo.focus={f}")));
        arguments.extend(self.skip.iter().map(|s| format!("-ginkgo.skip={s}")));
        if self.websocket {
            let streams = ["exec", "attach", "portforward"];
            arguments.extend(streams.map(|stream| format!("-websocket-{stream}")));
        }
        arguments
    }
}

const REPORT: &str = "report.json";

/// Runs critest against `node`; its output and its report end up in `out`.
pub fn run(node: &Node, options: &Options, out: &Path) -> Result<(ExitStatus, Report)> {
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let report = out.join(REPORT);
    if report.exists() {
        fs::remove_file(&report).with_context(|| report.display().to_string())?;
    }
    // Below the node's, whose end shows what is still mounted there.
    let scratch = node.dir.join("critest");
    fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
    let critest = artifacts::critest()?;
    let mut command = Command::new(&critest);
    command
        .args(options.arguments(node))
        .current_dir(out)
        .env("PATH", with_tools(&critest)?)
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = node
        .netns
        .run(|| command.spawn().context("start critest"))?;
    let stdout = child.stdout.take().context("critest's output")?;
    follow(BufReader::new(stdout), &out.join("critest.log"))?;
    let status = child.wait().context("wait for critest")?;
    let report =
        Report::read(&report).with_context(|| format!("critest ended with {status} unreported"))?;
    Ok((status, report))
}

/// The directory of ginkgo, which critest looks for, before all others.
fn with_tools(critest: &Path) -> Result<std::ffi::OsString> {
    let tools = critest.parent().context("critest has no directory")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::iter::once(PathBuf::from(tools)).chain(std::env::split_paths(&path));
    std::env::join_paths(dirs).context("PATH")
}

/// Writes the whole of `output` to `log`, and to standard output a line for
/// each spec that ends.
fn follow(output: impl BufRead, log: &Path) -> Result<()> {
    let mut file = File::create(log).with_context(|| log.display().to_string())?;
    // Of the spec between two rules; specs that run at once are told apart.
    let (mut name, mut ended) = (None, None);
    for line in output.split(b'\n') {
        let line = line.context("critest's output")?;
        file.write_all(&line)
            .and_then(|()| file.write_all(b"\n"))
            .with_context(|| log.display().to_string())?;
        let line = String::from_utf8_lossy(&line);
        if line == RULE {
            if let (Some(name), Some(ended)) = (name.take(), ended.take()) {
                println!("{ended}  {name}");
            }
        } else if let Some(text) = line.strip_prefix(SPEC) {
            name = Some(text.to_owned());
        } else if let Some(text) = outcome(&line) {
            ended = Some(text);
        }
    }
    Ok(())
}

/// How a spec ended and after how long, if this line says so.
fn outcome(line: &str) -> Option<String> {
    let rest = line
        .strip_prefix("• ")
        .or_else(|| line.strip_prefix("S "))?;
    let mut words = Vec::new();
    for part in rest.split_terminator(']') {
        words.push(part.trim_start().strip_prefix('[')?.to_lowercase());
    }
    Some(match words.as_slice() {
        [time] => format!("passed   {time:>16}"),
        [word, time] => format!("{word:<8} {time:>16}"),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_ends_with_a_line_that_says_how() {
        assert_eq!(
            outcome("• [2.345 seconds]").as_deref(),
            Some("passed      2.345 seconds")
        );
        assert_eq!(
            outcome("• [FAILED] [10.001 seconds]").as_deref(),
            Some("failed     10.001 seconds")
        );
        assert_eq!(
            outcome("S [SKIPPED] [0.001 seconds]").as_deref(),
            Some("skipped     0.001 seconds")
        );
        assert_eq!(outcome("Some words [of another kind]"), None);
    }
}
