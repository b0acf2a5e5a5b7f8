//! One guest on either monitor.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::time::timeout_at;

use crate::drupe::Drupe;
use crate::host::Ready;
use crate::qemu::Qemu;
use crate::shared::watch::Watch;
use crate::{Files, host};

/// Far more than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Monitor {
    Drupe,
    /// The tap is served by the host's kernel (vhost-net) or by QEMU.
    Qemu {
        vhost_net: bool,
    },
}

/// A guest that has not said a word in all its time, as one that the emulator's
/// fault hangs in its first steps.
#[derive(Debug, thiserror::Error)]
#[error("a guest of {monitor:?} has said nothing; its monitor:\n{log}")]
pub struct Silent {
    monitor: Monitor,
    log: String,
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

impl<'a> Vm<'a> {
    /// A pod's initramfs and no network.
    pub fn plain(files: &'a Files, disk: &'a Path) -> Self {
        Self {
            files,
            initramfs: &files.initramfs,
            memory_mib: 128,
            disk,
            tap: None,
        }
    }

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
    monitor: Monitor,
    process: Process,
    begun: Instant,
    /// Of its console.
    watch: Watch,
    dir: TempDir,
}

impl Running {
    /// Starts a guest; its time begins right before its monitor's process.
    pub async fn start(monitor: Monitor, vm: &Vm<'_>, ready: &Ready) -> Result<Self> {
        let dir = host::tempdir()?;
        append(dir.path(), "console")?;
        let watch = Watch::new(&dir.path().join("console"))?;
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
                let prepared = Qemu::prepare(vm, vhost_net, ready.next_cid(), dir.path()).await?;
                let begun = Instant::now();
                (begun, Process::Qemu(Qemu::start(prepared)?))
            }
        };
        Ok(Self {
            monitor,
            process,
            begun,
            watch,
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
        heard.map_err(|error| self.without(error, "agent"))?;
        Ok(took)
    }

    /// Waits until the console shows `text`.
    pub async fn shows(&self, text: &str) -> Result<()> {
        let shown = |console: &str| console.contains(text).then_some(());
        self.find(text, shown).await
    }

    /// The number after `key` on the console, once its line is whole.
    pub async fn number(&self, key: &str) -> Result<f64> {
        let prefix = format!("{key} ");
        let word = |console: &str| {
            let (whole, _) = console.rsplit_once('\n')?;
            let rest = whole.lines().find_map(|line| line.strip_prefix(&prefix))?;
            Some(rest.trim().to_owned())
        };
        let word = self.find(key, word).await?;
        word.parse()
            .with_context(|| format!("{key} is {word:?}; {}", self.story()))
    }

    /// Waits until `look` finds something on the console.
    async fn find<T>(&self, what: &str, look: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = (self.begun + PATIENCE).into();
        loop {
            if let Some(found) = look(&self.console()?) {
                return Ok(found);
            }
            let changed = timeout_at(deadline, self.watch.changed()).await;
            changed.map_err(|error| self.without(error.into(), what))??;
        }
    }

    /// Why `what` never came.
    fn without(&self, error: Error, what: &str) -> Error {
        let mute = self.console().is_ok_and(|console| console.is_empty());
        if mute && self.begun.elapsed() >= PATIENCE {
            return Silent {
                monitor: self.monitor,
                log: self.text("log"),
            }
            .into();
        }
        error.context(format!("no {what:?}; {}", self.story()))
    }

    fn console(&self) -> Result<String> {
        let bytes = fs::read(self.path("console")).context("console")?;
        Ok(String::from_utf8_lossy(&bytes).replace('\r', ""))
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

    fn text(&self, name: &str) -> String {
        let bytes = fs::read(self.path(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn story(&self) -> String {
        let [console, log] = ["console", "log"].map(|name| self.text(name));
        format!("its console:\n{console}\nits monitor:\n{log}")
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
