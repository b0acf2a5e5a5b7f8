//! A network namespace with a tap, as the daemon hands them to the VMM.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use agent_api::{Interface, Route};
use nix::sched::{CloneFlags, setns};

pub const MAC: [u8; 6] = [0x02, 0xd7, 0, 0, 1, 1];

pub struct Network {
    name: String,
}

/// What the guest's NIC is to be.
pub fn interface() -> Interface {
    let route = |destination: &str, gateway: &str| Route {
        destination: destination.into(),
        gateway: gateway.into(),
        ..Route::default()
    };
    Interface {
        name: "eth0".into(),
        mac: MAC.into(),
        mtu: 1400,
        addresses: vec!["10.231.8.5/24".into(), "fd07:231::5/64".into()],
        routes: vec![
            route("0.0.0.0/0", "10.231.8.1"),
            Route {
                onlink: true,
                ..route("198.51.100.0/24", "192.0.2.1")
            },
            Route {
                scope: 253,
                ..route("192.0.2.1/32", "")
            },
            route("::/0", "fd07:231::1"),
        ],
    }
}

impl Network {
    pub fn create() -> Self {
        let name = format!("drupe-agent-test-{}", std::process::id());
        ip(&["netns", "add", &name]);
        let network = Self { name };
        let on = |args: &[&str]| ip(&[&["-n", network.name.as_str()], args].concat());
        on(&["tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr"]);
        on(&["addr", "add", "10.231.8.1/24", "dev", "tap0"]);
        on(&["addr", "add", "fd07:231::1/64", "dev", "tap0", "nodad"]);
        on(&["link", "set", "tap0", "up"]);
        network
    }

    pub fn tap(&self) -> OwnedFd {
        let netns = File::open(Path::new("/run/netns").join(&self.name)).unwrap();
        // A thread of its own: it stays in the namespace.
        let tap = std::thread::spawn(move || {
            setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
            open_tap("tap0")
        });
        tap.join().unwrap()
    }

    pub fn ping(&self, address: &str) {
        let args = [
            "netns", "exec", &self.name, "busybox", "ping", "-c", "1", "-W", "5", address,
        ];
        ip(&args);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

fn open_tap(name: &str) -> OwnedFd {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    tun.into()
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(
        output.status.success(),
        "ip {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
