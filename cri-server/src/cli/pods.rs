//! `drupe pods`: the pods of this node.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use cri_api::v1::PodSandboxMetadata;
use serde::Serialize;

use super::{CliError, Daemon, Pod, full_name, runtime, short};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs: an array with an object a pod.
    Json,
}

const HEAD: [&str; 8] = [
    "POD ID",
    "NAMESPACE/NAME",
    "HANDLER",
    "MACHINE",
    "STATE",
    "AGE",
    "START",
    "ADDRESS",
];

pub fn run(socket: &Path, format: Format) -> Result<(), CliError> {
    let pods = runtime()?.block_on(collect(socket))?;
    let text = match format {
        Format::Table => table(&pods, SystemTime::now()),
        Format::Json => json(&pods),
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(CliError::Output)
}

async fn collect(socket: &Path) -> Result<Vec<Pod>, CliError> {
    let mut daemon = Daemon::connect(socket).await?;
    let mut pods = Vec::new();
    for listed in daemon.list().await? {
        pods.extend(daemon.show(listed).await?);
    }
    Ok(pods)
}

/// From the request to the pod that serves.
pub(super) fn start_took(pod: &Pod) -> Option<Duration> {
    let steps = pod.details.timeline.iter();
    let ends = steps.map(|step| step.start_us.saturating_add(step.duration_us));
    ends.max().map(Duration::from_micros)
}

pub(super) fn created(pod: &Pod) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(pod.listed.created_at.max(0).unsigned_abs())
}

fn table(pods: &[Pod], now: SystemTime) -> String {
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(pods.iter().map(|pod| {
        let age = now.duration_since(created(pod)).unwrap_or_default();
        [
            short(&pod.listed.id).to_owned(),
            full_name(&pod.listed),
            pod.details.handler.clone(),
            pod.details.machine.clone(),
            pod.state().to_owned(),
            brief(age),
            start_took(pod)
                .map_or_else(|| "-".to_owned(), |took| format!("{}ms", took.as_millis())),
            pod.ips.first().cloned().unwrap_or_else(|| "-".to_owned()),
        ]
    }));
    super::table::table(&rows)
}

/// In the largest unit of which there are two, as kubectl does nearly.
pub(super) fn brief(age: Duration) -> String {
    let seconds = age.as_secs();
    for (unit, length) in [("d", 86_400), ("h", 3_600), ("m", 60)] {
        if seconds >= 2 * length {
            return format!("{}{unit}", seconds / length);
        }
    }
    format!("{seconds}s")
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    id: &'a str,
    namespace: &'a str,
    name: &'a str,
    uid: &'a str,
    attempt: u32,
    handler: &'a str,
    /// What the pod's kernel runs on: kvm, uml, host, or unknown.
    machine: &'a str,
    state: &'a str,
    /// Nanoseconds since 1970, as in CRI.
    created_at: i64,
    /// Of the start; null while it is under way.
    start_micros: Option<u128>,
    addresses: &'a [String],
}

fn json(pods: &[Pod]) -> String {
    let none = PodSandboxMetadata::default();
    let rows: Vec<_> = pods
        .iter()
        .map(|pod| {
            let name = pod.listed.metadata.as_ref().unwrap_or(&none);
            serde_json::json!(Row {
                id: &pod.listed.id,
                namespace: &name.namespace,
                name: &name.name,
                uid: &name.uid,
                attempt: name.attempt,
                handler: &pod.details.handler,
                machine: &pod.details.machine,
                state: pod.state(),
                created_at: pod.listed.created_at,
                start_micros: start_took(pod).map(|took| took.as_micros()),
                addresses: &pod.ips,
            })
        })
        .collect();
    format!("{:#}\n", serde_json::Value::Array(rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cri_api::v1::PodSandbox;

    fn pod(name: &str, ready: bool) -> Pod {
        let details = serde_json::json!({
            "pid": 7, "handler": "microvm", "kind": "micro-vm", "machine": "kvm", "phase": "ready",
            "console": "/run/drupe/pods/x/console.log", "failure": null, "memoryMiB": 512,
            "timeline": [
                {"phase": "netns", "start_us": 0, "duration_us": 900},
                {"phase": "boot", "start_us": 1_000, "duration_us": 139_400},
                {"phase": "cni", "start_us": 1_000, "duration_us": 30_000},
            ],
        });
        Pod {
            listed: PodSandbox {
                id: "0123456789abcdef0123".to_owned(),
                metadata: Some(PodSandboxMetadata {
                    name: name.to_owned(),
                    namespace: "shop".to_owned(),
                    uid: "u".to_owned(),
                    attempt: 2,
                }),
                state: i32::from(!ready),
                created_at: 5_000_000_000,
                ..Default::default()
            },
            ips: vec!["10.0.0.7".to_owned(), "fd00::7".to_owned()],
            details: serde_json::from_value(details).unwrap(),
        }
    }

    #[test]
    fn the_table_has_a_line_a_pod_and_no_orders_for_the_terminal() {
        let now = UNIX_EPOCH + Duration::from_secs(5 + 200);
        let pods = [pod("web", true), pod("a\x1b[2J\nb", false)];
        assert_eq!(
            table(&pods, now),
            "POD ID         NAMESPACE/NAME  HANDLER  MACHINE  STATE   AGE  START  ADDRESS\n\
             0123456789abc  shop/web        microvm  kvm      ready   3m   140ms  10.0.0.7\n\
             0123456789abc  shop/a?[2J?b    microvm  kvm      failed  3m   140ms  10.0.0.7\n"
        );
        assert_eq!(table(&[], now).lines().count(), 1);
    }

    #[test]
    fn programs_get_all_of_a_pod() {
        let text = json(&[pod("web", true)]);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            value,
            serde_json::json!([{
                "id": "0123456789abcdef0123", "namespace": "shop", "name": "web", "uid": "u",
                "attempt": 2, "handler": "microvm", "machine": "kvm", "state": "ready",
                "createdAt": 5_000_000_000_i64, "startMicros": 140_400,
                "addresses": ["10.0.0.7", "fd00::7"],
            }])
        );
        assert_eq!(json(&[]), "[]\n");
    }

    #[test]
    fn an_age_is_short() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7_200, "2h"),
            (172_800, "2d"),
        ] {
            assert_eq!(brief(Duration::from_secs(seconds)), text);
        }
    }
}
