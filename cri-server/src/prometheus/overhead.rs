//! Gauges of what pods cost beyond their containers, by handler.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;

use super::pods::gauges;
use crate::overhead::Measured;

#[derive(Default)]
struct OfHandler {
    pods: u64,
    actual: u64,
    declared: u64,
    above: u64,
    undeclared: u64,
}

/// A handler is there when a pod of its was measured.
pub(super) fn encode(measured: &[Measured], encoder: &mut DescriptorEncoder) -> fmt::Result {
    let mut handlers: BTreeMap<&str, OfHandler> = BTreeMap::new();
    for pod in measured {
        let of = handlers.entry(&pod.handler).or_default();
        let declared = pod.overhead.declared_memory_bytes;
        of.pods += 1;
        of.actual = of.actual.saturating_add(pod.overhead.memory_bytes);
        of.declared = of.declared.saturating_add(declared.unwrap_or(0));
        of.above += u64::from(pod.overhead.is_above_declared());
        of.undeclared += u64::from(declared.is_none());
    }
    let by = |figure: fn(&OfHandler) -> u64| {
        let all = handlers.iter();
        all.map(move |(handler, of)| ([("handler", *handler)], figure(of)))
    };
    gauges(
        encoder,
        "pod_overhead_measured_pods",
        "Pods whose overhead is known.",
        by(|of| of.pods),
    )?;
    gauges(
        encoder,
        "pod_overhead_actual_bytes",
        "Memory that they take beyond what their containers use.",
        by(|of| of.actual),
    )?;
    gauges(
        encoder,
        "pod_overhead_declared_bytes",
        "Memory that their RuntimeClasses declare as overhead.",
        by(|of| of.declared),
    )?;
    gauges(
        encoder,
        "pod_overhead_above_declared_pods",
        "Those that take more than is declared.",
        by(|of| of.above),
    )?;
    gauges(
        encoder,
        "pod_overhead_undeclared_pods",
        "Those for which nothing is declared.",
        by(|of| of.undeclared),
    )
}
