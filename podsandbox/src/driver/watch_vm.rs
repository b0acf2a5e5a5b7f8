//! Watching a running pod from outside its driver: the VMM's end, and what the
//! agent reports. Both become [`VmEvent`]s in one bounded queue.

use std::time::Duration;

use agent_api::event::Event as AgentEvent;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vmm_client::protocol::{Event, VmState};

use crate::agent::budget::Bucket;
use crate::agent::{AgentClient, cut_exit};
use crate::observer::MachineEnd;
use crate::{Error, faults};

/// Events the driver has not taken yet; the watcher waits beyond that.
const EVENT_QUEUE: usize = 64;
/// Between attempts to reach an agent whose event stream broke: twice as long
/// each time, until one has held.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LAST: Duration = Duration::from_secs(5);
const HOLDS_FROM: Duration = Duration::from_secs(10);
/// A monitor says three things in its life.
const MONITOR_EVENTS: u64 = 20;

pub(super) enum VmEvent {
    /// The state of all containers: first after each (re)connection.
    Listing(Vec<agent_api::ContainerState>),
    Exit {
        container: String,
        exit: agent_api::Exit,
    },
    /// The machine is gone.
    Ended(Ended),
    WatcherGone,
}

/// How it is gone.
pub(super) struct Ended {
    pub(super) end: MachineEnd,
    pub(super) reason: String,
}

impl Ended {
    pub(super) fn lost(reason: String) -> Self {
        Self {
            end: MachineEnd::MonitorLost,
            reason,
        }
    }
}

/// Starts the watchers; they end with the machine or with `stopping`.
pub(super) fn watch(
    mut vm: vmm_client::Events,
    agent: AgentClient,
    stopping: CancellationToken,
) -> mpsc::Receiver<VmEvent> {
    let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
    let ended = CancellationToken::new();
    {
        let (sender, ended, stopping) = (sender.clone(), ended.clone(), stopping.clone());
        faults::spawn(async move {
            let mut said = Bucket::new(1, MONITOR_EVENTS);
            let told = loop {
                tokio::select! {
                    () = stopping.cancelled() => return,
                    event = vm.next() => match event {
                        Ok(Some(_)) if !said.take(1, Instant::now()).is_zero() => {
                            let reason = "its monitor process says the same again and again";
                            break Ended::lost(reason.to_owned());
                        }
                        Ok(Some(Event::State(status))) => {
                            if let VmState::Ended { reason, cause } = status.state {
                                let end = cause.into();
                                break Ended { end, reason };
                            }
                        }
                        Ok(None) => break Ended::lost("its monitor process ended".to_owned()),
                        Err(error) => {
                            let reason = format!("its monitor process is out of reach: {error}");
                            break Ended::lost(reason);
                        }
                    }
                }
            };
            ended.cancel();
            // The driver that does not listen any more has ended.
            drop(sender.send(VmEvent::Ended(told)).await);
        });
    }
    faults::spawn(async move {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = ended.cancelled() => {}
            () = follow_agent(&agent, &sender) => {}
        }
    });
    receiver
}

/// Goes on until the driver listens no more.
async fn follow_agent(agent: &AgentClient, sender: &mpsc::Sender<VmEvent>) {
    let mut pause = RETRY_FIRST;
    loop {
        let begun = Instant::now();
        if let Err(error) = follow_once(agent, sender).await {
            tracing::debug!(error = %error.sentence(), "agent's event stream broke; trying again");
        }
        if sender.is_closed() {
            return;
        }
        if begun.elapsed() >= HOLDS_FROM {
            pause = RETRY_FIRST;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LAST);
    }
}

/// Subscribes before it lists, so that no exit falls between the two.
async fn follow_once(agent: &AgentClient, sender: &mpsc::Sender<VmEvent>) -> crate::Result<()> {
    let mut stream = agent.events().await?;
    let listing = agent.list().await?;
    if sender.send(VmEvent::Listing(listing)).await.is_err() {
        return Ok(());
    }
    while let Some(event) = stream
        .message()
        .await
        .map_err(|status| crate::agent::refused("Events", &status))?
    {
        agent.budget().event().await;
        if !agent.budget().knew(&event.container_id) {
            return Err(Error::Protocol {
                call: "Events",
                why: "it tells of a container that is not the pod's",
            });
        }
        if let Some(AgentEvent::Exit(exit)) = event.event {
            let event = VmEvent::Exit {
                container: event.container_id,
                exit: cut_exit(exit),
            };
            if sender.send(event).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}
