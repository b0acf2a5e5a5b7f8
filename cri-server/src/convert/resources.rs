//! `LinuxContainerResources`, in which 0 means "not set".

use k8s_cri::v1;
use podsandbox::spec::Resources;
use tonic::Status;

use super::invalid;

pub fn parse(field: &str, resources: &v1::LinuxContainerResources) -> Result<Resources, Status> {
    let positive = |name: &str, value: i64| match value {
        // CFS quota -1 is "no limit", which is what not setting it means.
        0 | -1 => Ok(None),
        value => u64::try_from(value).map(Some).map_err(|_| {
            invalid(
                &format!("{field}.{name}"),
                format_args!("{value} is negative"),
            )
        }),
    };
    Ok(Resources {
        cpu_period_us: positive("cpu_period", resources.cpu_period)?,
        cpu_quota_us: positive("cpu_quota", resources.cpu_quota)?,
        cpu_shares: positive("cpu_shares", resources.cpu_shares)?,
        memory_limit_bytes: positive("memory_limit_in_bytes", resources.memory_limit_in_bytes)?,
        memory_swap_limit_bytes: positive(
            "memory_swap_limit_in_bytes",
            resources.memory_swap_limit_in_bytes,
        )?,
        oom_score_adj: i32::try_from(resources.oom_score_adj.clamp(-1000, 1000)).unwrap_or(0),
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        unified: resources.unified.clone().into_iter().collect(),
    })
}

pub fn show(resources: &Resources) -> v1::LinuxContainerResources {
    let signed = |value: Option<u64>| value.map_or(0, |v| i64::try_from(v).unwrap_or(i64::MAX));
    v1::LinuxContainerResources {
        cpu_period: signed(resources.cpu_period_us),
        cpu_quota: signed(resources.cpu_quota_us),
        cpu_shares: signed(resources.cpu_shares),
        memory_limit_in_bytes: signed(resources.memory_limit_bytes),
        memory_swap_limit_in_bytes: signed(resources.memory_swap_limit_bytes),
        oom_score_adj: resources.oom_score_adj.into(),
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        unified: resources.unified.clone().into_iter().collect(),
        hugepage_limits: Vec::new(),
    }
}
