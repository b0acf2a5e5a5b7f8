//! The log thread with real files and socket pairs.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::framing::{MAX_CONTENT, StreamKind, content, decode};
use super::unnamed::MAX_UNNAMED;
use super::*;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(30);

struct Logs {
    handle: LogHandle,
    dir: tempfile::TempDir,
}

impl Logs {
    fn new() -> Self {
        Self::of(LogService::start(|| Ok(())).unwrap())
    }

    fn waiting(waits: Waits) -> Self {
        Self::of(LogService::start_with(waits, || Ok(())).unwrap())
    }

    fn of(handle: LogHandle) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { handle, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self, container: &str, name: &str) -> PathBuf {
        let path = self.path(name);
        self.handle.open(container, None, append(&path)).unwrap();
        path
    }

    /// With a token that streams have to name.
    fn guard(&self, container: &str, token: Option<LogToken>, name: &str) -> PathBuf {
        let path = self.path(name);
        self.handle.open(container, token, append(&path)).unwrap();
        path
    }

    /// Returns once the thread has been through its events and commands.
    fn turn(&self) {
        self.handle.close("nobody").unwrap();
    }

    fn stream(&self, header: &str) -> UnixStream {
        let mut stream = self.handle.connect().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(header.as_bytes()).unwrap();
        stream
    }
}

fn append(path: &Path) -> File {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap()
}

/// What the agent does at a container's end: everything is in the file then.
fn end(mut stream: UnixStream) {
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "acknowledged");
}

fn assert_closed(mut stream: UnixStream) {
    let closed = match stream.read(&mut [0; 1]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
    };
    assert!(closed, "the stream is still open");
}

/// Lines as a program writes them, of all lengths to beyond the split.
fn lines(len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    let mut i = 0_u64;
    while bytes.len() < len {
        let line = format!("{i:010} the quick brown fox jumps over the lazy dog");
        bytes.extend_from_slice(line.as_bytes());
        if i.is_multiple_of(997) {
            bytes.resize(bytes.len() + MAX_CONTENT + 100, b'-');
        }
        bytes.push(b'\n');
        i += 1;
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn a_hundred_megabytes_are_in_the_file_when_the_stream_is_acknowledged() {
    let logs = Logs::new();
    let path = logs.open("busy", "0.log");
    let bytes = lines(100 << 20);
    let start = Instant::now();
    let mut stream = logs.stream("busy stdout\n");
    stream.write_all(&bytes).unwrap();
    end(stream);
    let took = start.elapsed();
    let log = std::fs::read(path).unwrap();
    assert!(content(&log, StreamKind::Stdout) == bytes, "bytes differ");
    eprintln!("100 MiB took {took:?}");
}

#[test]
fn a_partial_last_line_is_exact() {
    let logs = Logs::new();
    let path = logs.open("c", "0.log");
    let mut stream = logs.stream("c stderr\n");
    stream.write_all(b"whole\nno newline").unwrap();
    end(stream);
    let log = std::fs::read(path).unwrap();
    assert_eq!(content(&log, StreamKind::Stderr), b"whole\nno newline");
    let text = String::from_utf8(log).unwrap();
    let mut lines = text.lines();
    assert!(lines.next().unwrap().ends_with("Z stderr F whole"));
    assert!(lines.next().unwrap().ends_with("Z stderr P no newline"));
}

#[test]
fn the_header_may_come_in_pieces_and_with_output_behind_it() {
    let logs = Logs::new();
    let path = logs.open("c", "0.log");
    let mut stream = logs.stream("c std");
    for piece in [&b"o"[..], b"ut", b"\nh", b"i\n"] {
        logs.turn();
        stream.write_all(piece).unwrap();
    }
    end(stream);
    let log = std::fs::read(path).unwrap();
    assert_eq!(content(&log, StreamKind::Stdout), b"hi\n");
}

#[test]
fn both_streams_share_a_file_record_by_record() {
    let logs = Logs::new();
    let path = logs.open("c", "0.log");
    let bytes = lines(4 << 20);
    let writers: Vec<_> = ["stdout", "stderr"]
        .into_iter()
        .map(|name| {
            let mut stream = logs.stream(&format!("c {name}\n"));
            let bytes = bytes.clone();
            thread::spawn(move || {
                for chunk in bytes.chunks(777) {
                    stream.write_all(chunk).unwrap();
                }
                end(stream);
            })
        })
        .collect();
    for writer in writers {
        writer.join().unwrap();
    }
    let log = std::fs::read(path).unwrap();
    assert!(content(&log, StreamKind::Stdout) == bytes);
    assert!(content(&log, StreamKind::Stderr) == bytes);
}

#[test]
fn rotation_under_load_loses_nothing_and_cuts_no_line() {
    // However long a busy machine keeps a writer in the middle of a line.
    let logs = Logs::waiting(Waits {
        rotation: Duration::from_secs(600),
        ..Waits::default()
    });
    logs.open("c", "0.log");
    let mut bytes = lines(24 << 20);
    // A stream's unfinished last line may be the end of any file but the last.
    bytes.push(b'\n');
    let writers: Vec<_> = ["stdout", "stderr"]
        .into_iter()
        .map(|name| {
            let mut stream = logs.stream(&format!("c {name}\n"));
            let bytes = bytes.clone();
            thread::spawn(move || {
                for chunk in bytes.chunks(10_007) {
                    stream.write_all(chunk).unwrap();
                }
                end(stream);
            })
        })
        .collect();
    let mut names = vec!["0.log".to_owned()];
    let mut sizes = Vec::new();
    while writers.iter().any(|writer| !writer.is_finished()) && names.len() < 200 {
        let name = format!("{}.log", names.len());
        logs.open("c", &name);
        // From the reply on the old file stands still.
        let old = std::fs::metadata(logs.path(names.last().unwrap())).unwrap();
        sizes.push(old.len());
        names.push(name);
    }
    for writer in writers {
        writer.join().unwrap();
    }
    assert!(names.len() > 3, "rotated {} times only", names.len());
    let mut whole = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let log = std::fs::read(logs.path(name)).unwrap();
        if let Some(&size) = sizes.get(i) {
            assert_eq!(log.len() as u64, size, "{name} grew after its rotation");
            let records = decode(&log);
            for kind in [StreamKind::Stdout, StreamKind::Stderr] {
                let last = records.iter().rev().find(|(of, ..)| *of == kind);
                assert!(
                    last.is_none_or(|(_, tag, _)| *tag == b'F'),
                    "{name} ends inside a line"
                );
            }
        }
        whole.extend(log);
    }
    assert!(content(&whole, StreamKind::Stdout) == bytes);
    assert!(content(&whole, StreamKind::Stderr) == bytes);
}

#[test]
fn rotation_waits_for_the_end_of_a_line_but_not_for_ever() {
    let logs = Logs::new();
    let old = logs.open("c", "0.log");
    let mut stream = logs.stream("c stdout\n");
    let long = vec![b'x'; 3 * MAX_CONTENT];
    stream.write_all(&long).unwrap();
    while std::fs::metadata(&old).unwrap().len() < 2 * MAX_CONTENT as u64 {
        thread::yield_now();
    }

    // The line ends: all of it is in the old file.
    let (reply, rotated) = mpsc::channel();
    let open = Command::Open {
        container: "c".into(),
        token: None,
        file: append(&logs.path("1.log")),
        reply,
    };
    logs.handle.0.send(open).unwrap();
    logs.turn();
    stream.write_all(b"\nnext\n").unwrap();
    rotated.recv().unwrap().unwrap();
    let first = std::fs::read(&old).unwrap();
    assert_eq!(
        content(&first, StreamKind::Stdout),
        [&long[..], b"\n"].concat()
    );

    // The line does not end: the old file is let go all the same.
    stream.write_all(&long).unwrap();
    while std::fs::metadata(logs.path("1.log")).unwrap().len() < 2 * MAX_CONTENT as u64 {
        thread::yield_now();
    }
    let start = Instant::now();
    logs.open("c", "2.log");
    assert!(start.elapsed() < PATIENCE);
    end(stream);
    let mut rest = std::fs::read(logs.path("1.log")).unwrap();
    rest.extend(std::fs::read(logs.path("2.log")).unwrap());
    assert_eq!(
        content(&rest, StreamKind::Stdout),
        [b"next\n", &long[..]].concat()
    );
}

#[test]
fn a_stream_that_is_nobodys_is_closed() {
    let logs = Logs::new();
    logs.open("c", "0.log");
    let long = format!("{} stdout\n", "c".repeat(300));
    for header in [
        "other stdout\n",
        "c stdin\n",
        "c\n",
        "\n",
        "c  stdout\n",
        "../c stdout\n",
        "c stdout \n",
        &long,
    ] {
        assert_closed(logs.stream(header));
    }
    assert_eq!(std::fs::read(logs.path("0.log")).unwrap(), b"");
}

#[test]
fn a_full_disk_does_not_block_the_container() {
    let logs = Logs::new();
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    logs.handle.open("c", None, full).unwrap();
    let mut stream = logs.stream("c stdout\n");
    stream.write_all(&lines(4 << 20)).unwrap();
    // A new file, as rotation brings one, takes what comes from then on. The
    // line that was cut off ends in it.
    let path = logs.open("c", "1.log");
    stream.write_all(b"\nafterwards\n").unwrap();
    end(stream);
    let log = std::fs::read(path).unwrap();
    assert!(content(&log, StreamKind::Stdout).ends_with(b"\nafterwards\n"));
}

#[test]
fn a_closed_log_takes_its_open_streams_to_the_end_and_no_new_ones() {
    let logs = Logs::new();
    let path = logs.open("c", "0.log");
    let mut stream = logs.stream("c stdout\n");
    stream.write_all(b"one\n").unwrap();
    while std::fs::metadata(&path).unwrap().len() == 0 {
        thread::yield_now();
    }
    logs.handle.close("c").unwrap();
    assert_closed(logs.stream("c stderr\n"));
    stream.write_all(b"two\n").unwrap();
    end(stream);
    let log = std::fs::read(path).unwrap();
    assert_eq!(content(&log, StreamKind::Stdout), b"one\ntwo\n");
    logs.handle.close("c").unwrap();
    assert_closed(logs.stream("c stdout\n"));
}

#[test]
fn the_end_of_the_machine_leaves_nothing_in_the_streams() {
    let logs = Logs::new();
    let path = logs.open("c", "0.log");
    let mut stream = logs.stream("c stdout\n");
    stream.write_all(b"line\nlast words").unwrap();
    logs.handle.finish().unwrap();
    let log = std::fs::read(path).unwrap();
    assert_eq!(content(&log, StreamKind::Stdout), b"line\nlast words");
    assert_closed(stream);
}

#[test]
fn only_who_knows_its_token_writes_a_containers_log() {
    let logs = Logs::new();
    let (token, other) = (LogToken::new([7; 16]), LogToken::new([8; 16]));
    let path = logs.guard("c", Some(token), "0.log");
    logs.guard("sibling", Some(other), "sibling.log");
    for header in [
        "c stdout\n".to_owned(),
        "c stdout \n".to_owned(),
        format!("c stdout {other}\n"),
        format!("sibling stdout {token}\n"),
        format!("c stdout {token} \n"),
        format!("c stdout {token}0\n"),
        format!("c stdout {}\n", &token.to_string()[1..]),
    ] {
        let mut stream = logs.handle.connect().unwrap();
        // It may be refused before all is written.
        let _ = stream.write_all(format!("{header}forged\n").as_bytes());
        assert_closed(stream);
    }
    let mut stream = logs.stream(&format!("c stdout {token}\n"));
    stream.write_all(b"its own\n").unwrap();
    end(stream);
    let log = std::fs::read(&path).unwrap();
    assert_eq!(content(&log, StreamKind::Stdout), b"its own\n");
    assert_eq!(std::fs::read(logs.path("sibling.log")).unwrap(), b"");

    // A rotation leaves the token as it is; another creation brings its own.
    let rotated = logs.guard("c", None, "1.log");
    assert_closed(logs.stream("c stdout\n"));
    end(logs.stream(&format!("c stdout {token}\n")));
    logs.guard("c", Some(other), "2.log");
    assert_closed(logs.stream(&format!("c stdout {token}\n")));
    end(logs.stream(&format!("c stdout {other}\n")));
    assert_eq!(std::fs::read(rotated).unwrap(), b"");

    // A log of an older daemon has none, and streams name none.
    logs.open("old", "old.log");
    assert_closed(logs.stream(&format!("old stdout {token}\n")));
    end(logs.stream("old stdout\n"));
}

#[test]
fn streams_that_do_not_say_whose_they_are_keep_no_container_out() {
    let logs = Logs::new();
    let path = logs.open("c", "0.log");
    let mut named = logs.stream("c stderr\n");
    logs.turn();
    let mut silent: Vec<_> = (0..MAX_UNNAMED)
        .map(|_| logs.handle.connect().unwrap())
        .collect();
    // As many as there may be, and each has said half of it.
    for stream in &mut silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"c std").unwrap();
    }
    logs.turn();
    let mut stream = logs.stream("c stdout\n");
    stream.write_all(b"here\n").unwrap();
    end(stream);
    assert_closed(silent.remove(0));
    // The others may still say it, and who has a name is none of them.
    silent[0].write_all(b"out\n").unwrap();
    end(silent.remove(0));
    named.write_all(b"still\n").unwrap();
    end(named);
    let log = std::fs::read(&path).unwrap();
    assert_eq!(content(&log, StreamKind::Stdout), b"here\n");
    assert_eq!(content(&log, StreamKind::Stderr), b"still\n");
}

#[test]
fn who_does_not_say_in_time_whose_it_is_is_closed() {
    let wait = Duration::from_millis(200);
    let logs = Logs::waiting(Waits {
        header: wait,
        ..Waits::default()
    });
    let path = logs.open("c", "0.log");
    let mut named = logs.stream("c stdout\n");
    logs.turn();
    let start = Instant::now();
    let mut silent = logs.stream("");
    let mut slow = logs.stream("c std");
    // Some more of it is no reason to wait for longer.
    logs.turn();
    slow.write_all(b"ou").unwrap();
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
    assert!(start.elapsed() >= wait);
    assert_closed(slow);
    named.write_all(b"late\n").unwrap();
    end(named);
    let log = std::fs::read(&path).unwrap();
    assert_eq!(content(&log, StreamKind::Stdout), b"late\n");
}

#[test]
fn streams_and_names_are_bounded() {
    let logs = Logs::new();
    logs.open("c", "0.log");
    let streams: Vec<_> = (0..MAX_STREAMS)
        .map(|_| logs.stream("c stdout\n"))
        .collect();
    assert!(matches!(
        logs.handle.connect(),
        Err(LogError::TooManyStreams)
    ));
    drop(streams);
    let start = Instant::now();
    while logs.handle.connect().is_err() {
        assert!(start.elapsed() < PATIENCE, "closed streams still count");
        thread::yield_now();
    }
    let file = || append(&logs.path("x"));
    for name in ["", "a/b", "a b", &"a".repeat(129)] {
        assert!(matches!(
            logs.handle.open(name, None, file()),
            Err(LogError::BadContainer(_))
        ));
    }
}
