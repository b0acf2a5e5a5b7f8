//! One thread that serves some devices.
//!
//! Which devices share a loop is decided by what may block: net, vsock and
//! entropy never do and share one; disks and the shared directory call into
//! the host's file systems, which may wait, and have one each.
//!
//! Others reach a device through its [`DeviceRef`], by a closure that runs
//! inside the loop: a device is called on the loop's thread only, except for
//! what sets it up (features, configuration space, reset), which the guest's
//! processors also call, with the slot locked.

use std::any::Any;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::devices::{Device, Io, Poller};
use crate::transport::{SharedSlot, Slot, Transport};

/// Events taken from the kernel at once.
const BATCH: usize = 32;

/// What an epoll tag means: the slot's number times [`KINDS`] plus a kind.
const KINDS: u32 = 3;
const DEVICE: u32 = 0;
const TRANSPORT: u32 = 1;
const KICK: u32 = 2;
const WAKE: u32 = u32::MAX;

type Command = Box<dyn FnOnce() + Send>;

/// The loop was asked for something after it had ended.
#[derive(Debug, thiserror::Error)]
#[error("the device's event loop has ended")]
pub struct LoopEnded;

pub struct EventLoop {
    name: &'static str,
    epoll: Arc<Epoll>,
    slots: Vec<(SharedSlot, Box<dyn Transport>)>,
    handle: Handle,
    commands: Receiver<Command>,
}

#[derive(Clone)]
struct Handle {
    wake: Arc<EventFd>,
    commands: Sender<Command>,
}

/// A device of type `D` inside its loop.
pub struct DeviceRef<D> {
    handle: Handle,
    slot: SharedSlot,
    device: PhantomData<fn(D)>,
}

impl<D> Clone for DeviceRef<D> {
    fn clone(&self) -> Self {
        Self {
            handle: self.handle.clone(),
            slot: self.slot.clone(),
            device: PhantomData,
        }
    }
}

impl<D: Device> DeviceRef<D> {
    /// Runs `call` on the device inside its loop, later. The call must not
    /// block for longer than the device itself may.
    pub fn post(
        &self,
        call: impl FnOnce(&mut D, &mut Io<'_>) + Send + 'static,
    ) -> Result<(), LoopEnded> {
        let slot = self.slot.clone();
        let command: Command = Box::new(move || {
            slot.lock().with(|device, io| {
                let device: &mut dyn Any = device;
                // Always so: the reference was made with the slot's device.
                if let Some(device) = device.downcast_mut() {
                    call(device, io);
                }
            });
        });
        self.handle.commands.send(command).map_err(|_| LoopEnded)?;
        self.handle.wake.write(1).map_err(|_| LoopEnded)?;
        Ok(())
    }

    /// The device's slot, for a driver that is not inside the loop.
    pub fn slot(&self) -> SharedSlot {
        self.slot.clone()
    }
}

impl EventLoop {
    pub fn new(name: &'static str) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let wake = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        Poller::new(epoll.clone(), WAKE).add(&*wake, 0, EpollFlags::EPOLLIN)?;
        let (sender, commands) = channel();
        Ok(Self {
            name,
            epoll,
            slots: Vec::new(),
            handle: Handle {
                wake,
                commands: sender,
            },
            commands,
        })
    }

    /// Adds a device; `label` names it in errors.
    pub fn add<D: Device>(
        &mut self,
        label: impl Into<String>,
        mut device: D,
        mut transport: Box<dyn Transport>,
    ) -> io::Result<DeviceRef<D>> {
        let index = self.slots.len();
        let base = u32::try_from(index).map_err(io::Error::other)? * KINDS;
        let poller = |kind| Poller::new(self.epoll.clone(), base + kind);
        device.start(poller(DEVICE))?;
        transport.start(poller(TRANSPORT))?;
        let slot = Slot::new(label.into(), Box::new(device), &*transport, poller(KICK))?;
        let slot = SharedSlot::new(slot);
        self.slots.push((slot.clone(), transport));
        Ok(DeviceRef {
            handle: self.handle.clone(),
            slot,
            device: PhantomData,
        })
    }

    /// Runs on a thread of its own, which begins by `confine`, until a device or
    /// its driver fails beyond repair; then tells `failed` why.
    pub fn spawn(
        mut self,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
        failed: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<()> {
        thread::Builder::new()
            .name(self.name.into())
            .spawn(move || {
                let confined =
                    confine().map_err(|e| format!("{} loop: confine it: {e}", self.name));
                if let Err(reason) = confined.and_then(|()| self.run()) {
                    failed(reason);
                }
            })?;
        Ok(())
    }

    fn run(&mut self) -> Result<(), String> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(format!("{} loop: {e}", self.name)),
            };
            for event in &events[..ready] {
                let (tag, token) = split(event.data());
                if tag == WAKE {
                    self.run_commands();
                    continue;
                }
                let Some((slot, transport)) = self.slots.get_mut((tag / KINDS) as usize) else {
                    continue;
                };
                let mut slot = slot.lock();
                let result = match tag % KINDS {
                    DEVICE => slot.with(|device, io| device.host_ready(token, event.events(), io)),
                    TRANSPORT => transport.ready(token, &mut slot),
                    _ => slot.kick_ready(token),
                };
                result.map_err(|e| format!("device {}: {e}", slot.label()))?;
            }
        }
    }

    fn run_commands(&mut self) {
        // Spurious at worst: the commands are what counts.
        let _ = self.handle.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            command();
        }
    }
}

fn split(data: u64) -> (u32, u32) {
    ((data >> 32) as u32, data as u32)
}
