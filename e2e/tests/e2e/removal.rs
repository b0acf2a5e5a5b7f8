//! Containers that do not go at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::eventually;
use e2e::leaks::files_below;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{with_drupe, with_node};

const SOON: Duration = Duration::from_secs(30);

#[test]
fn a_container_whose_removal_resists_is_shown_with_its_true_exit() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("resists")?;
        let ended = pod.start("ended", &["sh", "-c", "exit 5"])?;
        let before = ended.wait_exit()?;
        let running = pod.start_idle("running")?;
        // Those of the two containers: there are no others.
        let leases = files_below(&node.root().join("images/leases"))?;
        assert_eq!(leases.len(), 2);
        for lease in &leases {
            // What is mounted on cannot be removed.
            mount(
                Some(lease),
                lease,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .context("mount on a lease")?;
        }
        for container in [&ended, &running] {
            ensure!(container.remove().is_err(), "it did not resist");
        }
        let after = ended.status()?;
        assert_eq!(after, before);
        let killed = running.status()?;
        assert_eq!(killed.state(), ContainerState::ContainerExited);
        assert_eq!((killed.exit_code, killed.reason.as_str()), (137, "Error"));
        let listed = node
            .cri()?
            .list_containers(ListContainersRequest::default())?
            .containers;
        assert_eq!(listed.len(), 2);
        for container in &listed {
            assert_eq!(container.state(), ContainerState::ContainerExited);
        }
        pod.start_idle("another")?.exec(&["true"])?;

        for lease in &leases {
            umount2(lease, MntFlags::empty()).context("unmount from a lease")?;
        }
        eventually("the removals to be finished", SOON, || {
            let listed = node
                .cri()?
                .list_containers(ListContainersRequest::default())?
                .containers;
            ensure!(listed.len() == 1, "{listed:?}");
            Ok::<_, anyhow::Error>(())
        })
    })
}

#[test]
fn a_container_with_many_files_holds_up_no_other_when_it_ends() -> Result<()> {
    /// So many take a guest seconds to delete.
    const FILES: usize = 30_000;
    /// What a start takes beside that on a busy machine, and far less than it.
    const START_WITHIN: Duration = Duration::from_secs(3);
    with_node(|node| {
        let pod = node.run_pod("crowded")?;
        let made = format!(
            "mkdir /many && cd /many && seq {FILES} | xargs touch && ls | wc -l && exec sleep 100000"
        );
        let crowded = pod.start("crowded", &["sh", "-c", &made])?;
        eventually("the files to be made", Duration::from_secs(60), || {
            let output = crowded.stdout()?;
            ensure!(output == format!("{FILES}\n"), "{output:?}");
            Ok::<_, anyhow::Error>(())
        })?;
        let other = pod.create(pod.container_config("other", e2e::pod::IDLE))?;
        crowded.stop(0)?;
        let begun = Instant::now();
        other.start()?;
        other.exec(&["true"])?;
        pod.start_idle("third")?;
        let took = begun.elapsed();
        ensure!(took < START_WITHIN, "others were held up for {took:?}");
        let begun = Instant::now();
        crowded.remove()?;
        let took = begun.elapsed();
        ensure!(took < START_WITHIN, "its removal took {took:?}");
        Ok(())
    })
}
