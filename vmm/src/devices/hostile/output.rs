//! Containers' output as a script wants it: any process of a guest may open
//! streams to the log thread and say anything there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_client::LogToken;

use super::Script;
use super::targets::{Ended, memory_file};
use crate::logs::framing::{Framer, MAX_CONTENT, StreamKind, content, decode};
use crate::logs::{LogHandle, LogService};

/// What the log thread may take to close a stream.
const PATIENCE: Duration = Duration::from_secs(20);
const ACTIONS: usize = 128;
/// Streams at once; the oldest is closed then.
const STREAMS: usize = 80;

const STAMP: &str = "2026-01-02T03:04:05.000000006Z";

/// How output is cut into reads makes no difference to its records, which give
/// it back byte by byte.
///
/// # Panics
///
/// When that is not so.
pub fn framing(mut script: Script<'_>) -> io::Result<Ended> {
    let mut output = Vec::new();
    let (mut framer, mut log) = (Framer::new(StreamKind::Stdout), Vec::new());
    let mut put = |piece: &[u8], framer: &mut Framer| {
        output.extend_from_slice(piece);
        framer.push(piece, STAMP, &mut log);
    };
    for _ in 0..ACTIONS {
        if script.is_over() {
            break;
        }
        let most = usize::from(script.byte());
        match script.byte() % 4 {
            0 => {
                let around = MAX_CONTENT - 4 + usize::from(script.byte() % 8);
                let long = vec![script.byte(); around];
                put(&long, &mut framer);
            }
            1 => put(b"\n", &mut framer),
            _ => put(script.bytes(most), &mut framer),
        }
    }
    framer.finish(STAMP, &mut log);
    let (mut whole, mut at_once) = (Framer::new(StreamKind::Stdout), Vec::new());
    whole.push(&output, STAMP, &mut at_once);
    whole.finish(STAMP, &mut at_once);
    assert!(log == at_once, "cuts show");
    assert!(content(&log, StreamKind::Stdout) == output, "bytes differ");
    for (_, _, record) in decode(&log) {
        assert!(record.len() <= MAX_CONTENT, "a record of {}", record.len());
    }
    Ok(None)
}

/// Streams of two containers and of nobody.
///
/// # Panics
///
/// When a log has what its container did not write.
pub fn logs(mut script: Script<'_>) -> io::Result<Ended> {
    let mut world = World::new()?;
    for _ in 0..ACTIONS {
        if script.is_over() {
            break;
        }
        world.act(&mut script)?;
    }
    world.end()?;
    Ok(None)
}

/// One container with a token that no script knows, one without any.
const GUARDED: &str = "guarded";
const OPEN: &str = "open";

struct World {
    logs: LogHandle,
    streams: Vec<UnixStream>,
    guarded: Vec<File>,
    /// What the guarded container has written.
    written: Vec<u8>,
    own: Option<UnixStream>,
}

impl World {
    fn new() -> io::Result<Self> {
        let logs = LogService::start(|| Ok(()))?;
        let mut random = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let token = LogToken::new(random);
        let mut world = Self {
            logs,
            streams: Vec::new(),
            guarded: Vec::new(),
            written: Vec::new(),
            own: None,
        };
        world.rotate(Some(token))?;
        world.open(OPEN, None)?;
        let mut own = world.connect()?;
        writeln!(own, "{GUARDED} stdout {token}")?;
        // The log thread has read it once it comes to this.
        world.logs.close("nobody").map_err(io::Error::other)?;
        world.own = Some(own);
        Ok(world)
    }

    fn open(&self, container: &str, token: Option<LogToken>) -> io::Result<File> {
        let file = memory_file(0)?;
        file.set_len(0)?;
        let log = file.try_clone()?;
        self.logs
            .open(container, token, log)
            .map_err(io::Error::other)?;
        Ok(file)
    }

    fn rotate(&mut self, token: Option<LogToken>) -> io::Result<()> {
        let file = self.open(GUARDED, token)?;
        self.guarded.push(file);
        Ok(())
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let stream = self.logs.connect().map_err(io::Error::other)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    fn act(&mut self, script: &mut Script<'_>) -> io::Result<()> {
        match script.byte() % 8 {
            0 => {
                let stream = self.connect()?;
                self.streams.push(stream);
                let surplus = self.streams.len().saturating_sub(STREAMS);
                self.streams.drain(..surplus);
            }
            1 => drop(self.streams.pop()),
            2 => self.rotate(None)?,
            3 => drop(self.open(OPEN, None)?),
            4 => {
                // Its own output, a line at a time.
                let most = usize::from(script.byte());
                let line: Vec<u8> = [script.bytes(most), b"\n"].concat();
                if let Some(own) = &mut self.own {
                    own.write_all(&line)?;
                    self.written.extend(line);
                }
            }
            5 => {
                let header = header(script);
                self.say(header.as_bytes(), script);
            }
            _ => {
                let most = usize::from(script.byte());
                let bytes = script.bytes(most).to_vec();
                self.say(&bytes, script);
            }
        }
        Ok(())
    }

    /// On any stream of the script's, which may have been closed.
    fn say(&mut self, bytes: &[u8], script: &mut Script<'_>) {
        let count = self.streams.len();
        if let Some(n) = usize::from(script.byte()).checked_rem(count) {
            let _ = self.streams[n].write_all(bytes);
        }
    }

    fn end(mut self) -> io::Result<()> {
        if let Some(mut own) = self.own.take() {
            own.shutdown(Shutdown::Write)?;
            assert_eq!(own.read(&mut [0])?, 0, "acknowledged");
        }
        self.streams.clear();
        self.logs.finish().map_err(io::Error::other)?;
        let mut log = Vec::new();
        for file in &self.guarded {
            let mut part = vec![0; file.metadata()?.len() as usize];
            file.read_exact_at(&mut part, 0)?;
            log.extend(part);
        }
        let got = content(&log, StreamKind::Stdout);
        assert!(got == self.written, "bytes differ");
        assert!(content(&log, StreamKind::Stderr).is_empty());
        Ok(())
    }
}

/// Nearly right ones.
fn header(script: &mut Script<'_>) -> String {
    let container = script.pick(&[OPEN, GUARDED, GUARDED, "other", ""]);
    let stream = script.pick(&["stdout", "stderr", "stdin", ""]);
    let token = match script.byte() % 4 {
        0 => String::new(),
        1 => format!(" {:032x}", script.long()),
        2 => format!(" {:030x}", script.long()),
        _ => format!(" {:032x} x", script.long()),
    };
    format!("{container} {stream}{token}\n")
}
