//! One guest on either monitor.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::drupe::Drupe;
use crate::host::Ready;
use crate::qemu::Qemu;
use crate::{Files, host};

/// Far more than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How long a look at a console waits for the next.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    Drupe,
    /// The tap is served by the host's kernel (vhost-net) or by QEMU.
    Qemu {
        vhost_net: bool,
    },
}

/// What a guest is made of.
pub struct Vm<'a> {
    pub files: &'a Files,
    pub initramfs: &'a Path,
    pub memory_mib: u32,
    /// The disk whose serial number is `scratch`.
    pub disk: &'a Path,
    pub tap: Option<Tap<'a>>,
}

#[derive(Clone, Copy)]
pub struct Tap<'a> {
    pub netns: &'a str,
    pub name: &'a str,
    pub mac: [u8; 6],
}

impl Vm<'_> {
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

enum Process {
    Drupe(Box<Drupe>),
    Qemu(Qemu),
}

/// A guest that was started. Dropping it ends it.
pub struct Running {
    process: Process,
    begun: Instant,
    dir: TempDir,
}

impl Running {
    /// Starts a guest; its time begins right before its monitor's process.
    pub async fn start(monitor: Monitor, vm: &Vm<'_>, ready: &Ready) -> Result<Self> {
        let dir = host::tempdir()?;
        let (begun, process) = match monitor {
            Monitor::Drupe => {
                let prepared = Drupe::prepare(vm, dir.path())?;
                let begun = Instant::now();
                (
                    begun,
                    Process::Drupe(Box::new(Drupe::start(prepared, dir.path()).await?)),
                )
            }
            Monitor::Qemu { vhost_net } => {
                let prepared = Qemu::prepare(vm, vhost_net, ready.next_cid(), dir.path())?;
                let begun = Instant::now();
                (begun, Process::Qemu(Qemu::start(prepared)?))
            }
        };
        Ok(Self {
            process,
            begun,
            dir,
        })
    }

    /// Waits for the agent's first message; how long it took.
    pub async fn agent(&mut self, ready: &Ready) -> Result<Duration> {
        let heard = match &mut self.process {
            Process::Drupe(drupe) => drupe.agent().await,
            Process::Qemu(_) => ready.accept(),
        };
        let took = self.begun.elapsed();
        heard.with_context(|| format!("no agent; {}", self.story()))?;
        Ok(took)
    }

    /// Waits until the console shows `text`.
    pub async fn shows(&self, text: &str) -> Result<()> {
        while !self.console().contains(text) {
            if self.begun.elapsed() > PATIENCE {
                bail!("no {text:?}; {}", self.story());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The number after `key` on the console, once its line is whole.
    pub async fn number(&self, key: &str) -> Result<f64> {
        let prefix = format!("{key} ");
        loop {
            let console = self.console();
            let whole = console.rfind('\n').map_or("", |end| &console[..end]);
            if let Some(rest) = whole.lines().find_map(|line| line.strip_prefix(&prefix)) {
                let word = rest.trim();
                return word
                    .parse()
                    .with_context(|| format!("{key} is {word:?}; {}", self.story()));
            }
            self.shows(&prefix).await?;
            tokio::time::sleep(LOOK).await;
        }
    }

    pub fn console(&self) -> String {
        // Not there yet is as good as empty.
        let bytes = fs::read(self.path("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// The monitor's own process, then its helpers.
    pub fn pids(&self) -> Vec<u32> {
        match &self.process {
            Process::Drupe(drupe) => vec![drupe.pid()],
            Process::Qemu(qemu) => qemu.pids(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn story(&self) -> String {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        format!("its console:\n{}\nits monitor:\n{log}", self.console())
    }

    /// Ends it and waits for its end.
    pub async fn end(self) -> Result<()> {
        match self.process {
            Process::Drupe(drupe) => drupe.end().await,
            Process::Qemu(qemu) => qemu.end(),
        }
    }
}

/// A file of this run that a monitor writes to.
pub fn append(dir: &Path, name: &str) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .read(true)
        .open(dir.join(name))
        .with_context(|| name.to_owned())
}
