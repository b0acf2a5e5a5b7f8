//! What the pod and its containers use, from their control groups.

use std::fs;
use std::io;
use std::sync::Arc;

use agent_api::{ContainerStats, GuestStats, StatsRequest, StatsResponse};
use drupe_agent::clock;
use drupe_agent::stats::{container_stats, interfaces, meminfo_bytes, rss};
use drupe_agent::tree::Size;

use crate::container::Container;
use crate::error::Error;
use crate::pod::Containers;

pub async fn collect(
    containers: &Containers,
    request: &StatsRequest,
) -> Result<StatsResponse, Error> {
    // One that has just gone is left out.
    let asked: Vec<Arc<Container>> = if request.container_ids.is_empty() {
        containers.all()
    } else {
        let get = |id: &String| containers.get(id).ok();
        request.container_ids.iter().filter_map(get).collect()
    };
    let mut response = StatsResponse {
        containers: Vec::with_capacity(asked.len()),
        guest: Some(pod(containers)?),
        time_unix_nanos: clock::now_nanos(),
    };
    for container in asked {
        match of_container(&container).await {
            Ok(stats) => response.containers.push(stats),
            // The others' figures are as good as before.
            Err(error) => tracing::warn!(container = container.id, %error, "no statistics"),
        }
    }
    Ok(response)
}

async fn of_container(container: &Container) -> Result<ContainerStats, Error> {
    let usage = container.cgroup.usage()?;
    let written = container.layer.usage().await;
    let layer = Size {
        bytes: written.bytes,
        inodes: written.inodes,
    };
    Ok(container_stats(&container.id, usage, layer))
}

/// In a guest's terms: what the pod has is the host's memory, or its limit.
fn pod(containers: &Containers) -> Result<GuestStats, Error> {
    let usage = containers.inner.cgroup.usage()?;
    let memory = meminfo_bytes(&read("/proc/meminfo")?, "MemTotal");
    let total = match usage.memory_limit {
        0 => memory,
        limit => limit.min(memory),
    };
    Ok(GuestStats {
        cpu_usage_nanos: usage.cpu_nanos,
        memory_total_bytes: total,
        memory_available_bytes: total.saturating_sub(usage.working_set),
        process_count: usage.pids,
        // What goes through the host's own interfaces is not the pod's.
        interfaces: if containers.inner.host_network {
            Vec::new()
        } else {
            interfaces(&read("/proc/self/net/dev")?)
        },
        agent_rss_bytes: rss(&read("/proc/self/statm")?),
        cpu_pressure: usage.pressures.cpu,
        memory_pressure: usage.pressures.memory,
        io_pressure: usage.pressures.io,
        // There is no disk of the pod's.
        scratch_bytes: 0,
        scratch_inodes: 0,
        scratch_free_inodes: 0,
    })
}

fn read(path: &'static str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source: io::Error| Error::File {
        action: "read",
        path: path.into(),
        source,
    })
}
