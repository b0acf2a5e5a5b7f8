//! `drupe overhead`: what pods of a handler cost this node beyond their
//! containers, and what to declare for it.
//!
//! Pods without containers are started, left alone and removed again; or the
//! pods that run are taken as they are.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use cri_api::v1::{
    LinuxContainerResources, LinuxPodSandboxConfig, PodSandbox, PodSandboxConfig,
    PodSandboxMetadata, RemovePodSandboxRequest, RunPodSandboxRequest,
};
use cri_server::config::Config;
use cri_server::overhead::{TOOL_LABEL, TOOLS_NAMESPACE};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::Request;

use super::table::table;
use super::{CliError, Daemon, runtime, short};

/// Of the pods that are started here: the process that removes them.
const OWNER: &str = "drupe.internal/owner";
const TOOL: &str = "overhead";
/// After its start a guest has things to put away.
const SETTLES_WITHIN: Duration = Duration::from_secs(2);
/// Boots have 30 s unless configured, CNI plugins too.
const START_WITHIN: Duration = Duration::from_secs(120);
/// Below this the kernel counts more than the pod does.
const LEAST_MILLICPU: u64 = 1;
const MIB: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs: an object with every sample.
    Json,
}

#[derive(clap::Args)]
pub struct Options {
    /// The runtime handler; the configuration's default unless said otherwise.
    #[arg(long)]
    handler: Option<String>,
    /// How many pods to start of each size.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u32).range(1..=64))]
    pods: u32,
    /// How long to leave them alone.
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Memory limits of pods to measure, in MiB: what a guest costs grows with
    /// its size. The figure to publish is that of the largest. Without any,
    /// pods without limits are measured.
    #[arg(long, value_delimiter = ',', value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    memory: Vec<u32>,
    /// Measure the pods that run instead of starting some.
    #[arg(long, conflicts_with_all = ["pods", "memory"])]
    running: bool,
    /// Of the samples, the percentile to publish.
    #[arg(long, default_value = "95", value_parser = clap::value_parser!(u32).range(1..=100))]
    percentile: u32,
    /// What to add to it, in percent.
    #[arg(long, default_value = "25", value_parser = clap::value_parser!(u32).range(0..=400))]
    margin: u32,
}

impl Options {
    pub fn handler(&self) -> Option<&str> {
        self.handler.as_deref()
    }
}

/// One pod's.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Sample {
    charged_bytes: u64,
    proportional_bytes: Option<u64>,
    /// Until the pod served; none for one that had run before.
    start_cpu_nanos: Option<u64>,
    /// Of a second.
    idle_cpu_nanos: u64,
    guest_mib: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    /// The pods' memory limit; none: they had none, or were running.
    limit_mib: Option<u32>,
    samples: Vec<Sample>,
}

/// For a RuntimeClass's `overhead.podFixed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Declared {
    pub memory_mib: u64,
    pub cpu_milli: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'a> {
    handler: &'a str,
    seconds: u32,
    percentile: u32,
    margin_percent: u32,
    groups: &'a [Group],
    publish: Declared,
}

pub fn run(config: &Config, options: &Options, format: Format) -> Result<(), CliError> {
    let handler = options.handler.as_ref().unwrap_or(&config.default_runtime);
    check(config, handler)?;
    let groups = runtime()?.block_on(measure(&config.socket, handler, options))?;
    let publish = declared(&groups, options);
    let text = match format {
        Format::Table => shown(handler, &groups, publish, options),
        Format::Json => {
            let report = Report {
                handler,
                seconds: options.seconds,
                percentile: options.percentile,
                margin_percent: options.margin,
                groups: &groups,
                publish,
            };
            format!("{:#}\n", serde_json::json!(report))
        }
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(CliError::Output)
}

/// What to publish for `handler`, measured now.
pub fn to_declare(config: &Config, handler: &str, options: &Options) -> Result<Declared, CliError> {
    let groups = runtime()?.block_on(measure(&config.socket, handler, options))?;
    Ok(declared(&groups, options))
}

fn check(config: &Config, handler: &str) -> Result<(), CliError> {
    match config.runtimes.get(handler) {
        Some(runtime) if runtime.oci.is_none() => Ok(()),
        Some(_) => Err(CliError::NoOverhead {
            handler: handler.to_owned(),
        }),
        None => Err(CliError::no_handler(handler, config)),
    }
}

/// Whoever asks this program to end wants its pods removed first.
struct Interrupt(Signal);

impl Interrupt {
    fn new() -> io::Result<Self> {
        signal(SignalKind::interrupt()).map(Self)
    }

    async fn unless_in(&mut self, pause: Duration) -> Result<(), CliError> {
        match tokio::time::timeout(pause, self.0.recv()).await {
            Ok(_) => Err(CliError::Interrupted),
            Err(_) => Ok(()),
        }
    }
}

async fn measure(socket: &Path, handler: &str, options: &Options) -> Result<Vec<Group>, CliError> {
    let mut daemon = Daemon::connect(socket).await?;
    let mut stop = Interrupt::new().map_err(CliError::Start)?;
    if options.running {
        return running(&mut daemon, &mut stop, handler, options).await;
    }
    remove_forgotten(&mut daemon).await?;
    let limits: Vec<Option<u32>> = match options.memory.as_slice() {
        [] => vec![None],
        limits => limits.iter().map(|limit| Some(*limit)).collect(),
    };
    let mut groups = Vec::new();
    for limit_mib in limits {
        let samples = of_new_pods(&mut daemon, &mut stop, handler, limit_mib, options).await;
        let removed = remove_own(&mut daemon).await;
        groups.push(Group {
            limit_mib,
            samples: samples?,
        });
        removed?;
    }
    Ok(groups)
}

async fn of_new_pods(
    daemon: &mut Daemon,
    stop: &mut Interrupt,
    handler: &str,
    limit_mib: Option<u32>,
    options: &Options,
) -> Result<Vec<Sample>, CliError> {
    let mut started = Vec::new();
    for number in 0..options.pods {
        let listed = start(daemon, handler, limit_mib, number).await?;
        let (overhead, _) = overhead(daemon, &listed).await?;
        started.push((listed, Some(overhead.overhead.cpu_nanos)));
        // Between starts only: a pod that is being started is on no list yet.
        stop.unless_in(Duration::ZERO).await?;
    }
    stop.unless_in(SETTLES_WITHIN).await?;
    idle(daemon, stop, started, options).await
}

async fn running(
    daemon: &mut Daemon,
    stop: &mut Interrupt,
    handler: &str,
    options: &Options,
) -> Result<Vec<Group>, CliError> {
    let mut pods = Vec::new();
    for listed in daemon.list().await? {
        if let Some(pod) = daemon.show(listed).await?
            && pod.details.handler == handler
            && pod.details.overhead.is_some()
        {
            pods.push((pod.listed, None));
        }
    }
    if pods.is_empty() {
        return Err(CliError::NothingRuns {
            handler: handler.to_owned(),
        });
    }
    let samples = idle(daemon, stop, pods, options).await?;
    Ok(vec![Group {
        limit_mib: None,
        samples,
    }])
}

/// Looks at each pod twice.
async fn idle(
    daemon: &mut Daemon,
    stop: &mut Interrupt,
    pods: Vec<(PodSandbox, Option<u64>)>,
    options: &Options,
) -> Result<Vec<Sample>, CliError> {
    let mut before = Vec::new();
    for (pod, start_cpu) in pods {
        let (first, _) = overhead(daemon, &pod).await?;
        before.push((pod, start_cpu, first.overhead.cpu_nanos, Instant::now()));
    }
    let alone = Duration::from_secs(options.seconds.into());
    stop.unless_in(alone).await?;
    let mut samples = Vec::new();
    for (pod, start_cpu_nanos, cpu, since) in before {
        let (last, guest_mib) = overhead(daemon, &pod).await?;
        let nanos = last.overhead.cpu_nanos.saturating_sub(cpu);
        samples.push(Sample {
            charged_bytes: last.overhead.memory_bytes,
            proportional_bytes: last.proportional_bytes,
            start_cpu_nanos,
            idle_cpu_nanos: (nanos as f64 / since.elapsed().as_secs_f64()) as u64,
            guest_mib,
        });
    }
    Ok(samples)
}

async fn overhead(
    daemon: &mut Daemon,
    listed: &PodSandbox,
) -> Result<(super::Measured, u32), CliError> {
    let ended = || CliError::Ended {
        pod: short(&listed.id).to_owned(),
    };
    let pod = daemon.show(listed.clone()).await?.ok_or_else(ended)?;
    let measured = pod.details.overhead.ok_or_else(ended)?;
    Ok((measured, pod.details.memory_mib))
}

async fn start(
    daemon: &mut Daemon,
    handler: &str,
    limit_mib: Option<u32>,
    number: u32,
) -> Result<PodSandbox, CliError> {
    let owner = std::process::id().to_string();
    let metadata = PodSandboxMetadata {
        name: format!("overhead-{number}"),
        namespace: TOOLS_NAMESPACE.to_owned(),
        uid: format!("overhead-{owner}-{number}"),
        attempt: 0,
    };
    let resources = limit_mib.map(|mib| LinuxContainerResources {
        memory_limit_in_bytes: i64::from(mib) << 20,
        ..Default::default()
    });
    let config = PodSandboxConfig {
        metadata: Some(metadata.clone()),
        hostname: metadata.name.clone(),
        labels: HashMap::from([
            (OWNER.to_owned(), owner),
            (TOOL_LABEL.to_owned(), TOOL.to_owned()),
        ]),
        linux: Some(LinuxPodSandboxConfig {
            resources,
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut request = Request::new(RunPodSandboxRequest {
        config: Some(config),
        runtime_handler: handler.to_owned(),
    });
    request.set_timeout(START_WITHIN);
    let answer = daemon.client.run_pod_sandbox(request).await;
    let id = answer.map_err(|status| CliError::Call {
        call: "RunPodSandbox",
        status,
    })?;
    Ok(PodSandbox {
        id: id.into_inner().pod_sandbox_id,
        metadata: Some(metadata),
        ..Default::default()
    })
}

/// Of runs that were killed.
async fn remove_forgotten(daemon: &mut Daemon) -> Result<(), CliError> {
    let is_gone = |owner: &str| !Path::new("/proc").join(owner).exists();
    remove_of(daemon, is_gone).await
}

async fn remove_own(daemon: &mut Daemon) -> Result<(), CliError> {
    let own = std::process::id().to_string();
    remove_of(daemon, |owner| owner == own).await
}

async fn remove_of(daemon: &mut Daemon, is_meant: impl Fn(&str) -> bool) -> Result<(), CliError> {
    let own = HashMap::from([(TOOL_LABEL.to_owned(), TOOL.to_owned())]);
    let pods = daemon.list_labelled(own).await?;
    let labelled = |pod: &PodSandbox| pod.labels.get(OWNER).is_some_and(|owner| is_meant(owner));
    for pod in pods.into_iter().filter(labelled) {
        let mut request = Request::new(RemovePodSandboxRequest {
            pod_sandbox_id: pod.id,
        });
        request.set_timeout(START_WITHIN);
        let removed = daemon.client.remove_pod_sandbox(request).await;
        removed.map_err(|status| CliError::Call {
            call: "RemovePodSandbox",
            status,
        })?;
    }
    Ok(())
}

/// Of the largest pods.
fn declared(groups: &[Group], options: &Options) -> Declared {
    let largest = groups.iter().max_by_key(|group| group.limit_mib);
    let samples = largest.map_or(&[][..], |group| &group.samples);
    let with_margin = |value: u64| value.saturating_mul(100 + u64::from(options.margin)) / 100;
    let of = |figure: fn(&Sample) -> u64| {
        let values = samples.iter().map(figure).collect();
        with_margin(percentile(values, options.percentile))
    };
    Declared {
        memory_mib: of(|sample| sample.charged_bytes).div_ceil(MIB),
        cpu_milli: of(|sample| sample.idle_cpu_nanos)
            .div_ceil(1_000_000)
            .max(LEAST_MILLICPU),
    }
}

/// The smallest value that this many percent do not exceed; 0 of none.
fn percentile(mut values: Vec<u64>, percent: u32) -> u64 {
    values.sort_unstable();
    let rank = (values.len() * percent as usize).div_ceil(100);
    let value = values.get(rank.saturating_sub(1));
    value.copied().unwrap_or(0)
}

fn shown(handler: &str, groups: &[Group], publish: Declared, options: &Options) -> String {
    let head = [
        "LIMIT MIB",
        "GUEST MIB",
        "PODS",
        "CHARGED MIB",
        "PSS MIB",
        "START CPU MS",
        "IDLE CPU %",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    for group in groups {
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        let of = |figure: &dyn Fn(&Sample) -> Option<f64>, digits| {
            spread(group.samples.iter().filter_map(figure).collect(), digits)
        };
        rows.push([
            group
                .limit_mib
                .map_or_else(|| "-".to_owned(), |limit| limit.to_string()),
            of(&|sample| Some(sample.guest_mib.into()), 0),
            group.samples.len().to_string(),
            of(&|sample| Some(mib(sample.charged_bytes)), 1),
            of(&|sample| sample.proportional_bytes.map(mib), 1),
            of(&|sample| Some(sample.start_cpu_nanos? as f64 / 1e6), 0),
            of(&|sample| Some(sample.idle_cpu_nanos as f64 / 1e7), 2),
        ]);
    }
    let Options {
        percentile, margin, ..
    } = options;
    format!(
        "What pods of handler {handler} cost beyond their containers: minimum / median / maximum\n         {}overhead.podFixed to publish: memory {}Mi, cpu {}m (percentile {percentile} of the largest, and {margin} %)\n",
        table(&rows),
        publish.memory_mib,
        publish.cpu_milli,
    )
}

fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (values.first(), values.last()) else {
        return "-".to_owned();
    };
    let median = values[values.len() / 2];
    if least == most {
        return format!("{median:.digits$}");
    }
    format!("{least:.digits$} / {median:.digits$} / {most:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(args: &[&str]) -> Options {
        Line::parse_from([&["overhead"], args].concat()).options
    }

    fn sample(mib: u64, idle_cpu_nanos: u64) -> Sample {
        Sample {
            charged_bytes: mib * MIB,
            proportional_bytes: Some(mib * MIB + MIB / 2),
            start_cpu_nanos: None,
            idle_cpu_nanos,
            guest_mib: 512,
        }
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        assert_eq!(percentile(vec![], 95), 0);
        assert_eq!(percentile(vec![3], 1), 3);
        assert_eq!(percentile((1..=100).rev().collect(), 95), 95);
        assert_eq!(percentile(vec![5, 1, 4, 2, 3], 50), 3);
        assert_eq!(percentile(vec![5, 1, 4, 2, 3], 100), 5);
    }

    #[test]
    fn what_is_published_is_of_the_largest_pods_with_a_margin() {
        let groups = [
            Group {
                limit_mib: Some(1024),
                samples: vec![sample(40, 500_000), sample(41, 3_000_000)],
            },
            Group {
                limit_mib: Some(64),
                samples: vec![sample(90, 0)],
            },
        ];
        let published = |args: &[&str]| declared(&groups, &options(args));
        let with = |memory_mib, cpu_milli| Declared {
            memory_mib,
            cpu_milli,
        };
        assert_eq!(published(&[]), with(52, 4));
        assert_eq!(
            published(&["--margin", "0", "--percentile", "50"]),
            with(40, 1)
        );
        let shown = shown("microvm", &groups, with(52, 4), &options(&[]));
        assert!(shown.contains("40.0 / 41.0 / 41.0"), "{shown}");
        assert!(shown.contains("memory 52Mi, cpu 4m"), "{shown}");
    }
}
