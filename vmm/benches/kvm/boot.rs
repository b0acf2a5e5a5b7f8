//! From a monitor's exec to the agent's first message; what the monitor holds
//! then; what an idle guest costs.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::figures::{Aim, Samples, figure, heading, ratio};
use crate::host::{Ready, copy_sparse, ext4_disk, tempdir};
use crate::proc::{between, helper_memory, own_memory, threads};
use crate::vm::{Monitor, Running, Vm};
use crate::{Files, ROUNDS};

const MIB: f64 = (1 << 20) as f64;
const SETTLE: Duration = Duration::from_secs(20);
const IDLE: Duration = Duration::from_secs(60);
const QEMU: Monitor = Monitor::Qemu { vhost_net: false };

#[derive(Default)]
struct Side {
    boot_ms: Samples,
    memory_mib: Samples,
    helpers_mib: Samples,
    idle_percent: Samples,
    wakeups: Samples,
    /// Of the vCPU's thread, in which the guest wakes up.
    guest_wakeups: Samples,
}

impl Side {
    /// With the one guest alone, which shares the monitor's text with nobody.
    fn add_memory(&mut self, pids: &[u32], guest: u64) -> Result<()> {
        let [monitor, helpers @ ..] = pids else {
            bail!("a guest without a monitor");
        };
        let mut held = 0;
        for pid in helpers {
            held += helper_memory(*pid, guest)?;
        }
        self.memory_mib
            .push(own_memory(*monitor, guest)? as f64 / MIB);
        self.helpers_mib.push(held as f64 / MIB);
        Ok(())
    }
}

pub async fn measure(files: &Files) -> Result<()> {
    let dir = tempdir()?;
    let ready = Ready::listen()?;
    let mut sides = [Side::default(), Side::default()];
    let disk = ext4_disk(dir.path())?;
    for round in 0..=ROUNDS {
        for (monitor, side) in [Monitor::Drupe, QEMU].into_iter().zip(&mut sides) {
            // Each writes to its disk: it gets a fresh one.
            let own = dir.path().join("own");
            copy_sparse(&disk, &own)?;
            let vm = vm(files, &own);
            let mut running = Running::start(monitor, &vm, &ready).await?;
            let took = running.agent(&ready).await?;
            eprintln!("boot: {monitor:?}: {} ms", took.as_millis());
            // The first one reads everything from the disk.
            if round > 0 {
                side.boot_ms.push(took.as_secs_f64() * 1e3);
                side.add_memory(&running.pids(), vm.memory_bytes())?;
            }
            running.end().await?;
        }
    }
    for (monitor, side) in [Monitor::Drupe, QEMU].into_iter().zip(&mut sides) {
        idle(files, monitor, side, &ready).await?;
    }

    let [ours, theirs] = &sides;
    heading("boot, memory, idle");
    let aim = Some(Aim::AtMost(0.8));
    ratio("exec to agent, ms", &ours.boot_ms, &theirs.boot_ms, aim);
    let aim = Some(Aim::AtMost(5.0));
    figure(
        "monitor's memory, MiB",
        &ours.memory_mib,
        &theirs.memory_mib,
        aim,
    );
    figure(
        "its helpers', MiB",
        &ours.helpers_mib,
        &theirs.helpers_mib,
        None,
    );
    let aim = Some(Aim::AtMost(0.2));
    figure(
        "idle CPU, % of one",
        &ours.idle_percent,
        &theirs.idle_percent,
        aim,
    );
    figure(
        "wake-ups a minute, vCPU",
        &ours.guest_wakeups,
        &theirs.guest_wakeups,
        None,
    );
    figure(
        "wake-ups a minute, others",
        &ours.wakeups,
        &theirs.wakeups,
        None,
    );
    Ok(())
}

fn vm<'a>(files: &'a Files, disk: &'a std::path::Path) -> Vm<'a> {
    Vm {
        files,
        initramfs: &files.initramfs,
        memory_mib: 128,
        disk,
        tap: None,
    }
}

/// All guests of one side idle at once: what they use is counted, not timed.
async fn idle(files: &Files, monitor: Monitor, side: &mut Side, ready: &Ready) -> Result<()> {
    let dir = tempdir()?;
    let disk = ext4_disk(dir.path())?;
    let mut guests = Vec::new();
    for number in 0..ROUNDS {
        let own = dir.path().join(number.to_string());
        copy_sparse(&disk, &own)?;
        let vm = vm(files, &own);
        let mut running = Running::start(monitor, &vm, ready).await?;
        running.agent(ready).await?;
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
        let (mut cpu_ns, mut wakeups, mut guest_wakeups) = (0, 0, 0);
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
                    guest_wakeups += used.wakeups;
                } else {
                    wakeups += used.wakeups;
                }
            }
        }
        let percent = cpu_ns as f64 / IDLE.as_nanos() as f64 * 100.0;
        side.idle_percent.push(percent);
        side.wakeups.push(wakeups as f64);
        side.guest_wakeups.push(guest_wakeups as f64);
    }
    for running in guests {
        running.end().await?;
    }
    Ok(())
}
