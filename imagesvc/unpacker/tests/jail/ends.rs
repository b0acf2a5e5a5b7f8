//! Unpackers that end, or do not, as they should not.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio, exit};
use std::thread;
use std::time::{Duration, Instant};

use drupe_unpacker::session::Session;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use rustix::stdio::stdin;
use unpacker_client::{
    Compression, Failure, Job, MAX_REASON_CHARS, Process, Task, Watch, Word, parent, stopper,
};

use super::{unpack, unpacker};

/// Makes this program a daemon whose unpacker outlives its task.
pub const DAEMON: &str = "daemon";

const STUBBORN: &str = "does not end with its layer";

/// Far beyond what an unpacker needs that is killed.
const SOON: Duration = Duration::from_secs(10);

/// The name of an unpacker, and what the daemon makes of it.
type End = (&'static str, fn(&Failure) -> bool);

const ENDS: &[End] = &[
    ("hangs", |failure| {
        matches!(failure, Failure::Stalled { .. })
    }),
    ("talks nonsense", |failure| {
        matches!(failure, Failure::Nonsense(_))
    }),
    ("talks without end", |failure| {
        matches!(failure, Failure::Nonsense(_))
    }),
    ("says twice that it is ready", |failure| {
        matches!(failure, Failure::Nonsense(_))
    }),
    ("leaves without a word", |failure| {
        failure.to_string() == "its unpacker (write) ended with exit status: 0"
    }),
    ("closes its socket and goes on", |failure| {
        failure.to_string() == "its unpacker (write) was killed by signal 9 (SIGKILL)"
    }),
    ("panics", |failure| {
        let text = failure.to_string();
        text.starts_with("its unpacker (write) ended with exit status: 101; its last words: ")
            && text.contains("this layer is too much")
    }),
    ("has a long and odd reason", |failure| {
        let text = failure.to_string();
        text.chars().count() == MAX_REASON_CHARS && !text.contains(['\n', '\u{1b}'])
    }),
];

/// Plays all; gives the number of surprises.
pub fn all(wanted: &dyn Fn(&str) -> bool) -> usize {
    let mut failures = 0;
    for (name, is_expected) in ENDS.iter().filter(|(name, _)| wanted(name)) {
        let patience = Duration::from_millis(if *name == "hangs" { 200 } else { 60_000 });
        let failed = match unpack(name, patience) {
            Err(failure) if is_expected(&failure) => false,
            other => {
                println!("FAILED: one that {name}: {other:?}");
                true
            }
        };
        failures += usize::from(failed);
    }
    if wanted("orphan") {
        outlives_nobody();
    }
    failures
}

/// What the unpacker `name` does in its jail.
pub fn behave(name: &str, session: &Session, fds: &[OwnedFd]) -> ExitCode {
    let say = |bytes: &[u8]| {
        rustix::io::write(stdin(), bytes).unwrap();
    };
    match name {
        "hangs" => loop {
            std::hint::spin_loop();
        },
        "talks nonsense" => say(b"\xff{"),
        "talks without end" => say(&vec![b' '; 20 * 1024]),
        "says twice that it is ready" => session
            .say(&Word::Ready {
                missing: Vec::new(),
            })
            .unwrap(),
        "leaves without a word" => {}
        "closes its socket and goes on" => {
            nix::unistd::close(0).unwrap();
            loop {
                std::hint::spin_loop();
            }
        }
        "panics" => {
            // As in the program itself.
            std::panic::set_hook(Box::new(|panic| {
                eprintln!("{panic}");
                exit(101);
            }));
            panic!("this layer is too much");
        }
        "has a long and odd reason" => {
            return session.end(&Word::Failed {
                fault: unpacker_client::Fault::Layer,
                reason: "x\n\u{1b}[31m".repeat(1000),
            });
        }
        STUBBORN => {
            let mut end = [0];
            loop {
                // At the end there is nothing, again and again.
                rustix::io::read(&fds[0], &mut end).unwrap();
            }
        }
        other => panic!("no attempt {other:?}"),
    }
    ExitCode::SUCCESS
}

/// Starts an unpacker that ignores its layer's end, tells its id and waits to
/// be killed.
pub fn daemon() -> ExitCode {
    let (reader, _writer) = std::io::pipe().unwrap();
    let (_archive, to_archive) = std::io::pipe().unwrap();
    let fds = [reader.as_fd(), to_archive.as_fd()];
    let unpacker = unpacker();
    let job = Job {
        unpacker: &unpacker,
        name: STUBBORN,
        task: Task::Decompress {
            declared: Compression::None,
            max_bytes: 0,
        },
        fds: &fds,
    };
    let (_stopper, stop) = stopper().unwrap();
    let watch = Watch::new(&stop, Duration::MAX);
    thread::scope(|scope| {
        let work = |right| {
            let process = Process::start(right, &job, &watch).unwrap();
            println!("{}", process.id());
            std::io::stdout().flush().unwrap();
            process.wait(&watch, Duration::MAX).unwrap_err()
        };
        let failure = parent(scope, work).unwrap().join().unwrap();
        println!("{failure}");
    });
    ExitCode::FAILURE
}

/// A daemon that is killed takes its unpackers along, whatever they think of
/// it.
fn outlives_nobody() {
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .arg(DAEMON)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(daemon.stdout.take().unwrap());
    said.read_line(&mut line).unwrap();
    let id: i32 = line.trim().parse().unwrap();
    let unpacker = rustix::process::Pid::from_raw(id).unwrap();
    let unpacker = pidfd_open(unpacker, PidfdFlags::empty()).unwrap();
    let begun = Instant::now();
    kill(
        Pid::from_raw(daemon.id().try_into().unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    daemon.wait().unwrap();
    let mut ended = [PollFd::new(&unpacker, PollFlags::IN)];
    let soon = Timespec::try_from(SOON).unwrap();
    assert_eq!(
        poll(&mut ended, Some(&soon)).unwrap(),
        1,
        "an orphan is left"
    );
    println!("an orphan ends {:?} after its daemon", begun.elapsed());
}
