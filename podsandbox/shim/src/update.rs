//! UpdateContainer: other limits, and another preference of the OOM killer's.

use agent_api::UpdateContainerRequest;
use oci_spec::runtime::{LinuxResources, Spec};
use serde_json::Value;

use crate::container::{Container, Phase};
use crate::create::CONFIG;
use crate::error::Error;
use crate::pod::{Containers, write};
use crate::runtime::Deadline;

impl Containers {
    /// Sets what an OCI `LinuxResources` names and leaves the rest. A container
    /// that was not started yet has it from its start on.
    pub async fn update(&self, request: UpdateContainerRequest) -> Result<(), Error> {
        let deadline = Deadline::of_request();
        let container = self.get(&request.id)?;
        let resources: LinuxResources = serde_json::from_slice(&request.resources)?;
        // A start waits, and finds it all or nothing of it.
        let starting = container.starting.lock().await;
        if container.state().phase == Phase::Created {
            container.rewrite(&resources, request.oom_score_adj)?;
            drop(starting);
        } else {
            drop(starting);
            container.check_running()?;
            let path = container.bundle.join("update.json");
            write(&path, &serde_json::to_vec(&resources)?)?;
            let runtime = &self.inner.runtime;
            runtime.update(&container.id, &path, deadline.work).await?;
        }
        if let Some(score) = request.oom_score_adj {
            // Before the processes: one that is made meanwhile has it too.
            *container.oom_score() = Some(score);
            container.cgroup.set_oom_score(score)?;
        }
        Ok(())
    }
}

impl Container {
    fn rewrite(&self, resources: &LinuxResources, score: Option<i32>) -> Result<(), Error> {
        let path = self.bundle.join(CONFIG);
        let text = std::fs::read(&path).map_err(|source| Error::File {
            action: "read",
            path: path.clone(),
            source,
        })?;
        let mut spec: Spec = serde_json::from_slice(&text)?;
        let mut linux = spec.linux().clone().unwrap_or_default();
        let before = linux.resources().clone().unwrap_or_default();
        let mut merged = serde_json::to_value(before)?;
        merge(&mut merged, serde_json::to_value(resources)?);
        drop_lifted(&mut merged);
        linux.set_resources(Some(serde_json::from_value(merged)?));
        spec.set_linux(Some(linux));
        if let (Some(mut process), Some(score)) = (spec.process().clone(), score) {
            process.set_oom_score_adj(Some(score));
            spec.set_process(Some(process));
        }
        write(&path, &serde_json::to_vec(&spec)?)
    }
}

/// What `change` does not name stays.
fn merge(value: &mut Value, change: Value) {
    match (value, change) {
        (Value::Object(value), Value::Object(change)) => {
            for (name, change) in change {
                merge(value.entry(name).or_insert(Value::Null), change);
            }
        }
        (_, Value::Null) => {}
        (value, change) => *value = change,
    }
}

/// A limit that is lifted before it ever held is not named: some runtimes take
/// -1 for a large number.
fn drop_lifted(limits: &mut Value) {
    for (group, name) in [("cpu", "quota"), ("memory", "limit"), ("memory", "swap")] {
        let Some(group) = limits.get_mut(group).and_then(Value::as_object_mut) else {
            continue;
        };
        if group.get(name).and_then(Value::as_i64) == Some(-1) {
            group.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_an_update_does_not_name_stays() {
        let mut limits = json!({"cpu": {"shares": 2, "quota": 5}, "devices": [{"allow": false}]});
        let change =
            json!({"cpu": {"quota": -1, "cpus": "0"}, "memory": {"limit": 9}, "devices": null});
        merge(&mut limits, change);
        let expected = json!({
            "cpu": {"shares": 2, "quota": -1, "cpus": "0"},
            "memory": {"limit": 9},
            "devices": [{"allow": false}],
        });
        assert_eq!(limits, expected);
    }

    #[test]
    fn a_limit_that_is_lifted_before_the_start_is_none() {
        let mut limits =
            json!({"cpu": {"quota": -1, "shares": 2}, "memory": {"limit": 9, "swap": -1}});
        drop_lifted(&mut limits);
        let expected = json!({"cpu": {"shares": 2}, "memory": {"limit": 9}});
        assert_eq!(limits, expected);
    }
}
