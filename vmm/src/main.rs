//! `drupe-vmm`: one pod's virtual machine. Started by the daemon only, which
//! hands the spec over on standard input; and by itself, as the pod's file
//! server.

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use drupe_vmm::bounded::BoundedLog;
use drupe_vmm::files;
use tracing_subscriber::EnvFilter;

/// A guest can make its monitor say something as often as it likes.
const LOG_LIMIT_BYTES: u64 = 256 * 1024;

fn main() -> ExitCode {
    let since = Instant::now();
    share_one_heap();
    end_on_panic();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A file that the daemon has made in the pod's directory.
    let Ok(stderr) = BoundedLog::new(std::io::stderr(), LOG_LIMIT_BYTES) else {
        return ExitCode::FAILURE;
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Mutex::new(stderr))
        .with_ansi(false)
        .finish();
    // Of this program's own words only: libraries log what a guest makes them.
    if tracing::subscriber::set_global_default(log).is_err() {
        return ExitCode::FAILURE;
    }
    let is_file_server = std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == files::NAME);
    let outcome = if is_file_server {
        files::run().map_err(anyhow::Error::from)
    } else {
        drupe_vmm::run(since).map_err(anyhow::Error::from)
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "cannot run");
            ExitCode::FAILURE
        }
    }
}

/// A machine that has lost a thread is not to go on: it ends as a whole.
fn end_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

/// A heap for each thread costs memory, and to give some of it back libc opens
/// files, which the threads' filters do not let it (`drupe_vmm::filter`).
fn share_one_heap() {
    // SAFETY: a setting of libc, made before there is a second thread.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } != 1 {
        tracing::warn!("the threads cannot be made to share a heap");
    }
}
