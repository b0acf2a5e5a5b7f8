//! What happens to pods and containers, in CRI's words. Every event carries the
//! state of its whole pod, which the kubelet takes over as it is.

use cri_api::v1;
use podsandbox::events::{Event, EventKind};

use super::{container, pod};

pub fn event(event: &Event) -> v1::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => v1::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => v1::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => v1::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => v1::ContainerEventType::ContainerDeletedEvent,
    };
    let containers = event.pod.containers.values();
    v1::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind.into(),
        created_at: event.at_nanos,
        pod_sandbox_status: Some(pod::status(&event.pod)),
        containers_statuses: containers.map(|c| container::status(c)).collect(),
    }
}
