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

const WANTED: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

mod ioctl {
    nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF as libc::Ioctl, libc::ifreq);
    nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD as libc::Ioctl);
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
    #[error("cannot set up the tap")]
    Setup(#[source] io::Error),
}

/// What of a packet's work its receiver takes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    pub checksum: bool,
    pub tso4: bool,
    pub tso6: bool,
}

pub struct Tap(File);

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
        let setup = |e: nix::Error| TapError::Setup(e.into());
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        unsafe { ioctl::tun_set_vnet_hdr_sz(file.as_raw_fd(), &size) }.map_err(setup)?;
        let status = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(setup)?;
        let status = OFlag::from_bits_retain(status) | OFlag::O_NONBLOCK;
        fcntl(file.as_fd(), FcntlArg::F_SETFL(status)).map_err(setup)?;
        Ok(Self(file))
    }

    /// What the guest takes over for packets sent to it.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        // The host refuses segmentation without checksums.
        if offloads.checksum {
            flags |= TUN_F_CSUM;
            flags |= if offloads.tso4 { TUN_F_TSO4 } else { 0 };
            flags |= if offloads.tso6 { TUN_F_TSO6 } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        unsafe { ioctl::tun_set_offload(self.0.as_raw_fd(), flags as libc::c_int) }?;
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
