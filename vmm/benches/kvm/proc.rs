//! What processes use, from `/proc`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Private memory and the share of what is shared, in bytes, of process `pid`
/// without the one mapping that is the guest's memory of `guest` bytes.
pub fn own_memory(pid: u32, guest: u64) -> Result<u64> {
    let (all, guests) = memory(pid, guest)?;
    ensure!(guests == 1, "process {pid} maps {guests} guest memories");
    Ok(all)
}

/// [`own_memory`] of a process that may map the guest's memory or not.
pub fn helper_memory(pid: u32, guest: u64) -> Result<u64> {
    Ok(memory(pid, guest)?.0)
}

fn memory(pid: u32, guest: u64) -> Result<(u64, usize)> {
    let (mut kib, mut guests, mut counts) = (0, 0, true);
    for line in read(Path::new(&format!("/proc/{pid}/smaps")))?.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if first == "Pss:" && counts {
            let value = line
                .split_whitespace()
                .nth(1)
                .context("Pss without value")?;
            kib += value.parse::<u64>()?;
        } else if !first.ends_with(':') {
            let (start, end) = first.split_once('-').context("a mapping's range")?;
            let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16));
            counts = end? - start? != guest;
            guests += usize::from(!counts);
        }
    }
    Ok((kib << 10, guests))
}

/// What a thread has used so far.
#[derive(Clone, Debug, Default)]
pub struct Use {
    pub name: String,
    pub cpu_ns: u64,
    pub wakeups: u64,
}

/// The use of each thread of process `pid`.
pub fn threads(pid: u32) -> Result<BTreeMap<u32, Use>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().parse()?;
        // A thread that ends meanwhile is none that idles.
        if let Ok(thread) = thread(&entry.path()) {
            all.insert(number, thread);
        }
    }
    Ok(all)
}

fn thread(dir: &Path) -> Result<Use> {
    let schedstat = read(&dir.join("schedstat"))?;
    let cpu_ns = schedstat.split_whitespace().next().context("schedstat")?;
    let status = read(&dir.join("status"))?;
    let Some(wakeups) = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
    else {
        bail!("{} counts no wake-ups", dir.display());
    };
    Ok(Use {
        name: read(&dir.join("comm"))?.trim().to_owned(),
        cpu_ns: cpu_ns.parse()?,
        wakeups: wakeups.trim().parse()?,
    })
}

/// What each thread used from `before` to `after`.
pub fn between(before: &BTreeMap<u32, Use>, after: BTreeMap<u32, Use>) -> Vec<Use> {
    let since = |(number, mut now): (u32, Use)| {
        if let Some(then) = before.get(&number) {
            now.cpu_ns = now.cpu_ns.saturating_sub(then.cpu_ns);
            now.wakeups = now.wakeups.saturating_sub(then.wakeups);
        }
        now
    };
    after.into_iter().map(since).collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}
