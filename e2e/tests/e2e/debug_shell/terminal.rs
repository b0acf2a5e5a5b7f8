//! A shell on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, ensure};
use e2e::{Node, artifacts, eventually, patient};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

use super::{SOON, await_leases, with_shells};

/// A client whose terminal is ours.
struct Terminal {
    child: Child,
    keys: File,
    slave: OwnedFd,
    shown: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    fn open(node: &Node, pod: &str) -> Result<Self> {
        let size = Winsize {
            ws_row: 33,
            ws_col: 111,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None)?;
        let end = || Ok::<_, anyhow::Error>(Stdio::from(pty.slave.try_clone()?));
        // A session of its own, so that the terminal is its own as well.
        let mut command = Command::new("setsid");
        command
            .arg("--ctty")
            .arg(artifacts::daemon()?)
            .args(["debug", "--config"])
            .arg(node.config_file())
            .arg(pod);
        let command = command.stdin(end()?).stdout(end()?).stderr(end()?);
        let child = command.spawn().context("setsid")?;
        let keys = File::from(pty.master);
        let mut screen = keys.try_clone()?;
        let (sender, shown) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = screen.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            keys,
            slave: pty.slave,
            shown,
            seen: String::new(),
        })
    }

    fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.keys.write_all(keys.as_bytes())?)
    }

    /// Waits until this is shown, and forgets what came before.
    fn await_shown(&mut self, part: &str) -> Result<()> {
        loop {
            if let Some(at) = self.seen.find(part) {
                self.seen.drain(..at + part.len());
                return Ok(());
            }
            let more = self.shown.recv_timeout(patient(SOON));
            let more = more.with_context(|| format!("{part:?} is not in {:?}", self.seen))?;
            self.seen.push_str(&String::from_utf8_lossy(&more));
        }
    }

    fn is_raw(&self) -> Result<bool> {
        let flags = tcgetattr(self.slave.as_fd())?.local_flags;
        Ok(!flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO))
    }

    fn await_code(&mut self) -> Result<Option<i32>> {
        let status = eventually("the client to end", SOON, || {
            self.child.try_wait()?.context("it runs")
        })?;
        Ok(status.code())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // After its end both fail, and nothing is left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_terminal_has_its_size_and_its_keys() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("terminal")?;
        pod.start_idle("c")?;
        let mut terminal = Terminal::open(node, &pod.id)?;
        ensure!(!terminal.is_raw()?);
        terminal.await_shown("e2e/terminal")?;
        terminal.await_shown("# ")?;
        ensure!(terminal.is_raw()?);
        terminal.press("tty; echo $TERM; busybox stty size\r")?;
        terminal.await_shown("/dev/pts/")?;
        terminal.await_shown("xterm")?;
        terminal.await_shown("33 111")?;
        // It follows a window that changes.
        let follows = "trap 'busybox stty size' WINCH; echo se''t; while :; do sleep 1; done";
        // One without job control hears of it beside what it runs.
        terminal.press(&format!("sh -c \"{follows}\"\r"))?;
        terminal.await_shown("set")?;
        let resized = Command::new("stty")
            .args(["rows", "44", "cols", "122"])
            .stdin(Stdio::from(terminal.slave.try_clone()?))
            .status()?;
        ensure!(resized.success());
        terminal.await_shown("44 122")?;
        // The command's to hear of, not the client's.
        terminal.press("\x03")?;
        terminal.await_shown("# ")?;
        terminal.press("exit 5\r")?;
        assert_eq!(terminal.await_code()?, Some(5));
        ensure!(!terminal.is_raw()?, "it is left raw");
        await_leases(node, 1)
    })
}

#[test]
fn a_terminal_is_restored_when_its_client_is_ended() -> Result<()> {
    with_shells(|node| {
        let pod = node.run_pod("ended")?;
        pod.start_idle("c")?;
        let mut terminal = Terminal::open(node, &pod.id)?;
        terminal.await_shown("# ")?;
        ensure!(terminal.is_raw()?);
        let client = Pid::from_raw(i32::try_from(terminal.child.id())?);
        kill(client, Signal::SIGTERM)?;
        assert_eq!(terminal.await_code()?, Some(128 + 15));
        ensure!(!terminal.is_raw()?, "it is left raw");
        await_leases(node, 1)?;

        let mut terminal = Terminal::open(node, &pod.id)?;
        terminal.await_shown("# ")?;
        pod.stop()?;
        terminal.await_shown("the shell broke off")?;
        assert_eq!(terminal.await_code()?, Some(1));
        ensure!(!terminal.is_raw()?, "it is left raw");
        Ok(())
    })
}
