//! What an idle guest costs. All guests of one monitor idle at once: what they
//! use is counted, not timed.

use std::time::Duration;

use anyhow::Result;

use crate::figures::{Figure, tell};
use crate::host::{Ready, copy_sparse, ext4_disk, tempdir};
use crate::proc::{between, threads};
use crate::vm::{Monitor, Running, Vm};
use crate::{Files, ROUNDS};

const SETTLE: Duration = Duration::from_secs(20);
const IDLE: Duration = Duration::from_secs(60);

pub async fn measure(files: &Files, monitor: Monitor) -> Result<()> {
    let dir = tempdir()?;
    let ready = Ready::listen()?;
    let disk = ext4_disk(dir.path())?;
    let mut guests = Vec::new();
    for number in 0..ROUNDS {
        let own = dir.path().join(number.to_string());
        copy_sparse(&disk, &own)?;
        let vm = Vm::plain(files, &own);
        let mut running = Running::start(monitor, &vm, &ready).await?;
        running.agent(&ready).await?;
        guests.push(running);
    }
    tokio::time::sleep(SETTLE).await;
    let before = guests
        .iter()
        .map(|running| running.pids().into_iter().map(threads).collect())
        .collect::<Result<Vec<Vec<_>>>>()?;
    tokio::time::sleep(IDLE).await;
    for (number, (running, before)) in guests.iter().zip(before).enumerate() {
        let pids = running.pids();
        let (mut cpu_ns, mut wakeups, mut vcpu_wakeups) = (0, 0, 0);
        for (pid, before) in pids.iter().zip(&before) {
            for used in between(before, threads(*pid)?) {
                if number == 0 && used.wakeups + used.cpu_ns > 0 {
                    eprintln!(
                        "idle: {monitor:?}: {}: {} wake-ups, {} us",
                        used.name,
                        used.wakeups,
                        used.cpu_ns / 1000
                    );
                }
                cpu_ns += used.cpu_ns;
                if used.name.starts_with("vcpu") || used.name.starts_with("CPU ") {
                    vcpu_wakeups += used.wakeups;
                } else {
                    wakeups += used.wakeups;
                }
            }
        }
        let percent = cpu_ns as f64 / IDLE.as_nanos() as f64 * 100.0;
        tell(Figure::Idle, monitor, percent)?;
        tell(Figure::VcpuWakeups, monitor, vcpu_wakeups as f64)?;
        tell(Figure::OtherWakeups, monitor, wakeups as f64)?;
    }
    for running in guests {
        running.end().await?;
    }
    Ok(())
}
