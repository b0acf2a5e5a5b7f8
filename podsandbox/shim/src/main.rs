//! `drupe-shim`: the supervisor of one pod that shares the host's kernel.
//!
//! ```text
//! daemon ── control socket ──▶ control ── logs: containers' output, as the VMM writes it
//!    └───── stream socket ───▶ links ─┬─ gRPC of the agent ─▶ server ─▶ containers ─▶ OCI runtime
//!                                     └─ raw streams ─▶ sessions of exec and attach, ports
//! ```
//! It speaks the two interfaces of a microVM, the VMM's control protocol and
//! the agent's gRPC, so the pod's driver need not know which it has. It stands
//! in the pod's network, IPC and UTS namespaces, which its containers inherit
//! and which live as long as it does, and it is their parent: it outlives the
//! daemon, and no exit is lost. Started by the daemon, which hands the
//! listening sockets over as standard input and output.
#![forbid(unsafe_code)]

mod cgroup;
mod console;
mod container;
mod control;
mod create;
mod error;
mod exec;
mod layer;
mod links;
mod packet;
mod pause;
mod pod;
mod remove;
mod runtime;
mod sandbox;
mod server;
mod start;
mod stats;
mod supervisor;
mod update;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;

use clap::Parser;
use drupe_agent::server::sentence;
use drupe_vmm::bounded::BoundedLog;

/// Containers can make their supervisor say something as often as they like.
const LOG_LIMIT_BYTES: u64 = 256 * 1024;

/// Runs the containers of one pod; started by drupe only.
#[derive(Parser)]
#[command(name = "drupe-shim", version)]
enum Cli {
    /// Supervise the pod of this id. Standard input is the listening control
    /// socket, standard output the listening stream socket.
    Supervise {
        pod: String,
        /// The pod's own directory, which it may fill.
        #[arg(long)]
        dir: PathBuf,
        /// The OCI runtime's program.
        #[arg(long)]
        runtime: PathBuf,
        /// The pod's control group, from its hierarchy's root.
        #[arg(long)]
        cgroup: PathBuf,
        /// Where the files of /etc that its containers share are made.
        #[arg(long)]
        etc: PathBuf,
        /// The pod is in the host's network and has the host's name.
        #[arg(long)]
        host_network: bool,
    },
    /// Hold a PID namespace until standard input ends; say on standard output
    /// when that is ready to be joined.
    Pause,
}

fn main() -> ExitCode {
    end_on_panic();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    // A file that the daemon has made in the pod's directory.
    let Ok(stderr) = BoundedLog::new(std::io::stderr(), LOG_LIMIT_BYTES) else {
        return ExitCode::FAILURE;
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "info".into()))
        .with_writer(Mutex::new(stderr))
        .with_ansi(false)
        .init();
    // Streams are served by the agent's code.
    drupe_agent::log::tell_to(|what| tracing::warn!("{what}"));
    let (doing, result) = match Cli::parse() {
        Cli::Supervise {
            pod,
            dir,
            runtime,
            cgroup,
            etc,
            host_network,
        } => {
            let options = supervisor::Options {
                pod,
                dir,
                runtime,
                cgroup,
                etc,
                host_network,
            };
            (
                "supervise",
                supervisor::run(options).map_err(|e| sentence(&e)),
            )
        }
        Cli::Pause => ("pause", pause::hold().map_err(|e| sentence(&e))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "cannot {doing}");
            ExitCode::FAILURE
        }
    }
}

/// A supervisor that has lost a task is not to go on: the daemon notices its
/// end, and ends the pod.
fn end_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

/// A reaper takes every child of the process: one test that has some at a time.
#[cfg(test)]
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
