//! The host's end of the NIC: a tap whose packets carry a virtio-net header.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::HEADER;

/// TUNSETOFFLOAD flags (linux/if_tun.h).
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;
const TUN_F_UFO: u32 = 0x10;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

const WANTED: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

mod ioctl {
    nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF as libc::Ioctl, libc::ifreq);
    nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD as libc::Ioctl);
    nix::ioctl_write_ptr_bad!(tun_set_queue, libc::TUNSETQUEUE as libc::Ioctl, libc::ifreq);
    nix::ioctl_write_ptr_bad!(
        tun_set_vnet_hdr_sz,
        libc::TUNSETVNETHDRSZ as libc::Ioctl,
        libc::c_int
    );
}

#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("the tap descriptor is no attached tun device")]
    NoTun(#[source] io::Error),
    #[error("the tap has flags {flags:#x}, IFF_TAP, IFF_NO_PI and IFF_VNET_HDR are needed")]
    Flags { flags: i32 },
    #[error("{0} descriptors for queues of a tap, 1 to {MAX_QUEUES} are possible")]
    Queues(usize),
    #[error("several queues need a tap with IFF_MULTI_QUEUE, {name} has none")]
    SingleQueue { name: String },
    #[error("queues of two taps, {first} and {other}")]
    Different { first: String, other: String },
    #[error("cannot set up the tap")]
    Setup(#[source] io::Error),
}

/// The host has deleted the tap (or moved it away with its namespace).
#[derive(Debug, thiserror::Error)]
#[error("the tap {name} has gone")]
struct TapGone {
    name: String,
}

/// Queues of one tap: more than a guest has CPUs are of no use.
const MAX_QUEUES: usize = 32;

/// What of a packet's work its receiver takes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    pub checksum: bool,
    pub tso4: bool,
    pub tso6: bool,
    pub ufo: bool,
    pub uso4: bool,
    pub uso6: bool,
}

/// One queue of a tap.
pub struct Tap {
    file: File,
    name: String,
    multi_queue: bool,
    attached: bool,
}

impl Tap {
    pub fn new(file: File) -> Result<Self, TapError> {
        // SAFETY: all-zero bytes are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF fills in one ifreq.
        unsafe { ioctl::tun_get_iff(file.as_raw_fd(), &mut request) }
            .map_err(|e| TapError::NoTun(e.into()))?;
        // SAFETY: TUNGETIFF sets this member of the union.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & WANTED != WANTED {
            return Err(TapError::Flags { flags });
        }
        let name = request.ifr_name.iter().take_while(|&&c| c != 0);
        let name: Vec<u8> = name.map(|&c| c as u8).collect();
        let setup = |e: nix::Error| TapError::Setup(e.into());
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        unsafe { ioctl::tun_set_vnet_hdr_sz(file.as_raw_fd(), &size) }.map_err(setup)?;
        let status = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(setup)?;
        let status = OFlag::from_bits_retain(status) | OFlag::O_NONBLOCK;
        fcntl(file.as_fd(), FcntlArg::F_SETFL(status)).map_err(setup)?;
        Ok(Self {
            file,
            name: String::from_utf8_lossy(&name).into_owned(),
            multi_queue: flags & libc::IFF_MULTI_QUEUE != 0,
            attached: true,
        })
    }

    /// The queues of one tap; one descriptor may be of a tap without queues.
    pub fn queues(files: Vec<File>) -> Result<Vec<Self>, TapError> {
        if files.is_empty() || files.len() > MAX_QUEUES {
            return Err(TapError::Queues(files.len()));
        }
        let queues: Vec<Self> = files.into_iter().map(Self::new).collect::<Result<_, _>>()?;
        let first = &queues[0];
        for queue in &queues[1..] {
            if !queue.multi_queue {
                return Err(TapError::SingleQueue {
                    name: queue.name.clone(),
                });
            }
            if queue.name != first.name {
                return Err(TapError::Different {
                    first: first.name.clone(),
                    other: queue.name.clone(),
                });
            }
        }
        Ok(queues)
    }

    /// Whether the host steers packets to this queue. It has to be one of
    /// several.
    pub fn attach(&mut self, attached: bool) -> io::Result<()> {
        if attached == self.attached {
            return Ok(());
        }
        let flag = match attached {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        };
        // SAFETY: all-zero bytes are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one ifreq.
        unsafe { ioctl::tun_set_queue(self.file.as_raw_fd(), &request) }?;
        self.attached = attached;
        Ok(())
    }

    /// Which segments of UDP the host's tap knows; it has the other offloads
    /// for as long as there have been virtio-net headers. None is left on.
    pub fn probe(&self) -> Offloads {
        let takes = |offloads: Offloads| self.set_offloads(offloads).is_ok();
        let checksum = Offloads {
            checksum: true,
            ..Offloads::default()
        };
        let uso = takes(Offloads {
            uso4: true,
            uso6: true,
            ..checksum
        });
        let ufo = takes(Offloads {
            ufo: true,
            ..checksum
        });
        // What it cannot take it does not have on.
        let _ = self.set_offloads(Offloads::default());
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ufo,
            uso4: uso,
            uso6: uso,
        }
    }

    /// What the guest takes over for packets sent to it.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        // The host refuses segmentation without checksums.
        if offloads.checksum {
            flags |= TUN_F_CSUM;
            flags |= if offloads.tso4 { TUN_F_TSO4 } else { 0 };
            flags |= if offloads.tso6 { TUN_F_TSO6 } else { 0 };
            flags |= if offloads.ufo { TUN_F_UFO } else { 0 };
            // It knows both or neither.
            if offloads.uso4 && offloads.uso6 {
                flags |= TUN_F_USO4 | TUN_F_USO6;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        unsafe { ioctl::tun_set_offload(self.file.as_raw_fd(), flags as libc::c_int) }?;
        Ok(())
    }

    /// That the tap has gone, as what ends the machine.
    pub fn gone(&self) -> io::Error {
        io::Error::other(TapGone {
            name: self.name.clone(),
        })
    }

    /// Whether an error of reading or writing says so.
    pub fn is_gone(error: &io::Error) -> bool {
        error.raw_os_error() == Some(libc::EBADFD)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
