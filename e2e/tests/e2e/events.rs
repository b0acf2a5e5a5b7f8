//! What happens to containers, as a subscriber hears of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::ContainerEventType::{
    ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted,
    ContainerStartedEvent as Started, ContainerStoppedEvent as Stopped,
};
use cri_api::v1::*;
use e2e::cri::ContainerEvents;
use tonic::Code;

use crate::{refused, took_less, with_drupe};

/// The next event, which is of `kind` and about `id`.
fn expect(
    events: &mut ContainerEvents,
    id: &str,
    kind: ContainerEventType,
) -> Result<ContainerEventResponse> {
    let event = events.await_next()?.context("the stream ended")?;
    ensure!(
        event.container_id == id && event.container_event_type() == kind,
        "not {kind:?} of {id}, but {event:?}"
    );
    ensure!(event.created_at > 0, "no time: {event:?}");
    Ok(event)
}

/// The container's state in the event, if it is there.
fn state(event: &ContainerEventResponse, id: &str) -> Option<ContainerState> {
    let mut statuses = event.containers_statuses.iter();
    statuses.find(|c| c.id == id).map(ContainerStatus::state)
}

fn sandbox(event: &ContainerEventResponse) -> Result<&PodSandboxStatus> {
    event
        .pod_sandbox_status
        .as_ref()
        .context("no status of the pod sandbox")
}

#[test]
fn a_subscriber_hears_of_a_pods_whole_life_in_order() -> Result<()> {
    with_drupe(|node| {
        node.run_pod("before")?.start_idle("c")?;
        let mut events = node.cri()?.container_events()?;
        let mut other = node.cri()?.container_events()?;

        let pod = node.run_pod("told")?;
        expect(&mut events, &pod.id, Created)?;
        let ready = expect(&mut events, &pod.id, Started)?;
        assert_eq!(sandbox(&ready)?.id, pod.id);
        assert_eq!(sandbox(&ready)?.state(), PodSandboxState::SandboxReady);
        assert_eq!(sandbox(&ready)?.metadata, pod.status()?.metadata);

        let container = pod.start("c", &["sh", "-c", "exit 7"])?;
        let id = container.id.as_str();
        let created = expect(&mut events, id, Created)?;
        assert_eq!(state(&created, id), Some(ContainerState::ContainerCreated));
        let started = expect(&mut events, id, Started)?;
        ensure!(state(&started, id) >= Some(ContainerState::ContainerRunning));
        let stopped = expect(&mut events, id, Stopped)?;
        assert_eq!(state(&stopped, id), Some(ContainerState::ContainerExited));
        assert_eq!(stopped.containers_statuses[0].exit_code, 7);
        container.remove()?;
        let deleted = expect(&mut events, id, Deleted)?;
        assert_eq!(state(&deleted, id), None);
        assert_eq!(sandbox(&deleted)?.id, pod.id);

        let running = pod.start_idle("running")?;
        expect(&mut events, &running.id, Created)?;
        expect(&mut events, &running.id, Started)?;
        pod.stop()?;
        expect(&mut events, &running.id, Stopped)?;
        let over = expect(&mut events, &pod.id, Stopped)?;
        assert_eq!(sandbox(&over)?.state(), PodSandboxState::SandboxNotready);
        pod.remove()?;
        expect(&mut events, &running.id, Deleted)?;
        let gone = expect(&mut events, &pod.id, Deleted)?;
        assert_eq!(sandbox(&gone)?.id, pod.id);

        // Who reads later, reads the same.
        expect(&mut other, &pod.id, Created)?;
        expect(&mut other, &pod.id, Started)?;
        expect(&mut other, id, Created).map(drop)
    })
}

#[test]
fn a_create_that_fails_is_no_event() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("silent")?;
        let mut events = node.cri()?.container_events()?;
        let mut config = pod.container_config("bad", e2e::pod::IDLE);
        e2e::pod::security(&mut config).run_as_username = "nobody-of-that-name".to_owned();
        let refusal = pod.create(config).map(|c| c.id);
        ensure!(refusal.is_err(), "{refusal:?}");
        let good = pod.start_idle("good")?;
        expect(&mut events, &good.id, Created).map(drop)
    })
}

#[test]
fn a_machine_that_is_lost_stops_the_pod_and_what_ran_in_it() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("lost")?;
        let container = pod.start_idle("c")?;
        let mut events = node.cri()?.container_events()?;
        node.kill_pod_processes()?;
        expect(&mut events, &container.id, Stopped)?;
        let stopped = expect(&mut events, &pod.id, Stopped)?;
        assert_eq!(sandbox(&stopped)?.state(), PodSandboxState::SandboxNotready);
        Ok(())
    })
}

#[test]
fn a_daemon_that_ends_does_not_wait_for_subscribers() -> Result<()> {
    with_drupe(|node| {
        let mut events = node.cri()?.container_events()?;
        let begun = Instant::now();
        node.stop_server()?;
        took_less(begun, Duration::from_secs(5))?;
        refused(events.await_next(), Code::Unavailable, &["stopping"])?;
        node.start_server()
    })
}
