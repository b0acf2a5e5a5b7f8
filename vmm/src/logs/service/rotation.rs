//! Log rotation: a new file in place of an old one, between two lines.

use std::sync::mpsc::Sender;
use std::time::Instant;

use vmm_client::LogToken;

use super::{Log, LogFile, Service, State, body};
use crate::logs::LogError;

/// A file being replaced, while lines begun in it are not ended.
pub(super) struct OldFile {
    pub(super) file: LogFile,
    /// Streams in the middle of a line.
    unfinished: usize,
    pub(super) deadline: Instant,
    reply: Sender<Result<(), LogError>>,
}

impl Service {
    /// Puts `file` in place of the one that `container`'s log has; `reply` once
    /// the old one gets no more bytes.
    pub(super) fn rotate(
        &mut self,
        container: &str,
        token: Option<LogToken>,
        file: LogFile,
        reply: Sender<Result<(), LogError>>,
    ) {
        self.end_rotation(container);
        let Some(log) = self.logs.get_mut(container) else {
            return;
        };
        log.closing = false;
        log.token = token.or(log.token);
        let old = std::mem::replace(&mut log.file, file);
        let mut unfinished = 0;
        for (_, stream) in &mut self.streams {
            if let State::Body {
                container: of,
                framer,
                in_old,
            } = &mut stream.state
                && of == container
                && framer.mid_line()
            {
                *in_old = true;
                unfinished += 1;
            }
        }
        if unfinished == 0 {
            drop(old);
            let _ = reply.send(Ok(()));
        } else {
            log.old = Some(OldFile {
                file: old,
                unfinished,
                deadline: Instant::now() + self.rotation_wait,
                reply,
            });
        }
    }

    /// A stream has nothing more to write to the old file of its log.
    pub(super) fn left_old(&mut self, key: usize) {
        if let Some((log, _, in_old)) = body(&mut self.streams, &mut self.logs, key)
            && *in_old
        {
            *in_old = false;
            if let Some(old) = &mut log.old {
                old.unfinished -= 1;
                if old.unfinished == 0 {
                    retire(log);
                }
            }
        }
    }

    pub(super) fn end_overdue_rotations(&mut self) {
        let now = Instant::now();
        let overdue: Vec<String> = self
            .logs
            .iter()
            .filter(|(_, log)| log.old.as_ref().is_some_and(|old| old.deadline <= now))
            .map(|(container, _)| container.clone())
            .collect();
        for container in overdue {
            self.end_rotation(&container);
        }
    }

    /// Ends a rotation at once: lines go on in the new file.
    fn end_rotation(&mut self, container: &str) {
        for (_, stream) in &mut self.streams {
            if let State::Body {
                container: of,
                in_old,
                ..
            } = &mut stream.state
                && of == container
            {
                *in_old = false;
            }
        }
        if let Some(log) = self.logs.get_mut(container) {
            retire(log);
        }
    }
}

/// Closes the old file and tells who asked for the rotation.
fn retire(log: &mut Log) {
    if let Some(old) = log.old.take() {
        drop(old.file);
        let _ = old.reply.send(Ok(()));
    }
}
