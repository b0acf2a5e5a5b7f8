//! From a monitor's exec to the agent's first message, and what the monitor
//! holds then.

use anyhow::{Result, bail};

use crate::Files;
use crate::figures::{Figure, tell};
use crate::host::{Ready, copy_sparse, ext4_disk, tempdir};
use crate::in_turn;
use crate::proc::{helper_memory, own_memory};
use crate::vm::{Monitor, Running, Vm};

const MIB: f64 = (1 << 20) as f64;
const MONITORS: [Monitor; 2] = [Monitor::Drupe, Monitor::Qemu { vhost_net: false }];

pub async fn round(files: &Files, number: usize) -> Result<()> {
    let dir = tempdir()?;
    let ready = Ready::listen()?;
    let disk = ext4_disk(dir.path())?;
    // The first one of each reads everything from the node's disk.
    for counts in [false, true] {
        for monitor in in_turn(MONITORS, number) {
            // Each writes to its disk: it gets a fresh one.
            let own = dir.path().join("own");
            copy_sparse(&disk, &own)?;
            let vm = Vm::plain(files, &own);
            let mut running = Running::start(monitor, &vm, &ready).await?;
            let took = running.agent(&ready).await?;
            if counts {
                tell(Figure::Boot, monitor, took.as_secs_f64() * 1e3)?;
                tell_memory(monitor, &running.pids(), vm.memory_bytes())?;
            }
            running.end().await?;
        }
    }
    Ok(())
}

/// With the one guest alone, which shares the monitor's text with nobody.
fn tell_memory(monitor: Monitor, pids: &[u32], guest: u64) -> Result<()> {
    let [process, helpers @ ..] = pids else {
        bail!("a guest without a monitor");
    };
    let mut held = 0;
    for pid in helpers {
        held += helper_memory(*pid, guest)?;
    }
    let own = own_memory(*process, guest)?;
    tell(Figure::Memory, monitor, own as f64 / MIB)?;
    tell(Figure::HelpersMemory, monitor, held as f64 / MIB)
}
