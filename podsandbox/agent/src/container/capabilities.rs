//! Capability sets of an OCI spec as the kernel's bits.

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxCapabilities};

use super::child::LAST_CAPABILITY;
use super::plan::Capabilities;

/// The sets of a process that runs as `uid`; none without a spec of them.
pub fn capabilities(sets: Option<&LinuxCapabilities>, uid: u32) -> Capabilities {
    let bits = |set: Option<&HashSet<Capability>>| {
        set.into_iter()
            .flatten()
            .fold(0u64, |bits, &cap| bits | 1 << number(cap))
    };
    let Some(sets) = sets else {
        return Capabilities::default();
    };
    let bounding = bits(sets.bounding().as_ref());
    // The kernel refuses more than the bounding set grants.
    let permitted = bits(sets.permitted().as_ref());
    let inheritable = bits(sets.inheritable().as_ref());
    let mut capabilities = Capabilities {
        bounding,
        permitted,
        effective: bits(sets.effective().as_ref()) & permitted,
        inheritable: inheritable & (bounding | permitted),
        ambient: bits(sets.ambient().as_ref()) & permitted & inheritable,
    };
    if uid != 0 && capabilities.ambient == 0 {
        // What execve would make of them for a user who is not root.
        capabilities.permitted = 0;
        capabilities.effective = 0;
    }
    capabilities
}

fn number(capability: Capability) -> u32 {
    use Capability as C;
    // linux/capability.h.
    let order = [
        C::Chown,
        C::DacOverride,
        C::DacReadSearch,
        C::Fowner,
        C::Fsetid,
        C::Kill,
        C::Setgid,
        C::Setuid,
        C::Setpcap,
        C::LinuxImmutable,
        C::NetBindService,
        C::NetBroadcast,
        C::NetAdmin,
        C::NetRaw,
        C::IpcLock,
        C::IpcOwner,
        C::SysModule,
        C::SysRawio,
        C::SysChroot,
        C::SysPtrace,
        C::SysPacct,
        C::SysAdmin,
        C::SysBoot,
        C::SysNice,
        C::SysResource,
        C::SysTime,
        C::SysTtyConfig,
        C::Mknod,
        C::Lease,
        C::AuditWrite,
        C::AuditControl,
        C::Setfcap,
        C::MacOverride,
        C::MacAdmin,
        C::Syslog,
        C::WakeAlarm,
        C::BlockSuspend,
        C::AuditRead,
        C::Perfmon,
        C::Bpf,
        C::CheckpointRestore,
    ];
    order
        .iter()
        .position(|&other| other == capability)
        .map_or(LAST_CAPABILITY, |position| position as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_numbers_are_the_kernels() {
        assert_eq!(number(Capability::Chown), 0);
        assert_eq!(number(Capability::SysAdmin), 21);
        assert_eq!(number(Capability::Setfcap), 31);
        assert_eq!(number(Capability::CheckpointRestore), LAST_CAPABILITY);
    }

    #[test]
    fn a_plain_user_keeps_no_capabilities_without_ambient_ones() {
        let sets: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding":["CAP_KILL"],"permitted":["CAP_KILL"],"effective":["CAP_KILL"]}"#,
        )
        .unwrap();
        assert_eq!(capabilities(Some(&sets), 0).effective, 1 << 5);
        let user = capabilities(Some(&sets), 1000);
        assert_eq!(
            (user.bounding, user.permitted, user.effective),
            (1 << 5, 0, 0)
        );
    }
}
