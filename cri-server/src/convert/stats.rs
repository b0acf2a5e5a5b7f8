//! Statistics, from figures that are bounded by then.

use cri_api::v1;
use podsandbox::record::ContainerRecord;
use podsandbox::{ContainerStats, Figures, PodSnapshot, Pressure, PressureData};

fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

/// The guest's word, within what the kernel can say: 100 percent.
fn psi(pressure: Option<&Pressure>) -> Option<v1::PsiStats> {
    const ALL: u32 = 10_000;
    let percent = |hundredths: u32| f64::from(hundredths.min(ALL)) / 100.0;
    let data = |data: &PressureData| v1::PsiData {
        total: data.total_nanos,
        avg10: percent(data.avg10),
        avg60: percent(data.avg60),
        avg300: percent(data.avg300),
    };
    pressure.map(|pressure| v1::PsiStats {
        full: pressure.full.as_ref().map(data),
        some: pressure.some.as_ref().map(data),
    })
}

/// Pressure is all that CRI has of it.
fn io(timestamp: i64, pressure: Option<&Pressure>) -> Option<v1::IoUsage> {
    psi(pressure).map(|psi| v1::IoUsage {
        timestamp,
        psi: Some(psi),
    })
}

fn cpu(timestamp: i64, nanos: u64, pressure: Option<&Pressure>) -> v1::CpuUsage {
    // The rate is left to the kubelet, which computes it between samples.
    v1::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(nanos),
        usage_nano_cores: None,
        psi: psi(pressure),
    }
}

pub fn attributes(container: &ContainerRecord) -> v1::ContainerAttributes {
    v1::ContainerAttributes {
        id: container.id.clone(),
        metadata: Some(super::container::metadata(container)),
        labels: container.spec.labels.clone().into_iter().collect(),
        annotations: container.spec.annotations.clone().into_iter().collect(),
    }
}

/// `figures` is missing for a container that does not run: it uses nothing.
pub fn container(
    record: &ContainerRecord,
    figures: Option<&ContainerStats>,
    timestamp: i64,
    mountpoint: &str,
) -> v1::ContainerStats {
    let none = ContainerStats::default();
    let of = figures.unwrap_or(&none);
    v1::ContainerStats {
        attributes: Some(attributes(record)),
        cpu: Some(cpu(timestamp, of.cpu_usage_nanos, of.cpu_pressure.as_ref())),
        memory: Some(v1::MemoryUsage {
            timestamp,
            working_set_bytes: value(of.memory_working_set_bytes),
            available_bytes: (of.memory_limit_bytes > 0).then(|| v1::UInt64Value {
                value: of
                    .memory_limit_bytes
                    .saturating_sub(of.memory_working_set_bytes),
            }),
            usage_bytes: value(of.memory_usage_bytes),
            rss_bytes: value(of.memory_rss_bytes),
            page_faults: value(of.memory_page_faults),
            major_page_faults: value(of.memory_major_page_faults),
            psi: psi(of.memory_pressure.as_ref()),
        }),
        writable_layer: Some(v1::FilesystemUsage {
            timestamp,
            fs_id: Some(v1::FilesystemIdentifier {
                mountpoint: mountpoint.to_owned(),
            }),
            used_bytes: value(of.fs_used_bytes),
            inodes_used: value(of.fs_inodes_used),
        }),
        swap: Some(v1::SwapUsage {
            timestamp,
            swap_available_bytes: None,
            swap_usage_bytes: value(of.swap_usage_bytes),
        }),
        io: io(timestamp, of.io_pressure.as_ref()),
    }
}

pub fn pod(pod: &PodSnapshot, figures: &Figures, mountpoint: &str) -> v1::PodSandboxStats {
    let spec = &pod.pod.spec;
    let timestamp = podsandbox::now_nanos();
    let (of, guest) = (&figures.pod, &figures.guest);
    let interfaces = guest.interfaces.iter();
    let mut interfaces = interfaces.map(|i| v1::NetworkInterfaceUsage {
        name: i.name.clone(),
        rx_bytes: value(i.rx_bytes),
        rx_errors: value(i.rx_errors),
        tx_bytes: value(i.tx_bytes),
        tx_errors: value(i.tx_errors),
    });
    let containers = pod.containers.values().map(|record| {
        let of = figures.containers.get(&record.id);
        container(record, of, timestamp, mountpoint)
    });
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: pod.pod.id.clone(),
            metadata: Some(super::pod::metadata(pod)),
            labels: spec.labels.clone().into_iter().collect(),
            annotations: spec.annotations.clone().into_iter().collect(),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: Some(cpu(timestamp, of.cpu_nanos, guest.cpu_pressure.as_ref())),
            memory: Some(v1::MemoryUsage {
                timestamp,
                working_set_bytes: value(of.memory_working_set_bytes),
                available_bytes: value(of.memory_available_bytes),
                usage_bytes: value(of.memory_usage_bytes),
                psi: psi(guest.memory_pressure.as_ref()),
                ..v1::MemoryUsage::default()
            }),
            network: Some(v1::NetworkUsage {
                timestamp,
                default_interface: interfaces.next(),
                interfaces: interfaces.collect(),
            }),
            process: Some(v1::ProcessUsage {
                timestamp,
                process_count: value(of.tasks),
            }),
            containers: containers.collect(),
            io: io(timestamp, guest.io_pressure.as_ref()),
        }),
        windows: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_can_claim_no_more_pressure_than_there_is() {
        let data = PressureData {
            total_nanos: 7,
            avg10: 1205,
            avg60: u32::MAX,
            avg300: 10_000,
        };
        let claimed = Pressure {
            some: Some(data),
            full: None,
        };
        let shown = psi(Some(&claimed)).unwrap();
        let some = shown.some.unwrap();
        assert_eq!((some.total, some.avg10), (7, 12.05));
        assert_eq!((some.avg60, some.avg300), (100.0, 100.0));
        assert!(shown.full.is_none());
        assert_eq!(io(1, None), None);
    }
}
