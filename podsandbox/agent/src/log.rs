//! What code that the agent shares with the supervisor of pods on the host's
//! kernel has to say. The agent's is the guest's console; a supervisor takes it
//! to its own log. A `tracing` subscriber would do, and take a quarter of a MiB
//! of every pod.

use std::fmt;
use std::sync::OnceLock;

/// Takes one line.
pub type Sink = fn(fmt::Arguments<'_>);

static SINK: OnceLock<Sink> = OnceLock::new();

/// From here on lines go to `sink` instead of standard error; the first one
/// that is named stays.
pub fn tell_to(sink: Sink) {
    SINK.get_or_init(|| sink);
}

/// Something went wrong that nobody waits to hear of.
pub(crate) fn warn(what: fmt::Arguments<'_>) {
    match SINK.get() {
        Some(sink) => sink(what),
        None => eprintln!("drupe-agent: {what}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

    #[test]
    fn lines_go_where_they_are_told_to() {
        tell_to(|what| LINES.lock().unwrap().push(what.to_string()));
        warn(format_args!("port {}: closed", 80));
        let lines = LINES.lock().unwrap();
        assert!(
            lines.iter().any(|line| line == "port 80: closed"),
            "{lines:?}"
        );
    }
}
