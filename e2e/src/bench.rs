//! Timing pods through CRI, without crictl in between.

use std::fs;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::pod::IDLE;
use crate::streams::cat;
use crate::{Node, Server};

/// Pods started one after another.
const SEQUENTIAL: usize = 20;
/// Pods started at once, and how often.
const AT_ONCE: usize = 8;
const ROUNDS: usize = 3;
/// Pods that run while memory is measured.
const RESIDENT: usize = 4;
/// MiB sent through a command and back, and how often.
const STREAMED: usize = 512;
const STREAMS: usize = 5;

/// The steps of a pod's life, in order, and the one that users feel most.
pub const STEPS: [&str; 7] = [
    "run",
    "create",
    "start",
    "exec",
    "stop",
    "remove",
    "to first exec output",
];

/// Times of one pod, one for each of [`STEPS`].
pub type Sample = [Duration; STEPS.len()];

pub struct Report {
    pub sequential: Vec<Sample>,
    pub parallel: Vec<Sample>,
    pub pods_per_second: f64,
    /// Proportional set size of everything that one pod adds.
    pub pss_bytes: u64,
    /// MiB/s of a `cat` that crictl feeds, each way: the median.
    pub streaming: f64,
}

/// Time at quantile `q` of step `step`.
#[must_use]
pub fn quantile(samples: &[Sample], step: usize, q: f64) -> Duration {
    let mut times: Vec<_> = samples.iter().map(|sample| sample[step]).collect();
    times.sort();
    let last = times.len().saturating_sub(1);
    times
        .get((last as f64 * q).round() as usize)
        .copied()
        .unwrap_or_default()
}

pub fn measure(server: Server, progress: impl Fn(&str)) -> Result<Report> {
    let node = Node::builder().server(server).start()?;
    node.pull_busybox()?;
    progress("warming up");
    life(&node, "warm-up", &Barrier::new(1))?;

    progress(&format!("{SEQUENTIAL} pods one after another"));
    let sequential = (0..SEQUENTIAL)
        .map(|n| Ok(life(&node, &format!("sequential-{n}"), &Barrier::new(1))?.0))
        .collect::<Result<Vec<_>>>()?;

    let mut parallel = Vec::new();
    let mut until_all_up = Duration::ZERO;
    for round in 0..ROUNDS {
        progress(&format!(
            "{AT_ONCE} pods at a time, round {} of {ROUNDS}",
            round + 1
        ));
        let all_up = Barrier::new(AT_ONCE);
        let lives = thread::scope(|scope| {
            let (node, all_up) = (&node, &all_up);
            let threads: Vec<_> = (0..AT_ONCE)
                .map(|n| scope.spawn(move || life(node, &format!("parallel-{round}-{n}"), all_up)))
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        until_all_up += lives.iter().map(|(_, up)| *up).max().unwrap_or_default();
        parallel.extend(lives.into_iter().map(|(sample, _)| sample));
    }

    progress(&format!("{STREAMS} times {STREAMED} MiB through exec"));
    let streaming = streaming(&node)?;

    progress(&format!("memory of {RESIDENT} pods"));
    for n in 0..RESIDENT {
        let pod = node.run_pod(&format!("resident-{n}"))?;
        pod.start_idle("c")?.exec(&["true"])?;
    }
    let pss_bytes = pss(&node)? / RESIDENT as u64;
    node.finish()?;
    Ok(Report {
        sequential,
        pods_per_second: parallel.len() as f64 / until_all_up.as_secs_f64(),
        parallel,
        pss_bytes,
        streaming,
    })
}

/// One pod from its request to its removal; and when its container's first
/// output was there, after the start of this call. `all_up` holds the removal
/// back until every pod of a round runs.
fn life(node: &Node, name: &str, all_up: &Barrier) -> Result<(Sample, Duration)> {
    let mut sample = Sample::default();
    let config = node.pod_config(name);
    fs::create_dir_all(&config.log_directory)?;
    let begun = Instant::now();
    let mut at = begun;
    let mut lap = |step: usize| {
        let now = Instant::now();
        sample[step] = now - at;
        at = now;
    };
    let started = (|| -> Result<_> {
        let pod = node.try_run_pod(config)?;
        lap(0);
        let container = pod.create(pod.container_config("c", IDLE))?;
        lap(1);
        container.start()?;
        lap(2);
        let answer = container.exec_sync(&["echo", "hello"], 60)?;
        ensure!(
            answer.stdout == b"hello\n",
            "exec printed {:?}",
            String::from_utf8_lossy(&answer.stdout)
        );
        lap(3);
        Ok(pod)
    })();
    let up = begun.elapsed();
    // Reached by a pod that failed too: the others wait for it.
    all_up.wait();
    let pod = started.with_context(|| name.to_owned())?;
    at = Instant::now();
    let mut lap = |step: usize| {
        let now = Instant::now();
        sample[step] = now - at;
        at = now;
    };
    pod.stop()?;
    lap(4);
    pod.remove()?;
    lap(5);
    sample[6] = up;
    Ok((sample, up))
}

fn streaming(node: &Node) -> Result<f64> {
    let pod = node.run_pod("streams")?;
    let container = pod.start_idle("c")?;
    let mut times = (0..STREAMS)
        .map(|_| cat(node, "spdy", &container, STREAMED))
        .collect::<Result<Vec<_>>>()?;
    times.sort();
    pod.stop()?;
    pod.remove()?;
    Ok(STREAMED as f64 / times[STREAMS / 2].as_secs_f64())
}

/// Proportional set sizes of everything that pods run in, the server left out.
pub fn pss(node: &Node) -> Result<u64> {
    let mut kib = 0;
    for (pid, line) in node.pod_processes()? {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
            .with_context(|| line.clone())?;
        let field = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .context("Pss")?;
        kib += field
            .trim()
            .trim_end_matches(" kB")
            .parse::<u64>()
            .context("Pss")?;
    }
    ensure!(kib > 0, "no process was found");
    Ok(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_step_asked_for() {
        let sample = |ms| {
            let mut sample = Sample::default();
            sample[1] = Duration::from_millis(ms);
            sample
        };
        let samples: Vec<_> = (1..=21).rev().map(sample).collect();
        assert_eq!(quantile(&samples, 1, 0.5), Duration::from_millis(11));
        assert_eq!(quantile(&samples, 1, 0.95), Duration::from_millis(20));
        assert_eq!(quantile(&samples, 0, 0.95), Duration::ZERO);
    }
}
