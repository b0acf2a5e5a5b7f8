//! Samples, as a round tells them and as the table sums them up.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, BufRead};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::ROUNDS;
use crate::vm::Monitor;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Figure {
    /// From exec to the agent's first message, in ms.
    Boot,
    /// Of the monitor, in MiB.
    Memory,
    /// Of its helpers, in MiB.
    HelpersMemory,
    /// Percent of one CPU.
    Idle,
    /// A minute, of the vCPU's thread, in which the guest wakes up.
    VcpuWakeups,
    /// A minute, of all other threads.
    OtherWakeups,
    /// MiB/s.
    SequentialReads,
    /// Reads/s.
    RandomReads,
    /// Mbit/s, as the next two.
    ToHost,
    FromHost,
    PodToPod,
}

/// One line of JSON on standard output.
#[derive(Debug, Serialize, Deserialize)]
struct Sample {
    figure: Figure,
    monitor: Monitor,
    value: f64,
}

/// Tells one sample.
pub fn tell(figure: Figure, monitor: Monitor, value: f64) -> Result<()> {
    let sample = Sample {
        figure,
        monitor,
        value,
    };
    println!("{}", serde_json::to_string(&sample)?);
    Ok(())
}

/// All samples of one figure of one monitor.
#[derive(Clone, Debug, Default)]
struct Samples(Vec<f64>);

impl Samples {
    fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.0.first(), self.0.last());
        let end = |value: Option<&f64>| value.copied().unwrap_or(f64::NAN);
        let spread = format!("({:.1}..{:.1})", end(first), end(last));
        write!(f, "{:>9.1} {spread:<20}", self.median())
    }
}

/// What a figure shall be.
#[derive(Clone, Copy, Debug)]
enum Aim {
    None,
    /// Our median.
    AtMost(f64),
    /// Ours to theirs.
    RatioAtMost(f64),
    RatioAtLeast(f64),
}

impl Aim {
    fn verdict(self, ours: f64, ratio: f64) -> String {
        let (met, text) = match self {
            Self::None => return String::new(),
            Self::AtMost(aim) => (ours <= aim, format!("aim <= {aim}")),
            Self::RatioAtMost(aim) => (ratio <= aim, format!("aim: ratio <= {aim}")),
            Self::RatioAtLeast(aim) => (ratio >= aim, format!("aim: ratio >= {aim}")),
        };
        format!("{text}: {}", if met { "met" } else { "MISSED" })
    }
}

const QEMU: Monitor = Monitor::Qemu { vhost_net: false };
const VHOST: Monitor = Monitor::Qemu { vhost_net: true };

type Row = (&'static str, Figure, Monitor, Aim);

const TABLE: [(&str, &[Row]); 3] = [
    (
        "boot, memory, idle",
        &[
            (
                "exec to agent, ms",
                Figure::Boot,
                QEMU,
                Aim::RatioAtMost(0.8),
            ),
            (
                "monitor's memory, MiB",
                Figure::Memory,
                QEMU,
                Aim::AtMost(5.0),
            ),
            ("its helpers', MiB", Figure::HelpersMemory, QEMU, Aim::None),
            ("idle CPU, % of one", Figure::Idle, QEMU, Aim::AtMost(0.2)),
            (
                "wake-ups a minute, vCPU",
                Figure::VcpuWakeups,
                QEMU,
                Aim::None,
            ),
            (
                "wake-ups a minute, others",
                Figure::OtherWakeups,
                QEMU,
                Aim::None,
            ),
        ],
    ),
    (
        "disk, in the host's memory",
        &[
            (
                "1 MiB sequential, MiB/s",
                Figure::SequentialReads,
                QEMU,
                Aim::RatioAtLeast(1.0),
            ),
            (
                "4 KiB random, reads/s",
                Figure::RandomReads,
                QEMU,
                Aim::RatioAtLeast(1.0),
            ),
        ],
    ),
    (
        "network, Mbit/s",
        &[
            ("to host", Figure::ToHost, QEMU, Aim::RatioAtLeast(1.0)),
            ("from host", Figure::FromHost, QEMU, Aim::RatioAtLeast(1.0)),
            ("pod to pod", Figure::PodToPod, QEMU, Aim::RatioAtLeast(1.0)),
            // For comparison: their data path is in the host's kernel.
            ("to host, vhost-net", Figure::ToHost, VHOST, Aim::None),
            ("from host, vhost-net", Figure::FromHost, VHOST, Aim::None),
            ("pod to pod, vhost-net", Figure::PodToPod, VHOST, Aim::None),
        ],
    ),
];

/// Sums up the samples on standard input; what was not measured is left out.
pub fn table() -> Result<()> {
    let mut all: HashMap<(Figure, Monitor), Samples> = HashMap::new();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let sample: Sample = serde_json::from_str(&line).with_context(|| line.clone())?;
        let samples = &mut all.entry((sample.figure, sample.monitor)).or_default().0;
        samples.push(sample.value);
        samples.sort_by(f64::total_cmp);
    }
    for ((figure, monitor), samples) in &all {
        let count = samples.0.len();
        ensure!(
            count == ROUNDS,
            "{figure:?} of {monitor:?}: {count} samples"
        );
    }
    for (title, rows) in TABLE {
        let mut heading = Some(format!(
            "\n{title:<28}{:<31}{:<31}",
            "drupe", "QEMU microvm"
        ));
        for &(label, figure, monitor, aim) in rows {
            let of = |monitor| all.get(&(figure, monitor));
            let (Some(ours), Some(theirs)) = (of(Monitor::Drupe), of(monitor)) else {
                continue;
            };
            if let Some(heading) = heading.take() {
                println!("{heading}");
            }
            let ratio = ours.median() / theirs.median();
            let verdict = aim.verdict(ours.median(), ratio);
            println!("{label:<28}{ours} {theirs} ratio {ratio:.2}  {verdict}");
        }
    }
    Ok(())
}
