//! What the daemon hands over when it starts the VMM: the spec and its
//! descriptors come as one message on standard input, and the answer goes
//! back the same way. Afterwards nothing ties the VMM to the daemon.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::unistd::dup2_stdin;
use vmm_client::protocol::Reply;
use vmm_client::{FdRole, Machine, UmlMode, VmSpec, packet as sender};

use crate::packet;

const VCPUS_MAX: u32 = 32;
/// Less cannot hold the kernel, the initramfs and its unpacked files.
const MEMORY_MIN_MIB: u32 = 32;
/// Each slot is a device that the guest probes at boot.
const SLOTS_MAX: u32 = 256;
const CONSOLE_LIMIT: std::ops::RangeInclusive<u64> = 4096..=64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    #[error("standard input carries no VM spec")]
    Receive(#[source] io::Error),
    #[error("standard input was closed before a VM spec came")]
    Closed,
    #[error("the spec names {roles} descriptors, {fds} came with it")]
    FdCount { roles: usize, fds: usize },
    #[error("the spec names descriptor {role:?} twice")]
    Twice { role: FdRole },
    #[error("the spec lacks descriptor {role:?}")]
    Missing { role: FdRole },
    #[error("{field} is {value}, {allowed} is allowed")]
    Value {
        field: &'static str,
        value: u64,
        allowed: &'static str,
    },
    #[error("a network needs both a MAC address and a tap")]
    Network,
    #[error("the machine is {machine:?}, /dev/kvm belongs to kvm and only there")]
    Kvm { machine: Machine },
    #[error("cannot answer the daemon")]
    Answer(#[source] io::Error),
}

/// The descriptors of a spec by their roles.
#[derive(Debug)]
pub struct Fds {
    pub kernel: OwnedFd,
    pub initramfs: OwnedFd,
    /// Its queues; none in a pod without a network.
    pub tap: Vec<File>,
    pub control_groups: Vec<OwnedFd>,
    pub console: File,
    pub control: OwnedFd,
    pub vsock: UnixListener,
    pub scratch: Option<File>,
    /// There exactly when the machine is kvm.
    pub kvm: Option<OwnedFd>,
}

/// The socket on which the daemon waits for the start's outcome.
#[derive(Debug)]
pub struct Answer(OwnedFd);

impl Answer {
    pub fn from_stdin() -> Result<Self, HandoffError> {
        Ok(Self(take_stdin().map_err(HandoffError::Receive)?))
    }

    pub fn receive(&self) -> Result<(VmSpec, Fds), HandoffError> {
        let (spec, fds) = packet::recv::<VmSpec>(&self.0)
            .map_err(HandoffError::Receive)?
            .ok_or(HandoffError::Closed)?;
        check(&spec)?;
        let fds = sort(&spec, fds)?;
        Ok((spec, fds))
    }

    /// Tells the daemon how the start went, and lets go of it.
    pub fn send(self, outcome: &Reply) -> Result<(), HandoffError> {
        sender::send(&self.0, outcome, &[]).map_err(HandoffError::Answer)
    }
}

/// Takes standard input, which stays as /dev/null.
pub(crate) fn take_stdin() -> io::Result<OwnedFd> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let null = File::open("/dev/null")?;
    dup2_stdin(&null)?;
    Ok(socket)
}

fn check(spec: &VmSpec) -> Result<(), HandoffError> {
    let bounds = |field, value, ok, allowed| match ok {
        true => Ok(()),
        false => Err(HandoffError::Value {
            field,
            value,
            allowed,
        }),
    };
    let ptrace = spec.machine == Machine::Uml(UmlMode::Ptrace);
    let vcpus = u64::from(spec.vcpus);
    bounds(
        "vcpus",
        vcpus,
        (1..=VCPUS_MAX).contains(&spec.vcpus),
        "1 to 32",
    )?;
    bounds("vcpus", vcpus, !ptrace || vcpus == 1, "1 in ptrace mode")?;
    bounds(
        "memory_mib",
        spec.memory_mib.into(),
        spec.memory_mib >= MEMORY_MIN_MIB,
        "32 or more",
    )?;
    bounds(
        "image_slots",
        spec.image_slots.into(),
        spec.image_slots <= SLOTS_MAX,
        "up to 256",
    )?;
    bounds(
        "console_limit_bytes",
        spec.console_limit_bytes,
        CONSOLE_LIMIT.contains(&spec.console_limit_bytes),
        "4 KiB to 64 MiB",
    )?;
    for (field, id) in [("uid", spec.uid), ("gid", spec.gid)] {
        bounds(
            field,
            id.into(),
            id != 0 && id != u32::MAX,
            "any but root's",
        )?;
    }
    let has_tap = spec.fds.contains(&FdRole::Tap);
    if spec.mac.is_some() != has_tap {
        return Err(HandoffError::Network);
    }
    let machine = spec.machine;
    if (machine == Machine::Kvm) != spec.fds.contains(&FdRole::Kvm) {
        return Err(HandoffError::Kvm { machine });
    }
    Ok(())
}

fn sort(spec: &VmSpec, fds: Vec<OwnedFd>) -> Result<Fds, HandoffError> {
    if spec.fds.len() != fds.len() {
        return Err(HandoffError::FdCount {
            roles: spec.fds.len(),
            fds: fds.len(),
        });
    }
    let mut sorted: Vec<(FdRole, OwnedFd)> = Vec::new();
    for (&role, fd) in spec.fds.iter().zip(fds) {
        let several = [FdRole::Tap, FdRole::ControlGroup];
        if !several.contains(&role) && sorted.iter().any(|(known, _)| *known == role) {
            return Err(HandoffError::Twice { role });
        }
        sorted.push((role, fd));
    }
    let mut all_of = |wanted| -> Vec<OwnedFd> {
        let of_role = sorted.extract_if(.., |(role, _)| *role == wanted);
        of_role.map(|(_, fd)| fd).collect()
    };
    let tap = all_of(FdRole::Tap).into_iter().map(File::from).collect();
    let control_groups = all_of(FdRole::ControlGroup);
    let mut take = |role| {
        let at = sorted.iter().position(|(known, _)| *known == role)?;
        Some(sorted.swap_remove(at).1)
    };
    let mut need = |role| take(role).ok_or(HandoffError::Missing { role });
    Ok(Fds {
        kernel: need(FdRole::Kernel)?,
        initramfs: need(FdRole::Initramfs)?,
        console: need(FdRole::ConsoleLog)?.into(),
        control: need(FdRole::ControlListener)?,
        vsock: need(FdRole::VsockListener)?.into(),
        tap,
        control_groups,
        scratch: take(FdRole::Scratch).map(File::from),
        kvm: take(FdRole::Kvm),
    })
}

#[cfg(test)]
mod tests {
    use vmm_client::{Confinement, HugePages, RateLimit};

    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            pod_id: "pod".into(),
            machine: Machine::Uml(UmlMode::Ptrace),
            vcpus: 1,
            memory_mib: 128,
            balloon_mib: 0,
            huge_pages: HugePages::Off,
            kernel_args: Vec::new(),
            unsealed: false,
            confinement: Confinement::default(),
            core_scheduling: false,
            mac: None,
            mtu: None,
            image_slots: 4,
            disk_limit: RateLimit::default(),
            jail_root: "/jail".into(),
            shared_dir: "/shared".into(),
            shared_ids: None,
            uid: 1000,
            gid: 1000,
            console_limit_bytes: 1 << 20,
            fds: vec![
                FdRole::VsockListener,
                FdRole::Kernel,
                FdRole::Initramfs,
                FdRole::ConsoleLog,
                FdRole::ControlListener,
            ],
        }
    }

    fn fds(count: usize) -> Vec<OwnedFd> {
        (0..count)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect()
    }

    #[test]
    fn descriptors_are_found_in_any_order() {
        check(&spec()).unwrap();
        let sorted = sort(&spec(), fds(5)).unwrap();
        assert!(sorted.tap.is_empty() && sorted.scratch.is_none());
    }

    #[test]
    fn a_tap_may_have_several_queues() {
        let mut spec = spec();
        spec.fds.insert(1, FdRole::Tap);
        spec.fds.push(FdRole::Tap);
        assert_eq!(sort(&spec, fds(7)).unwrap().tap.len(), 2);
    }

    #[test]
    fn a_spec_that_cannot_run_is_refused_by_field() {
        let error = |change: fn(&mut VmSpec)| {
            let mut spec = spec();
            change(&mut spec);
            check(&spec).unwrap_err().to_string()
        };
        assert!(error(|s| s.vcpus = 2).contains("ptrace"));
        assert!(error(|s| s.vcpus = 0).contains("vcpus is 0"));
        assert!(error(|s| s.uid = 0).contains("uid is 0"));
        assert!(error(|s| s.memory_mib = 1).contains("memory_mib is 1"));
        assert!(error(|s| s.mac = Some([2; 6])).contains("tap"));
        assert!(error(|s| s.fds.push(FdRole::Tap)).contains("MAC"));
        assert!(error(|s| s.machine = Machine::Kvm).contains("/dev/kvm"));
        assert!(error(|s| s.fds.push(FdRole::Kvm)).contains("/dev/kvm"));
    }

    #[test]
    fn missing_and_surplus_descriptors_are_named() {
        let error = sort(&spec(), fds(4)).unwrap_err();
        assert!(matches!(error, HandoffError::FdCount { roles: 5, fds: 4 }));
        let mut twice = spec();
        twice.fds[0] = FdRole::Kernel;
        let error = sort(&twice, fds(5)).unwrap_err();
        assert!(error.to_string().contains("Kernel twice"));
        let mut lacking = spec();
        lacking.fds.pop();
        let error = sort(&lacking, fds(4)).unwrap_err();
        assert!(error.to_string().contains("ControlListener"));
    }
}
