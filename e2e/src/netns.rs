//! A network of the test's own: ports, bridges and firewall rules of one test
//! are invisible to another and to the machine, and go when its last process
//! does.

use std::fs::File;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use crate::output::of_success;

pub struct NetNs {
    /// None: the network of the harness itself.
    namespace: Option<File>,
}

impl NetNs {
    /// A new namespace, loopback up.
    pub fn isolated() -> Result<Self> {
        let namespace = thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<File> {
                unshare(CloneFlags::CLONE_NEWNET).context("new network namespace")?;
                let status = Command::new("ip")
                    .args(["link", "set", "lo", "up"])
                    .status()
                    .context("ip")?;
                ensure!(status.success(), "ip link set lo up: {status}");
                File::open("/proc/thread-self/ns/net").context("open the network namespace")
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        Ok(Self {
            namespace: Some(namespace),
        })
    }

    #[must_use]
    pub fn of_this_machine() -> Self {
        Self { namespace: None }
    }

    /// Runs `work` on a thread inside: sockets it opens and processes it
    /// starts belong to this network.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let Some(namespace) = &self.namespace else {
            return work();
        };
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET).context("enter the node's network")?;
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Names of the links inside.
    pub fn links(&self) -> Result<Vec<String>> {
        self.run(|| {
            let table =
                std::fs::read_to_string("/proc/thread-self/net/dev").context("/proc/net/dev")?;
            let names = table.lines().filter_map(|line| line.split_once(':'));
            Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
        })
    }

    /// What a command run inside prints.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        self.run(|| {
            let output = Command::new(program)
                .args(args)
                .output()
                .with_context(|| program.to_owned())?;
            of_success(program, args, &output)
        })
    }
}
