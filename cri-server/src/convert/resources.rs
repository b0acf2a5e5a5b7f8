//! `LinuxContainerResources`, in which 0 means "not set".

use std::collections::BTreeMap;

use cri_api::v1;
use podsandbox::resize::{ContainerChange, Limit};
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
        oom_score_adj: oom_score(resources),
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        unified: resources.unified.clone().into_iter().collect(),
        hugepage_limits: hugepages(field, resources)?,
    })
}

#[expect(clippy::disallowed_methods, reason = "the bounds are constants")]
fn oom_score(resources: &v1::LinuxContainerResources) -> i32 {
    i32::try_from(resources.oom_score_adj.clamp(-1000, 1000)).unwrap_or(0)
}

/// An update: 0 and an empty text leave what there is, -1 lifts a limit.
pub fn parse_change(
    field: &str,
    resources: &v1::LinuxContainerResources,
) -> Result<ContainerChange, Status> {
    let stated = |name: &str, value: i64| match limit(field, name, value)? {
        Limit::Keep => Ok(None),
        Limit::To(value) => Ok(Some(value)),
        Limit::Lift => Err(invalid(
            &format!("{field}.{name}"),
            format_args!("{value} is negative"),
        )),
    };
    let text = |value: &String| (!value.is_empty()).then(|| value.clone());
    let score = oom_score(resources);
    Ok(ContainerChange {
        cpu_period_us: stated("cpu_period", resources.cpu_period)?,
        cpu_quota_us: limit(field, "cpu_quota", resources.cpu_quota)?,
        cpu_shares: stated("cpu_shares", resources.cpu_shares)?,
        memory_limit_bytes: limit(
            field,
            "memory_limit_in_bytes",
            resources.memory_limit_in_bytes,
        )?,
        memory_swap_limit_bytes: limit(
            field,
            "memory_swap_limit_in_bytes",
            resources.memory_swap_limit_in_bytes,
        )?,
        oom_score_adj: (score != 0).then_some(score),
        cpuset_cpus: text(&resources.cpuset_cpus),
        cpuset_mems: text(&resources.cpuset_mems),
        unified: resources.unified.clone().into_iter().collect(),
        hugepage_limits: hugepages(field, resources)?,
    })
}

fn limit(field: &str, name: &str, value: i64) -> Result<Limit, Status> {
    match value {
        0 => Ok(Limit::Keep),
        -1 => Ok(Limit::Lift),
        value => u64::try_from(value).map(Limit::To).map_err(|_| {
            invalid(
                &format!("{field}.{name}"),
                format_args!("{value} is negative"),
            )
        }),
    }
}

fn hugepages(
    field: &str,
    resources: &v1::LinuxContainerResources,
) -> Result<BTreeMap<String, u64>, Status> {
    let limits = resources.hugepage_limits.iter().map(|limit| {
        if is_page_size(&limit.page_size) {
            Ok((limit.page_size.clone(), limit.limit))
        } else {
            Err(invalid(
                &format!("{field}.hugepage_limits"),
                format_args!("{:?} is no size of pages such as 2MB", limit.page_size),
            ))
        }
    });
    limits.collect()
}

/// As in the names of the kernel's `hugetlb.SIZE.max`.
fn is_page_size(size: &str) -> bool {
    let number = ["KB", "MB", "GB"]
        .iter()
        .find_map(|unit| size.strip_suffix(unit));
    number.is_some_and(|number| {
        matches!(number.len(), 1..=4) && number.bytes().all(|byte| byte.is_ascii_digit())
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
        hugepage_limits: resources
            .hugepage_limits
            .iter()
            .map(|(page_size, &limit)| v1::HugepageLimit {
                page_size: page_size.clone(),
                limit,
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_pages(size: &str, limit: u64) -> v1::LinuxContainerResources {
        v1::LinuxContainerResources {
            hugepage_limits: vec![v1::HugepageLimit {
                page_size: size.to_owned(),
                limit,
            }],
            ..Default::default()
        }
    }

    #[test]
    fn limits_of_huge_pages_are_kept_and_shown() {
        for (size, limit) in [("2MB", 0), ("1GB", 1 << 30), ("64KB", 65_536)] {
            let given = with_pages(size, limit);
            assert_eq!(show(&parse("f", &given).unwrap()), given);
        }
    }

    #[test]
    fn an_update_keeps_lifts_and_sets() {
        let given = v1::LinuxContainerResources {
            cpu_quota: -1,
            memory_limit_in_bytes: 4096,
            cpuset_cpus: "0-1".to_owned(),
            ..Default::default()
        };
        let change = parse_change("linux", &given).unwrap();
        let expected = ContainerChange {
            cpu_quota_us: Limit::Lift,
            memory_limit_bytes: Limit::To(4096),
            cpuset_cpus: Some("0-1".to_owned()),
            ..ContainerChange::default()
        };
        assert_eq!(change, expected);
        let negative = v1::LinuxContainerResources {
            cpu_shares: -1,
            ..Default::default()
        };
        let refused = parse_change("linux", &negative).unwrap_err();
        assert!(refused.message().starts_with("linux.cpu_shares"));
        let negative = v1::LinuxContainerResources {
            memory_limit_in_bytes: -2,
            ..Default::default()
        };
        let refused = parse_change("linux", &negative).unwrap_err();
        assert!(refused.message().starts_with("linux.memory_limit_in_bytes"));
    }

    #[test]
    fn a_page_size_names_no_other_file() {
        for size in ["", "MB", "2", "2MiB", "../x", "2MB.max", "-2MB"] {
            let refused = parse("f", &with_pages(size, 0)).unwrap_err();
            assert!(
                refused.message().starts_with("f.hugepage_limits"),
                "{refused:?}"
            );
        }
    }
}
