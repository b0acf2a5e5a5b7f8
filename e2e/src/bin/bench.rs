//! `make bench`: how long pods take and what they cost, beside a peer if one
//! is named.
#![forbid(unsafe_code)]

use std::time::Instant;

use anyhow::{Result, bail};
use e2e::Server;
use e2e::bench::{Report, STEPS, Sample, measure, quantile};

fn main() -> Result<()> {
    let peer = match std::env::args().nth(1).as_deref() {
        None => None,
        Some("containerd") => Some(("containerd", Server::Containerd)),
        Some(other) => bail!("no peer {other:?}: the one there is is containerd"),
    };
    let ours = report("drupe", Server::Drupe)?;
    let theirs = peer
        .map(|(name, server)| Ok::<_, anyhow::Error>((name, report(name, server)?)))
        .transpose()?;
    let theirs_report = theirs.as_ref().map(|(_, report)| report);
    let name = theirs.as_ref().map(|(name, _)| *name);

    for part in [Part::Sequential, Part::Parallel] {
        println!();
        heading(part.title(), name);
        for (step, label) in STEPS.iter().enumerate() {
            let figures = |report: &Report| {
                let at = |q| quantile(part.of(report), step, q).as_secs_f64() * 1e3;
                (at(0.5), Some(at(0.95)))
            };
            row(label, figures(&ours), theirs_report.map(figures));
        }
    }
    println!();
    row(
        "pods/s, 8 at a time",
        (ours.pods_per_second, None),
        theirs_report.map(|r| (r.pods_per_second, None)),
    );
    row(
        "exec cat, MiB/s",
        (ours.streaming, None),
        theirs_report.map(|r| (r.streaming, None)),
    );
    let pss = |report: &Report| (report.pss_bytes as f64 / f64::from(1 << 20), None);
    row("PSS a pod, MiB", pss(&ours), theirs_report.map(pss));
    Ok(())
}

#[derive(Clone, Copy)]
enum Part {
    Sequential,
    Parallel,
}

impl Part {
    fn title(self) -> &'static str {
        match self {
            Self::Sequential => "one after another, ms",
            Self::Parallel => "8 at a time, ms",
        }
    }

    fn of(self, report: &Report) -> &[Sample] {
        match self {
            Self::Sequential => &report.sequential,
            Self::Parallel => &report.parallel,
        }
    }
}

fn heading(title: &str, peer: Option<&str>) {
    print!("{title:<24}{:>10}{:>10}", "p50", "p95");
    if let Some(peer) = peer {
        print!(
            "{:>18}{:>10}{:>12}",
            format!("{peer} p50"),
            "p95",
            "ratio p50"
        );
    }
    println!();
}

/// A line of the table: a figure, perhaps its p95, the peer's, the ratio.
fn row(label: &str, ours: (f64, Option<f64>), theirs: Option<(f64, Option<f64>)>) {
    let p95 = |value: Option<f64>| value.map(|value| format!("{value:.1}")).unwrap_or_default();
    print!("{label:<24}{:>10.1}{:>10}", ours.0, p95(ours.1));
    if let Some(theirs) = theirs {
        print!(
            "{:>18.1}{:>10}{:>12.2}",
            theirs.0,
            p95(theirs.1),
            ours.0 / theirs.0
        );
    }
    println!();
}

fn report(name: &str, server: Server) -> Result<Report> {
    let begun = Instant::now();
    let report = measure(server, |step| eprintln!("bench: {name}: {step}"))?;
    eprintln!("bench: {name}: done in {} s", begun.elapsed().as_secs());
    Ok(report)
}
