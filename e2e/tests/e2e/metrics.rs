//! Metrics for Prometheus, as the kubelet asks for them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::{Node, eventually};

use crate::with_drupe;

/// What the field's dashboards and autoscalers ask for.
const OF_CONTAINERS: [&str; 10] = [
    "container_cpu_usage_seconds_total",
    "container_cpu_user_seconds_total",
    "container_cpu_system_seconds_total",
    "container_memory_usage_bytes",
    "container_memory_working_set_bytes",
    "container_memory_rss",
    "container_fs_usage_bytes",
    "container_processes",
    "container_start_time_seconds",
    "container_pressure_cpu_waiting_seconds_total",
];

/// A metric with its labels by name.
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: u64,
}

/// Joined with their descriptors as the kubelet does it.
fn samples(descriptors: &[MetricDescriptor], metrics: &[Metric]) -> Result<Vec<Sample>> {
    let sample = |metric: &Metric| {
        let of = descriptors.iter().find(|d| d.name == metric.name);
        let keys = &of.with_context(|| format!("{metric:?}"))?.label_keys;
        ensure!(keys.len() == metric.label_values.len(), "{metric:?}");
        let labels = keys.iter().zip(&metric.label_values);
        Ok(Sample {
            name: metric.name.clone(),
            labels: labels.map(|(k, v)| (k.clone(), v.clone())).collect(),
            value: metric.value.as_ref().context("no value")?.value,
        })
    };
    metrics.iter().map(sample).collect()
}

fn value(samples: &[Sample], name: &str) -> Result<u64> {
    let found = samples.iter().find(|sample| sample.name == name);
    Ok(found.with_context(|| format!("no {name}"))?.value)
}

fn descriptors(node: &Node) -> Result<Vec<MetricDescriptor>> {
    let request = ListMetricDescriptorsRequest {};
    Ok(node.cri()?.list_metric_descriptors(request)?.descriptors)
}

fn of_pod(node: &Node, pod: &str) -> Result<PodSandboxMetrics> {
    let list = node
        .cri()?
        .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})?;
    let mut metrics = list.pod_metrics.into_iter();
    metrics
        .find(|of| of.pod_sandbox_id == pod)
        .context("no metrics of the pod")
}

#[test]
fn metrics_tell_what_containers_use_by_their_names() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("measured")?;
        let mut config = pod.container_config(
            "busy",
            &[
                "sh",
                "-c",
                "dd if=/dev/zero of=/written bs=1M count=4 2> /dev/null; sync; while :; do :; done",
            ],
        );
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            cpu_period: 100_000,
            cpu_quota: 50_000,
            ..Default::default()
        });
        let busy = pod.start_with(config)?;
        let descriptors = descriptors(node)?;
        let names: BTreeSet<_> = descriptors.iter().map(|d| d.name.as_str()).collect();
        ensure!(names.len() == descriptors.len(), "described twice");

        let metrics = eventually("a second of CPU", Duration::from_secs(60), || {
            let metrics = of_pod(node, &pod.id)?;
            let of = metrics.container_metrics.first().context("no container")?;
            ensure!(of.container_id == busy.id);
            let samples = samples(&descriptors, &of.metrics)?;
            ensure!(value(&samples, "container_cpu_usage_seconds_total")? >= 1);
            ensure!(value(&samples, "container_fs_usage_bytes")? >= 4 << 20);
            Ok::<_, anyhow::Error>(metrics)
        })?;
        let of_busy = samples(&descriptors, &metrics.container_metrics[0].metrics)?;
        for name in OF_CONTAINERS {
            value(&of_busy, name)?;
        }
        ensure!(value(&of_busy, "container_memory_working_set_bytes")? > 0);
        ensure!(value(&of_busy, "container_processes")? >= 1);
        ensure!(value(&of_busy, "container_cpu_cfs_throttled_periods_total")? > 0);
        assert_eq!(
            value(&of_busy, "container_spec_memory_limit_bytes")?,
            64 << 20
        );
        assert_eq!(value(&of_busy, "container_spec_cpu_quota")?, 50_000);
        let labels = &of_busy[0].labels;
        let label = |name: &str| labels.get(name).map_or("", String::as_str);
        assert_eq!(label("container"), "busy");
        assert_eq!(label("pod"), "measured");
        assert_eq!(label("namespace"), "e2e");
        assert_eq!(label("id"), busy.id);
        ensure!(label("image").contains("busybox"), "{labels:?}");

        // The daemon has looked at the network: addresses were announced.
        let of_pod = samples(&descriptors, &metrics.metrics)?;
        let sent = of_pod
            .iter()
            .find(|sample| sample.name == "container_network_transmit_bytes_total")
            .context("no network")?;
        assert_eq!(sent.labels["interface"], "eth0");
        assert_eq!(sent.labels["container"], "");
        ensure!(sent.value > 0, "nothing was sent");
        ensure!(value(&of_pod, "container_cpu_usage_seconds_total")? >= 1);
        Ok(())
    })
}

#[test]
fn only_pods_that_run_have_metrics_and_the_stream_has_the_same() -> Result<()> {
    with_drupe(|node| {
        let first = node.run_pod("first")?;
        let exited = first.start("over", &["true"])?;
        exited.wait_exit()?;
        first.start_idle("c")?;
        node.run_pod("stopped")?.stop()?;
        let second = node.run_pod("second")?;
        let cri = node.cri()?;
        let list = cri.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})?;
        let ids = |metrics: &[PodSandboxMetrics]| -> BTreeSet<String> {
            metrics.iter().map(|of| of.pod_sandbox_id.clone()).collect()
        };
        let running = [first.id.clone(), second.id.clone()];
        assert_eq!(ids(&list.pod_metrics), running.into());
        let of_first = of_pod(node, &first.id)?.container_metrics;
        ensure!(of_first.iter().all(|of| of.container_id != exited.id));
        assert_eq!(of_first.len(), 1);
        let messages = cri.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest {})?;
        let streamed: Vec<_> = messages
            .into_iter()
            .flat_map(|message| message.pod_sandbox_metrics)
            .collect();
        assert_eq!(ids(&streamed), ids(&list.pod_metrics));
        let shown = node.crictl_ok(&["metricsp"])?;
        ensure!(
            shown.contains("container_memory_working_set_bytes"),
            "{shown}"
        );
        Ok(())
    })
}
