//! Attempts at a way out of the unpacker's jail, each from a process of its own
//! in the real one, and what each has come to. Then unpackers that do not do as
//! they should.
//!
//! This program is the daemon, and run by itself the unpacker that was taken
//! over: it enters the jail as `drupe-unpacker` does and then does what its
//! name says. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod attempts;
mod call;
mod ends;
mod lacking;

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use drupe_unpacker::jail::{self, Filters};
use drupe_unpacker::session::Session;
use nix::sys::signal::Signal;
use unpacker_client::{
    Done, Failure, Fault, Job, Limits, Missing, Process, Task, Unpacker, Watch, Word, parent,
    stopper,
};

use attempts::{ATTEMPTS, Attempt};

/// Nobody's.
const UID: u32 = 1_879_113_728;

/// Behind an attempt's name: in a jail without seccomp and Landlock.
const BARE: &str = "/bare";

/// Longest file that an attempt may write.
const FILE_LIMIT: u64 = 1 << 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["decompress" | "write" | "directories", name] => taken_over(name),
        [ends::DAEMON] => ends::daemon(),
        _ => {
            // What cargo passes to every test: options, and parts of names.
            let mut parts = arguments.clone();
            parts.retain(|argument| !argument.starts_with('-'));
            let wanted =
                |name: &str| parts.is_empty() || parts.iter().any(|part| name.contains(part));
            let failures = table(&wanted) + ends::all(&wanted) + lacking::all(&wanted);
            if failures == 0 {
                return ExitCode::SUCCESS;
            }
            println!("{failures} failed");
            ExitCode::FAILURE
        }
    }
}

/// Tries everything twice and prints a line for each; gives the number of
/// surprises.
fn table(wanted: &dyn Fn(&str) -> bool) -> usize {
    println!("| attempt | in the jail | without seccomp and Landlock |");
    println!("| --- | --- | --- |");
    let mut failures = 0;
    for attempt in ATTEMPTS.iter().filter(|attempt| wanted(attempt.name)) {
        let jailed = outcome(attempt.name);
        let mut bad = jailed != attempt.jailed;
        let bare = match attempt.bare {
            Some(expected) => {
                let bare = outcome(&format!("{}{BARE}", attempt.name));
                bad |= bare != expected;
                bare
            }
            None => "-".to_owned(),
        };
        println!("| {} | {jailed} | {bare} |", attempt.name);
        if bad {
            let bare = attempt.bare.unwrap_or("-");
            println!("FAILED: wanted {} and {bare}", attempt.jailed);
            failures += 1;
        }
    }
    println!("{} attempts", ATTEMPTS.len());
    failures
}

/// What an attempt has come to: the name of an error or of a signal, or what
/// it says of itself.
fn outcome(name: &str) -> String {
    match unpack(name, Duration::from_secs(60)) {
        Err(Failure::Failed { reason, .. }) => reason,
        Err(Failure::Died { death, .. }) => match death.signal() {
            Some(number) => Signal::try_from(number).unwrap().as_str().to_owned(),
            None => death.to_string(),
        },
        other => format!("{other:?}"),
    }
}

/// Has the unpacker `name` write an image.
fn unpack(name: &str, patience: Duration) -> Result<Done, Failure> {
    let (reader, writer) = std::io::pipe().unwrap();
    // As a layer that has ended.
    drop(writer);
    let image = tempfile::tempfile().unwrap();
    let fds = [reader.as_fd(), image.as_fd()];
    let unpacker = unpacker();
    let job = Job {
        unpacker: &unpacker,
        name,
        task: Task::Write {
            limits: limits(),
            received: 0,
        },
        fds: &fds,
    };
    let (_stopper, stop) = stopper().unwrap();
    let watch = Watch::new(&stop, patience);
    thread::scope(|scope| {
        let work = |right| {
            let process = Process::start(right, &job, &watch)?;
            // Of these attempts none takes what an older Landlock lets through.
            let old = |missing: &Missing| *missing == Missing::PartOfLandlock;
            assert!(
                process.missing().iter().all(old),
                "this kernel cannot run the test"
            );
            process.wait(&watch, patience)
        };
        parent(scope, work).unwrap().join().unwrap()
    })
}

fn unpacker() -> Unpacker {
    Unpacker {
        program: std::env::current_exe().unwrap(),
        uid: UID,
        gid: UID,
        strict: false,
    }
}

fn limits() -> Limits {
    Limits {
        max_uncompressed_bytes: FILE_LIMIT,
        ..Limits::default()
    }
}

/// In the place of `drupe-unpacker`.
fn taken_over(name: &str) -> ExitCode {
    let (attempt_name, filters) = match name.strip_suffix(BARE) {
        Some(attempt) => (attempt, Filters::None),
        None => (name, Filters::All),
    };
    let (session, order, fds) = Session::open().unwrap();
    let missing = match jail::enter(&order, filters) {
        Ok(missing) => missing,
        Err(error) => {
            return session.end(&Word::Failed {
                fault: error.fault(),
                reason: error.to_string(),
            });
        }
    };
    session.say(&Word::Ready { missing }).unwrap();
    if let Some(Attempt { make, .. }) = ATTEMPTS.iter().find(|a| a.name == attempt_name) {
        return session.end(&Word::Failed {
            fault: Fault::Layer,
            reason: make.outcome(&fds),
        });
    }
    ends::behave(attempt_name, &session, &fds)
}
