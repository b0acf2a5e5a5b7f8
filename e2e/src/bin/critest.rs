//! `make critest`: the conformance tests of CRI against a daemon with a real
//! registry and real CNI plugins. What it runs comes from the environment:
//! `PARALLEL` specs at once, those that match `FOCUS` and not `SKIP`.
//! Ends as critest does, or with 1 if something is left on the machine. With the
//! word `record`, the result of a whole run goes into the documentation.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use cri_api::v1::VersionRequest;
use e2e::critest::run::{FOREIGN_DIGEST, ON_THE_NODE};
use e2e::critest::{Options, Report, images, run};
use e2e::{Machine, Node, Server, artifacts, registry};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

/// The argument that has a whole run's result written down.
const RECORD: &str = "record";

/// The specs that a whole run repeats over WebSocket.
const STREAMING: &str = "Streaming";

/// The handler whose pods share the node's kernel, with which a whole run is
/// repeated.
const HOST_HANDLER: &str = "host";

/// What a host may lack; specs that need it skip themselves and say so.
const LACKING: [&str; 3] = ["AppArmor", "SELinux", "NRI"];

/// What pods on the node's kernel lack.
const USER_NAMESPACES: &str = "user namespaces";

/// The line of `docs/conformance.md` that a whole run writes begins so.
const LAST_RUN: &str = "Last whole run: ";

fn main() -> Result<ExitCode> {
    // critest leaves shared memory behind, which goes with the namespace. The
    // daemon shares it: pods of the node's IPC namespace are looked into.
    unshare(CloneFlags::CLONE_NEWIPC).context("a new IPC namespace")?;
    let options = options()?;
    let recording = match std::env::args().nth(1).as_deref() {
        None => false,
        Some(RECORD) => true,
        Some(other) => bail!("{other:?} is not {RECORD:?}"),
    };
    let out = artifacts::out_dir()?.join("critest");
    let node = start()?;
    let version = node.cri()?.version(VersionRequest::default())?;
    let of_drupe = node.server == Server::Drupe;

    let (status, report) = run(&node, &options, &out)?;
    let mut ends = vec![status];
    let mut summary = format!("{report}");
    show(&report);
    let mut unexpected = Vec::new();
    if options.whole() && of_drupe {
        let not_run = report.unexpected(&LACKING, &[FOREIGN_DIGEST, ON_THE_NODE]);
        unexpected.extend(not_run.into_iter().map(str::to_owned));
    }
    let mut again = |title: &str, options: Options, dir: &str| -> Result<Report> {
        let (status, report) = run(&node, &options, &out.join(dir))?;
        ends.push(status);
        show(&report);
        summary = format!("{summary}; {title}: {report}");
        Ok(report)
    };
    if options.whole() {
        let streams = Options {
            focus: Some(STREAMING.into()),
            websocket: true,
            ..options.clone()
        };
        again("over WebSocket", streams, "websocket")?;
        if of_drupe {
            let on_the_node = Options {
                handler: Some(HOST_HANDLER.into()),
                ..options.clone()
            };
            let report = again("with pods on the node's kernel", on_the_node, "host")?;
            let lacking = [&LACKING[..], &[USER_NAMESPACES]].concat();
            let not_run = report.unexpected(&lacking, &[FOREIGN_DIGEST]);
            unexpected.extend(not_run.into_iter().map(str::to_owned));
        }
    }

    let left = node.finish().context("something is left on the machine");
    if options.whole() {
        let line = format!(
            "{LAST_RUN}{}, critest {}, {} {} on {}, {} at once: {summary}.",
            output(Command::new("date").args(["-u", "+%Y-%m-%d"]))?,
            critest_version()?,
            version.runtime_name,
            version.runtime_version,
            Machine::under_test()?.name(),
            options.parallel,
        );
        println!("{line}");
        if recording && of_drupe {
            record(&line)?;
        }
    }
    println!("the whole output is in {}", out.display());
    for name in &unexpected {
        eprintln!("did not run, though nothing that this host lacks is in its way: {name}");
    }
    match ends.iter().find(|status| !status.success()) {
        Some(status) => {
            if let Err(error) = left {
                eprintln!("{error:#}");
            }
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            Ok(ExitCode::from(code.unwrap_or(1).max(1)))
        }
        None => {
            left?;
            ensure!(
                unexpected.is_empty(),
                "{} specs did not run",
                unexpected.len()
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn options() -> Result<Options> {
    let of = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let parallel = of("PARALLEL").map_or(Ok(1), |text| text.parse());
    Ok(Options {
        parallel: parallel.context("PARALLEL is no number")?,
        focus: of("FOCUS"),
        skip: of("SKIP"),
        websocket: false,
        handler: of("HANDLER"),
    })
}

/// A node that finds every image of every registry in its own.
fn start() -> Result<Node> {
    let mirror = format!("http://{}", registry::ADDRESS);
    let mirrors = json!({ "mirrors": [mirror] });
    let node = Node::builder()
        .config(move |config| config["images"]["registries"]["*"] = mirrors)
        .prepare()?;
    if node.server == Server::Containerd {
        node.mirror_all_registries(&mirror)?;
    }
    images::push(node.registry()?)?;
    node.start_server()?;
    Ok(node)
}

fn show(report: &Report) {
    for (reason, names) in report.skipped() {
        println!("\nskipped: {reason}");
        names.iter().for_each(|name| println!("  {name}"));
    }
    for (spec, why) in report.failed() {
        println!("\nfailed after {:.0} s: {}", spec.seconds, spec.name);
        why.lines().for_each(|line| println!("    {line}"));
    }
    println!("\n{report}");
}

fn critest_version() -> Result<String> {
    let said = output(Command::new(artifacts::critest()?).arg("-version"))?;
    let version = said
        .lines()
        .find_map(|line| line.strip_prefix("critest version: "));
    Ok(version.context("critest says no version")?.to_owned())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Puts `line` in the place of the last run's.
fn record(line: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/conformance.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let place = text.lines().find(|line| line.starts_with(LAST_RUN));
    let place = place.with_context(|| format!("{}: no {LAST_RUN:?}", path.display()))?;
    fs::write(&path, text.replacen(place, line, 1)).with_context(|| path.display().to_string())
}
