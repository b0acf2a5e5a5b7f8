//! Unpackers on a node whose kernel lacks a part of their jail.

use std::env::consts::ARCH;
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
use unpacker_client::{
    Compression, Failure, Job, Missing, Process, Task, Unpacker, Watch, parent, stopper,
};

use super::unpacker;

/// The call that such a kernel does not have, and what is lacking then.
const CASES: [(&str, i64, Missing); 2] = [
    (
        "without Landlock",
        libc::SYS_landlock_create_ruleset,
        Missing::Landlock,
    ),
    ("without seccomp", libc::SYS_seccomp, Missing::Seccomp),
];

/// Tries all; gives the number of surprises.
pub fn all(wanted: &dyn Fn(&str) -> bool) -> usize {
    let mut failures = 0;
    for (name, call, missing) in CASES.into_iter().filter(|case| wanted(case.0)) {
        let fair = start(call, false);
        let strict = start(call, true);
        let refuses = |failure: &Failure| match failure {
            Failure::Unconfined { reason } => reason.contains(&missing.to_string()),
            _ => false,
        };
        let is_told = fair.as_ref().is_ok_and(|told| told.contains(&missing));
        if !is_told || !strict.as_ref().is_err_and(refuses) {
            println!("FAILED: a kernel {name}: {fair:?}, and strict {strict:?}");
            failures += 1;
        }
    }
    failures
}

/// What an unpacker says that it lacks when it is in its jail.
fn start(call: i64, strict: bool) -> Result<Vec<Missing>, Failure> {
    let (reader, to_reader) = std::io::pipe().unwrap();
    let (_archive, writer) = std::io::pipe().unwrap();
    drop(to_reader);
    let fds = [reader.as_fd(), writer.as_fd()];
    let unpacker = Unpacker {
        strict,
        ..unpacker()
    };
    let job = Job {
        unpacker: &unpacker,
        name: "leaves without a word",
        task: Task::Decompress {
            declared: Compression::None,
            max_bytes: 0,
        },
        fds: &fds,
    };
    let (_stopper, stop) = stopper().unwrap();
    let watch = Watch::new(&stop, Duration::from_secs(60));
    thread::scope(|scope| {
        let work = |right| {
            do_without(call);
            Process::start(right, &job, &watch).map(|process| process.missing().to_vec())
        };
        parent(scope, work).unwrap().join().unwrap()
    })
}

/// Has `call` fail as on a kernel without it, in this thread and in what it
/// starts.
fn do_without(call: i64) {
    let filter = SeccompFilter::new(
        [(call, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        TargetArch::try_from(ARCH).unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
}
