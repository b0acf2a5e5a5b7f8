//! `drupe-vmm`: one pod's virtual machine. Started by the daemon only, which
//! hands the spec over on standard input.

use std::process::ExitCode;
use std::time::Instant;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let since = Instant::now();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .finish();
    // Of this program's own words only: libraries log what a guest makes them.
    if tracing::subscriber::set_global_default(log).is_err() {
        return ExitCode::FAILURE;
    }
    match drupe_vmm::run(since) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "cannot run"
            );
            ExitCode::FAILURE
        }
    }
}
