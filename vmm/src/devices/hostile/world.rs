//! A thread with namespaces of its own, for devices that need some of the
//! host around them.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::Script;
use super::targets::Ended;

/// Ends, with all that its namespaces hold, when it is dropped.
pub struct World {
    scripts: Sender<(Vec<u8>, bool)>,
    outcomes: Receiver<io::Result<Ended>>,
}

impl World {
    /// `enter` moves the thread, then `run` plays each script.
    pub(super) fn new(
        enter: fn() -> io::Result<()>,
        run: fn(Script<'_>) -> io::Result<Ended>,
    ) -> io::Result<Self> {
        let (scripts, todo) = channel::<(Vec<u8>, bool)>();
        let (done, outcomes) = channel();
        thread::Builder::new().spawn(move || {
            let entered = enter();
            let failed = entered.is_err();
            if done.send(entered.map(|()| None)).is_err() || failed {
                return;
            }
            for (script, racing) in todo {
                let script = match racing {
                    true => Script::racing(&script),
                    false => Script::new(&script),
                };
                if done.send(run(script)).is_err() {
                    return;
                }
            }
        })?;
        let world = Self { scripts, outcomes };
        world.outcome()?;
        Ok(world)
    }

    /// # Panics
    ///
    /// When the device did, which its own message says more about.
    pub fn play(&self, script: &[u8]) -> io::Result<Ended> {
        self.send(script, false)
    }

    /// As [`Script::racing`].
    ///
    /// # Panics
    ///
    /// When the device did.
    pub fn race(&self, script: &[u8]) -> io::Result<Ended> {
        self.send(script, true)
    }

    fn send(&self, script: &[u8], racing: bool) -> io::Result<Ended> {
        // A thread that has ended has no outcome either.
        let _ = self.scripts.send((script.to_vec(), racing));
        self.outcome()
    }

    fn outcome(&self) -> io::Result<Ended> {
        match self.outcomes.recv() {
            Ok(outcome) => outcome,
            Err(_) => panic!("the device's thread panicked"),
        }
    }
}
