//! The tap device that carries a pod's packets to and from its VMM.

use std::{
    fs::OpenOptions,
    io,
    num::NonZeroU32,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use rtnetlink::LinkUnspec;

use crate::{
    error::NetnsError,
    namespace::Netns,
    netlink::{Links, check_interface_name},
};

const TUN_DEVICE: &str = "/dev/net/tun";

mod ioctl {
    nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
    nix::ioctl_write_int_bad!(tun_set_owner, libc::TUNSETOWNER);
}

/// Makes the tap `name` in `netns`. It is down, and takes no packets, until
/// [`redirect`](crate::redirect) has told where they go.
///
/// It has `queues` queues and as many descriptors: non-blocking, of type
/// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` if they are
/// several; header size and offloads are left to who reads them. The tap is not
/// persistent: it goes with the last copy of a descriptor. `owner` may open its
/// queues again without a capability.
///
/// The namespace's own stack does not speak on it: IPv6 is off and ARP is
/// neither sent nor answered.
pub async fn create_tap(
    netns: &Netns,
    name: &str,
    owner: u32,
    queues: NonZeroU32,
) -> Result<Vec<OwnedFd>, NetnsError> {
    check_interface_name(name)?;
    let name = name.to_owned();
    let path = netns.path().to_owned();
    netns
        .run(move || async move {
            let taps = open_queues(&name, owner, queues).map_err(|source| NetnsError::File {
                action: "make a tap with",
                path: TUN_DEVICE.into(),
                source,
            })?;
            set_sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
            let links = Links::connect(&path)?;
            let index = links.find(&name).await?.header.index;
            links
                .set(&name, LinkUnspec::new_with_index(index).arp(false).build())
                .await?;
            Ok(taps)
        })
        .await
}

fn open_queues(name: &str, owner: u32, queues: NonZeroU32) -> io::Result<Vec<OwnedFd>> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues.get() > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // The first makes the tap, and finds none of that name.
    let first = open_queue(name, flags | libc::IFF_TUN_EXCL)?;
    // SAFETY: the descriptor is open; the argument is a number, no pointer.
    unsafe { ioctl::tun_set_owner(first.as_raw_fd(), owner.cast_signed()) }?;
    let others = (1..queues.get()).map(|_| open_queue(name, flags));
    std::iter::once(Ok(first)).chain(others).collect()
}

fn open_queue(name: &str, flags: i32) -> io::Result<OwnedFd> {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN_DEVICE)?;
    // SAFETY: ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name was checked to be shorter than the field: a zero remains.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // The flags field is a short whose bits matter, not its sign.
    request.ifr_ifru.ifru_flags = (flags & 0xffff) as libc::c_short;
    // SAFETY: the descriptor is open and `request` is a valid ifreq that
    // outlives the call.
    unsafe { ioctl::tun_set_iff(tap.as_raw_fd(), &raw const request) }?;
    Ok(tap.into())
}

/// Sets a kernel parameter of the namespace that this thread is in. A kernel
/// without that parameter (IPv6 compiled out or off) has nothing to set.
pub(crate) fn set_sysctl(name: &str, value: &str) -> Result<(), NetnsError> {
    let path = Path::new("/proc/sys").join(name);
    match std::fs::write(&path, value) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(NetnsError::File {
            action: "write",
            path,
            source,
        }),
        _ => Ok(()),
    }
}
