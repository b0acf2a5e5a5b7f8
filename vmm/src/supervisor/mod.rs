//! The main thread once the machine runs: PID 1 of the pod's VMM.
//!
//! ```text
//! Booting ── agent connects to the ready port ──▶ Ready
//!    └──── guest ends, device fails, kill ────┬─────┘
//!                                             ▼
//!                     Ended: told to subscribers; the process exits
//! ```
//! It reaps, keeps the console, answers the control protocol, and never
//! waits for an event loop: answers from there come back as [`Notice`]s.

mod clients;
mod notice;

use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use vmm_client::protocol::{EndCause, Event, Reply, Request, Status, VmState};

use self::clients::{ClientId, Clients, Said};
pub use self::notice::{Notice, Notices, Notifier, notices};
use crate::console::Console;
use crate::devices::balloon::Balloon;
use crate::devices::blk::Blk;
use crate::devices::{Device, Io};
use crate::event_loop::DeviceRef;
use crate::filter::trap::Traps;
use crate::filter::{Confine, Refusals, Refused, Role};
use crate::logs::{LogError, LogHandle};
use crate::machine::{Ending, Machine, Started};

const SIGNALS: u64 = 0;
const CONSOLE: u64 = 1;
const WAKE: u64 = 2;
const REFUSALS: u64 = 3;
const TRAPS: u64 = 4;
const LISTENER: u64 = 5;

/// Read from the console at once.
const CONSOLE_CHUNK: usize = 16 * 1024;
/// Read from it after the guest has ended: what the pipe can hold and a bit.
const CONSOLE_REST: usize = 128 * 1024;

/// What the supervisor watches over.
pub struct Parts {
    /// When the VMM was executed.
    pub since: Instant,
    pub jailed_us: u64,
    /// How this thread takes its filter.
    pub confine: Confine,
    pub traps: Traps,
    pub control: OwnedFd,
    pub console: Console,
    pub notices: Notices,
    pub notifier: Notifier,
    pub logs: LogHandle,
    /// Disk slots by number.
    pub disks: Vec<DeviceRef<Blk>>,
    pub balloon: DeviceRef<Balloon>,
}

pub struct Supervisor {
    epoll: Epoll,
    confine: Confine,
    traps: Traps,
    signals: SignalFd,
    machine: Box<dyn Machine>,
    pipe: Option<PipeReader>,
    refusals: Option<Refusals>,
    refused: Vec<String>,
    console: Console,
    clients: Clients,
    notices: Notices,
    notifier: Notifier,
    logs: LogHandle,
    disks: Vec<DeviceRef<Blk>>,
    balloon: DeviceRef<Balloon>,
    since: Instant,
    status: Status,
}

/// Blocks the signals that the supervisor reads; to be called before any
/// thread exists, so that all inherit it.
pub fn block_signals() -> io::Result<SignalFd> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        mask.add(signal);
    }
    mask.thread_block()?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok(SignalFd::with_flags(&mask, flags)?)
}

impl Supervisor {
    pub fn new(signals: SignalFd, parts: Parts, started: Started) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let watch = |fd: &dyn AsFd, datum| {
            epoll.add(fd.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, datum))
        };
        let pipe = started.console;
        let flags = OFlag::from_bits_retain(fcntl(&pipe, FcntlArg::F_GETFL)?);
        fcntl(&pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        watch(&signals, SIGNALS)?;
        watch(&pipe, CONSOLE)?;
        watch(&*parts.notices.wake, WAKE)?;
        watch(&parts.traps, TRAPS)?;
        if let Some(refusals) = &started.refusals {
            watch(refusals, REFUSALS)?;
        }
        let clients = Clients::new(parts.control, &epoll)?;
        Ok(Self {
            clients,
            epoll,
            confine: parts.confine,
            traps: parts.traps,
            signals,
            machine: started.machine,
            pipe: Some(pipe),
            refusals: started.refusals,
            refused: Vec::new(),
            console: parts.console,
            notices: parts.notices,
            notifier: parts.notifier,
            logs: parts.logs,
            disks: parts.disks,
            balloon: parts.balloon,
            status: Status {
                state: VmState::Booting,
                jailed_us: Some(parts.jailed_us),
                machine_started_us: Some(microseconds(parts.since)),
                guest_ready_us: None,
                log_tokens: true,
            },
            since: parts.since,
        })
    }

    /// Serves until the machine has ended and the subscribers know.
    pub fn run(mut self) -> io::Result<()> {
        (self.confine)(Role::Supervisor)?;
        let ending = loop {
            match self.step() {
                Ok(None) => {}
                Ok(Some(ending)) => break ending,
                Err(error) => break Ending::fault(format!("the supervisor: {error}")),
            }
        };
        // Of a call that was refused, what else has come is the consequence.
        let trapped = self.traps.take()?.map(Ending::fault);
        let Ending { mut cause, reason } = trapped.unwrap_or(ending);
        self.machine.kill();
        self.read_console(CONSOLE_REST)?;
        if let Err(error) = self.logs.finish() {
            tracing::warn!(error = chain(&error), "container logs may lack their end");
        }
        // What comes of a panic is a switch-off or a signal. A guest that was
        // killed may have said what it likes.
        if cause != EndCause::Killed && self.console.panic_reason().is_some() {
            cause = EndCause::GuestPanic;
        }
        let reason = self.report(&reason);
        tracing::info!(reason, ?cause, "machine ended");
        self.status.state = VmState::Ended { reason, cause };
        let event = Event::State(self.status.clone());
        self.clients.broadcast(&event, &self.epoll)
    }

    /// Handles what is ready; `Some` ends the machine.
    fn step(&mut self) -> io::Result<Option<Ending>> {
        let mut events = [EpollEvent::empty(); 16];
        // Rounded up, so as not to wake too early again and again.
        let patience = match self.clients.patience() {
            Some(left) => EpollTimeout::try_from(left + Duration::from_millis(1)),
            None => Ok(EpollTimeout::NONE),
        };
        let patience = patience.unwrap_or(EpollTimeout::ZERO);
        let ready = match self.epoll.wait(&mut events, patience) {
            Err(Errno::EINTR) => return Ok(None),
            other => other?,
        };
        self.clients.resume(&self.epoll)?;
        for event in &events[..ready] {
            let ended = match event.data() {
                SIGNALS => self.take_signals()?,
                CONSOLE => {
                    self.read_console(CONSOLE_CHUNK)?;
                    // A machine without a power switch runs on, doing nothing.
                    let halted = self.console.halted();
                    halted.then(Ending::powered_off)
                }
                WAKE => self.take_notices()?,
                REFUSALS => {
                    self.take_refusal(event.events())?;
                    None
                }
                TRAPS => self.traps.take()?.map(Ending::fault),
                LISTENER => {
                    self.clients.accept(&self.epoll)?;
                    None
                }
                client => self.take_request(client)?,
            };
            if ended.is_some() {
                return Ok(ended);
            }
        }
        Ok(None)
    }

    fn take_signals(&mut self) -> io::Result<Option<Ending>> {
        let mut asked = None;
        while let Some(info) = self.signals.read_signal()? {
            match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => {}
                Ok(signal) => {
                    asked = Some(Ending::killed(format!("the VMM was ended by {signal}")));
                }
                Err(_) => {}
            }
        }
        let mut ended = None;
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(ended.or(asked)),
                Ok(status) => ended = ended.or(self.machine.child_ended(status)),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn read_console(&mut self, most: usize) -> io::Result<()> {
        let mut chunk = [0; CONSOLE_CHUNK];
        let mut left = most;
        while left > 0
            && let Some(pipe) = &mut self.pipe
        {
            let want = left.min(chunk.len());
            match pipe.read(&mut chunk[..want]) {
                Ok(0) => {
                    self.epoll.delete(&*pipe)?;
                    self.pipe = None;
                }
                Ok(len) => {
                    self.console.take(&chunk[..len]);
                    left -= len;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// One at a time: a guest cannot keep us from the rest. What is refused is
    /// shown among the kernel's own words too, since they may be all that is
    /// left of a guest that does not come up.
    fn take_refusal(&mut self, told: EpollFlags) -> io::Result<()> {
        let Some(refusals) = &mut self.refusals else {
            return Ok(());
        };
        match refusals.answer(told) {
            Ok(Refused::First(call)) => {
                tracing::warn!(call, "the guest kernel's process was refused a system call");
                let line = format!("\ndrupe-vmm: the node refuses this kernel {call}\n");
                self.console.take(line.as_bytes());
                self.refused.push(call);
                return Ok(());
            }
            Ok(Refused::Again) => return Ok(()),
            Ok(Refused::Enough) => {}
            // Without a listener the node's kernel refuses by itself.
            Err(error) => tracing::warn!(%error, "refused system calls are not told any more"),
        }
        self.epoll.delete(refusals)?;
        self.refusals = None;
        Ok(())
    }

    fn take_notices(&mut self) -> io::Result<Option<Ending>> {
        // Spurious at worst: the notices are what counts.
        let _ = self.notices.wake.read();
        while let Some(notice) = self.notices.take() {
            match notice {
                Notice::Ended(ending) => return Ok(Some(ending)),
                Notice::Answer(client, reply) => {
                    self.clients.answer(client, &reply, &self.epoll)?;
                }
                Notice::GuestReady if self.status.state == VmState::Booting => {
                    if let Some(ending) = self.machine.guest_ready() {
                        return Ok(Some(ending));
                    }
                    self.status.state = VmState::Ready;
                    self.status.guest_ready_us = Some(microseconds(self.since));
                    let event = Event::State(self.status.clone());
                    self.clients.broadcast(&event, &self.epoll)?;
                }
                Notice::GuestReady => {}
            }
        }
        Ok(None)
    }

    fn take_request(&mut self, client: ClientId) -> io::Result<Option<Ending>> {
        let Said::Request(request, fds) = self.clients.read(client, &self.epoll)? else {
            return Ok(None);
        };
        let reply = match request {
            Request::Status => Some(Reply::Status(self.status.clone())),
            Request::Subscribe => {
                self.clients.subscribe(client);
                let event = Event::State(self.status.clone());
                self.clients.answer(client, &event, &self.epoll)?;
                None
            }
            Request::AttachDisk { slot } => self.attach(client, slot, fds),
            Request::AttachDevice { slot, read_only } => match <[OwnedFd; 1]>::try_from(fds) {
                Ok([device]) => self.attach_device(client, slot, device, read_only),
                Err(fds) => Some(Reply::Error {
                    message: format!("attach-device with {} descriptors, one belongs", fds.len()),
                }),
            },
            Request::DetachDisk { slot } => self.detach(client, slot),
            Request::OpenLog { container, token } => match <[OwnedFd; 1]>::try_from(fds) {
                Ok([fd]) => {
                    self.on_logs(client, move |logs| logs.open(&container, token, fd.into()))
                }
                Err(fds) => Some(Reply::Error {
                    message: format!("open-log with {} descriptors, one belongs", fds.len()),
                }),
            },
            Request::CloseLog { container } => {
                self.on_logs(client, move |logs| logs.close(&container))
            }
            Request::SetBalloon { mib } => {
                self.on_device(client, &self.balloon, move |balloon, io| {
                    balloon.set_target(u64::from(mib) << 20, io);
                    Ok(())
                })
            }
            Request::Kill => {
                self.clients.answer(client, &Reply::Ok, &self.epoll)?;
                return Ok(Some(Ending::killed("the machine was killed on request")));
            }
        };
        if let Some(reply) = reply {
            self.clients.answer(client, &reply, &self.epoll)?;
        }
        Ok(None)
    }

    /// `None` when the answer comes as a notice.
    fn attach(&self, client: ClientId, slot: u32, fds: Vec<OwnedFd>) -> Option<Reply> {
        self.on_disk(client, slot, move |disk, io| {
            let files = fds.into_iter().map(Into::into).collect();
            disk.attach(files, io)
                .map_err(|e| format!("disk slot {slot}: {}", chain(&e)))
        })
    }

    /// `None` when the answer comes as a notice.
    fn attach_device(
        &self,
        client: ClientId,
        slot: u32,
        device: OwnedFd,
        read_only: bool,
    ) -> Option<Reply> {
        self.on_disk(client, slot, move |disk, io| {
            disk.attach_device(device.into(), read_only, io)
                .map_err(|e| format!("disk slot {slot}: {}", chain(&e)))
        })
    }

    fn detach(&self, client: ClientId, slot: u32) -> Option<Reply> {
        self.on_disk(client, slot, |disk, io| {
            disk.detach(io);
            Ok(())
        })
    }

    fn on_disk(
        &self,
        client: ClientId,
        slot: u32,
        call: impl FnOnce(&mut Blk, &Io<'_>) -> Result<(), String> + Send + 'static,
    ) -> Option<Reply> {
        let Some(disk) = self.disks.get(slot as usize) else {
            let message = format!("no disk slot {slot}, there are {}", self.disks.len());
            return Some(Reply::Error { message });
        };
        self.on_device(client, disk, call)
    }

    /// `None` when the answer comes as a notice.
    fn on_device<D: Device>(
        &self,
        client: ClientId,
        device: &DeviceRef<D>,
        call: impl FnOnce(&mut D, &Io<'_>) -> Result<(), String> + Send + 'static,
    ) -> Option<Reply> {
        let notifier = self.notifier.clone();
        let posted = device.post(move |device, io| {
            let reply = match call(device, io) {
                Ok(()) => Reply::Ok,
                Err(message) => Reply::Error { message },
            };
            notifier.send(Notice::Answer(client, reply));
        });
        posted.err().map(|e| Reply::Error {
            message: e.to_string(),
        })
    }

    /// The log thread may wait for a disk, so a thread of its own waits for
    /// it; there are no more of them than clients.
    fn on_logs(
        &self,
        client: ClientId,
        call: impl FnOnce(&LogHandle) -> Result<(), LogError> + Send + 'static,
    ) -> Option<Reply> {
        let (logs, notifier) = (self.logs.clone(), self.notifier.clone());
        let spawned = std::thread::Builder::new()
            .name("log-request".into())
            .spawn(move || {
                let reply = match call(&logs) {
                    Ok(()) => Reply::Ok,
                    Err(e) => Reply::Error { message: chain(&e) },
                };
                notifier.send(Notice::Answer(client, reply));
            });
        spawned.err().map(|e| Reply::Error {
            message: format!("cannot start a thread: {e}"),
        })
    }

    /// `reason` with what the guest last said.
    fn report(&self, reason: &str) -> String {
        let mut report = match self.console.panic_reason() {
            Some(panic) => format!("{reason} (kernel panic: {panic})"),
            None => reason.to_owned(),
        };
        if !self.refused.is_empty() {
            report += &format!(" (the node refused it {})", self.refused.join(", "));
        }
        let lines = self.console.last_lines();
        if !lines.is_empty() {
            report += "; the last lines of its console:\n";
            report += &lines.join("\n");
        }
        report
    }
}

/// An error with its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

pub fn microseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
