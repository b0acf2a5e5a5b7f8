//! How large a pod's virtual machine is.
//!
//! Limits win: the guest gets the pod's memory limit plus what its own kernel
//! and agent need, so that a container can use all it was promised. A pod
//! without limits gets the handler's defaults.

use crate::config::RuntimeConfig;
use crate::spec::Resources;

/// Below this a guest kernel does not come up.
const MIN_MEMORY_MIB: u32 = 64;
/// What the guest kernels are built for.
const MAX_VCPUS: u32 = 32;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmSize {
    pub vcpus: u32,
    pub memory_mib: u32,
    /// With the room to grow.
    pub machine_mib: u32,
}

/// The node, and how many vCPUs the handler's machine can have.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub host_cpus: u32,
    pub host_memory_mib: u32,
    pub max_vcpus: u32,
}

impl Bounds {
    pub fn of_this_node(max_vcpus: u32) -> Self {
        let cpus = std::thread::available_parallelism();
        let memory = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
        Self {
            host_cpus: cpus.map_or(1, |n| u32::try_from(n.get()).unwrap_or(1)),
            host_memory_mib: mib(memory),
            max_vcpus,
        }
    }
}

/// A limit above what the node has is legal in Kubernetes and means no limit:
/// the guest is then as large as the node, not larger.
#[must_use]
pub fn size(
    runtime: &RuntimeConfig,
    resources: &Resources,
    overhead: &Resources,
    bounds: Bounds,
) -> VmSize {
    let memory_mib = match resources.memory_limit_bytes {
        Some(limit) => memory_for(runtime, limit, overhead, bounds),
        None => in_bounds(runtime.default_memory_mib, bounds),
    };
    let vcpus = match (
        resources.cpu_quota_us,
        resources.cpu_period_us.unwrap_or(100_000),
    ) {
        (Some(quota), period) if period > 0 => {
            u32::try_from(quota.div_ceil(period)).unwrap_or(MAX_VCPUS)
        }
        _ => runtime.default_vcpus,
    };
    let most = bounds.host_cpus.min(bounds.max_vcpus).min(MAX_VCPUS);
    VmSize {
        vcpus: vcpus.min(most).max(1),
        memory_mib,
        machine_mib: in_bounds(
            memory_mib.saturating_add(runtime.memory_headroom_mib),
            bounds,
        ),
    }
}

/// What a guest needs in which containers can use `limit` bytes.
#[must_use]
pub fn memory_for(
    runtime: &RuntimeConfig,
    limit: u64,
    overhead: &Resources,
    bounds: Bounds,
) -> u32 {
    let declared = overhead.memory_limit_bytes.map_or(0, mib);
    let own = declared.max(runtime.guest_overhead_mib);
    in_bounds(mib(limit).saturating_add(own), bounds)
}

fn in_bounds(mib: u32, bounds: Bounds) -> u32 {
    mib.min(bounds.host_memory_mib).max(MIN_MEMORY_MIB)
}

fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NODE: Bounds = Bounds {
        host_cpus: 16,
        host_memory_mib: 1 << 24,
        max_vcpus: 32,
    };

    fn limits(memory: Option<u64>, quota: Option<u64>) -> Resources {
        Resources {
            memory_limit_bytes: memory,
            cpu_quota_us: quota,
            cpu_period_us: Some(100_000),
            ..Resources::default()
        }
    }

    #[test]
    fn a_pod_without_limits_gets_the_handlers_defaults() {
        let runtime = RuntimeConfig::default();
        let none = Resources::default();
        let size = size(&runtime, &none, &none, NODE);
        assert_eq!(
            size,
            VmSize {
                vcpus: 1,
                memory_mib: 512,
                machine_mib: 512
            }
        );
    }

    #[test]
    fn a_machine_has_the_headroom_that_the_node_has_memory_for() {
        let runtime = RuntimeConfig {
            memory_headroom_mib: 1024,
            ..RuntimeConfig::default()
        };
        let none = Resources::default();
        let limit = limits(Some(100 << 20), None);
        let of = |bounds| size(&runtime, &limit, &none, bounds);
        assert_eq!((of(NODE).memory_mib, of(NODE).machine_mib), (164, 1188));
        let small = Bounds {
            host_memory_mib: 1000,
            ..NODE
        };
        assert_eq!((of(small).memory_mib, of(small).machine_mib), (164, 1000));
    }

    #[test]
    fn half_a_cpu_needs_one_and_two_and_a_half_need_three() {
        let runtime = RuntimeConfig::default();
        let none = Resources::default();
        let cpus = |quota| size(&runtime, &limits(None, Some(quota)), &none, NODE).vcpus;
        assert_eq!(cpus(50_000), 1);
        assert_eq!(cpus(250_000), 3);
    }

    proptest! {
        #[test]
        fn a_container_can_use_all_it_was_promised(
            limit in 1u64..1 << 44, overhead in proptest::option::of(0u64..1 << 34),
            quota in 0u64..1 << 40, node in 64u32..1 << 24, host in 1u32..512, max in 1u32..64,
        ) {
            let runtime = RuntimeConfig::default();
            let declared = limits(overhead, None);
            let bounds = Bounds { host_cpus: host, host_memory_mib: node, max_vcpus: max };
            let size = size(&runtime, &limits(Some(limit), Some(quota)), &declared, bounds);
            prop_assert!(u64::from(size.memory_mib) << 20 >= limit.min(u64::from(node) << 20));
            prop_assert!(size.memory_mib <= node);
            prop_assert_eq!(size.machine_mib, size.memory_mib);
            prop_assert!(size.vcpus >= 1 && size.vcpus <= host && size.vcpus <= 32 && size.vcpus <= max);
        }
    }
}
