//! Control groups: the pod's on the node, the container's limits in its guest.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::cgroup::{self, OF_DAEMON};
use tonic::Code;

use crate::{refused, with_drupe};

#[test]
fn a_pod_without_a_parent_is_charged_to_one_that_goes_with_the_last() -> Result<()> {
    with_drupe(|node| {
        let _other_tests_look_later = cgroup::lock_parent_of_daemon();
        let groups = || cgroup::groups(OF_DAEMON);
        // As an earlier version, or a daemon that was killed, left it.
        node.stop_server()?;
        let places = cgroup::groups("")?;
        for place in &places {
            fs::create_dir_all(place.join(OF_DAEMON))
                .with_context(|| place.display().to_string())?;
        }
        node.start_server()?;
        let used = |of: &PathBuf| -> Result<bool> {
            Ok(fs::read_dir(of)?.flatten().any(|e| e.path().is_dir()))
        };
        // The daemon sees to the hierarchies that it uses.
        let unused = groups()?;
        for group in &unused {
            ensure!(!used(group)?, "{}", group.display());
            fs::remove_dir(group)?;
        }
        ensure!(unused.len() < places.len(), "it left all of {unused:?}");

        let mut pods = Vec::new();
        for name in ["first", "second"] {
            let mut config = node.pod_config(name);
            config.linux.get_or_insert_default().cgroup_parent.clear();
            pods.push(node.run_pod_with(config)?);
        }
        let made = groups()?;
        ensure!(!made.is_empty(), "no group was made");
        for pod in &pods {
            let group = made[0].join(format!("drupe-{}", pod.id));
            let inside = fs::read_to_string(group.join("cgroup.procs"))?;
            ensure!(!inside.is_empty(), "nothing is charged to the pod's group");
        }
        pods[0].remove()?;
        assert_eq!(groups()?, made, "gone while a pod is in it");
        pods[1].start_idle("c")?.exec(&["true"])?;
        pods[1].remove()?;
        assert_eq!(groups()?, Vec::<PathBuf>::new());
        Ok(())
    })
}

#[test]
fn only_a_limit_of_no_huge_pages_is_kept() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("huge")?;
        let config = |name: &str, bytes: u64| {
            let mut config = pod.container_config(name, e2e::pod::IDLE);
            let limit = |page_size: &str, limit| HugepageLimit {
                page_size: page_size.to_owned(),
                limit,
            };
            config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
                hugepage_limits: vec![limit("1GB", 0), limit("2MB", bytes)],
                ..Default::default()
            });
            config
        };
        // What the kubelet says of every container on a node that has some.
        let none = pod.start_with(config("none", 0))?;
        none.exec(&["true"])?;
        refused(
            pod.create(config("some", 4 << 20)).map(|c| c.id),
            Code::FailedPrecondition,
            &["linux.resources.hugepage_limits", "2MB", "nothing reserves"],
        )?;
        let more = config("more", 4 << 20).linux.unwrap_or_default().resources;
        refused(
            none.update(more.unwrap_or_default()),
            Code::FailedPrecondition,
            &["linux.resources.hugepage_limits", "2MB"],
        )?;
        Ok(())
    })
}
