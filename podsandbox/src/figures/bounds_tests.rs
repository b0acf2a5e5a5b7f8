use proptest::prelude::*;

use super::super::host::Disk;
use super::*;
use crate::cgroup::Charge;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SECOND: u64 = 1_000_000_000;

fn pod(containers: &[(&str, Option<u64>)]) -> Facts {
    let named = containers
        .iter()
        .map(|(id, limit)| ((*id).to_owned(), *limit));
    Facts {
        machine_bytes: 512 * MIB,
        memory_bytes: 512 * MIB,
        containers: named.collect(),
    }
}

fn host(cpu_seconds: u64, memory: u64, disk: u64) -> Host {
    Host {
        charge: Some(Charge {
            memory_bytes: memory,
            working_set_bytes: memory + MIB,
            usage_bytes: memory + 2 * MIB,
            cpu_nanos: cpu_seconds * SECOND,
            tasks: Some(9),
        }),
        huge_bytes: 0,
        scratch: Some(Disk {
            allocated: disk,
            size: 10 * GIB,
        }),
    }
}

fn container(id: &str, cpu_seconds: u64, memory: u64, disk: u64) -> ContainerStats {
    ContainerStats {
        id: id.to_owned(),
        cpu_usage_nanos: cpu_seconds * SECOND,
        cpu_user_nanos: cpu_seconds * SECOND,
        memory_usage_bytes: memory,
        memory_working_set_bytes: memory,
        fs_used_bytes: disk,
        ..ContainerStats::default()
    }
}

/// Everything that can be claimed.
fn everything(id: &str) -> ContainerStats {
    let data = PressureData {
        total_nanos: u64::MAX,
        avg10: u32::MAX,
        avg60: u32::MAX,
        avg300: u32::MAX,
    };
    let pressure = Some(Pressure {
        some: Some(data),
        full: Some(data),
    });
    let disk = DiskStats {
        major: 254,
        minor: 0,
        read_bytes: u64::MAX,
        written_bytes: u64::MAX,
        reads: u64::MAX,
        writes: u64::MAX,
        name: "\x1b]0;scratch-of-somebody-else".to_owned(),
    };
    ContainerStats {
        id: id.to_owned(),
        cpu_usage_nanos: u64::MAX,
        memory_usage_bytes: u64::MAX,
        memory_working_set_bytes: u64::MAX,
        memory_rss_bytes: u64::MAX,
        memory_page_faults: u64::MAX,
        memory_major_page_faults: u64::MAX,
        memory_limit_bytes: u64::MAX,
        pids: u64::MAX,
        fs_used_bytes: u64::MAX,
        fs_inodes_used: u64::MAX,
        swap_usage_bytes: u64::MAX,
        cpu_user_nanos: u64::MAX,
        cpu_system_nanos: u64::MAX,
        cpu_periods: u64::MAX,
        cpu_throttled_periods: u64::MAX,
        cpu_throttled_nanos: u64::MAX,
        cpu_pressure: pressure,
        memory_pressure: pressure,
        io_pressure: pressure,
        memory_file_bytes: u64::MAX,
        memory_mapped_file_bytes: u64::MAX,
        memory_kernel_bytes: u64::MAX,
        memory_peak_bytes: Some(u64::MAX),
        memory_limit_hits: u64::MAX,
        oom_kills: u64::MAX,
        pids_limit: u64::MAX,
        processes: u64::MAX,
        disks: vec![disk; 1000],
    }
}

fn said(containers: Vec<ContainerStats>) -> StatsResponse {
    StatsResponse {
        containers,
        guest: Some(GuestStats::default()),
        time_unix_nanos: 0,
    }
}

/// The nanoseconds, bytes and counts of a container.
fn numbers(of: &ContainerStats) -> Vec<u64> {
    // As JSON has them: none is forgotten.
    let text = format!("{of:?}");
    let words = text.split(|c: char| !c.is_ascii_digit());
    words.filter_map(|word| word.parse().ok()).collect()
}

#[test]
fn what_an_honest_guest_says_stays_as_it_is() {
    let mut seen = Seen::default();
    let pod = pod(&[("a", Some(128 * MIB)), ("b", None)]);
    let now = Instant::now();
    for second in 1..300 {
        let guest = said(vec![
            container("a", second / 2, 100 * MIB, second * MIB),
            container("b", second / 3, 20 * MIB, 0),
        ]);
        // The guest's kernel and its cache are the pod's, not a container's.
        let host = host(second + 1, 300 * MIB, second * MIB + 20 * MIB);
        let at = now + Duration::from_secs(second);
        let figures = seen.bounded(Some(&guest), &host, &pod, at);
        for of in &guest.containers {
            let told = &figures.containers[&of.id];
            assert_eq!(told.cpu_usage_nanos, of.cpu_usage_nanos);
            assert_eq!(told.cpu_user_nanos, of.cpu_user_nanos);
            assert_eq!(told.memory_working_set_bytes, of.memory_working_set_bytes);
            assert_eq!(told.fs_used_bytes, of.fs_used_bytes);
        }
        assert_eq!(figures.containers["a"].memory_limit_bytes, 128 * MIB);
        assert_eq!(figures.pod.memory_working_set_bytes, 301 * MIB);
        assert_eq!(figures.pod.memory_available_bytes, 211 * MIB);
        assert_eq!(figures.pod.cpu_nanos, (second + 1) * SECOND);
        assert_eq!(figures.pod.tasks, 9);
    }
}

#[test]
fn a_guest_that_says_nothing_hides_nothing() {
    let pod = pod(&[("a", None), ("b", None)]);
    let now = Instant::now();
    let zeros = said(vec![container("a", 0, 0, 0), container("b", 0, 0, 0)]);
    let empty = said(Vec::new());
    for guest in [Some(&zeros), Some(&empty), None] {
        let mut seen = Seen::default();
        for seconds in [0, 30, 61, 90] {
            let host = host(500, 400 * MIB, 4 * GIB);
            let at = now + Duration::from_secs(seconds);
            let figures = seen.bounded(guest, &host, &pod, at);
            assert_eq!(figures.pod.memory_working_set_bytes, 401 * MIB);
            assert_eq!(figures.pod.cpu_nanos, 500 * SECOND);
            let disk = sum(&figures.containers, |of| of.fs_used_bytes);
            if seconds > 60 {
                assert_eq!(disk, 4 * GIB - 4 * GIB / DISK_SLACK_PART, "{seconds} s");
            } else {
                // It may be deleted and about to be given back.
                assert_eq!(disk, 0);
            }
        }
    }
}

#[test]
fn what_is_given_back_within_a_minute_is_nobodys() {
    let (mut seen, pod, now) = (Seen::default(), pod(&[("a", None)]), Instant::now());
    let guest = said(vec![container("a", 0, 0, 100 * MIB)]);
    for second in 0..600 {
        // A gigabyte is deleted and trimmed, every forty seconds.
        let waits = second % 40 < 35;
        let disk = 120 * MIB + if waits { GIB } else { 0 };
        let at = now + Duration::from_secs(second);
        let figures = seen.bounded(Some(&guest), &host(1, MIB, disk), &pod, at);
        assert_eq!(
            figures.containers["a"].fs_used_bytes,
            100 * MIB,
            "{second} s"
        );
    }
}

#[test]
fn a_guest_that_says_everything_gets_what_the_node_knows() {
    let mut seen = Seen::default();
    let pod = pod(&[("a", Some(64 * MIB)), ("b", None)]);
    let host = host(500, 400 * MIB, 4 * GIB);
    let mut guest = said(vec![everything("a"), everything("b"), everything("other")]);
    let interface = InterfaceStats {
        name: "eth0\nof somebody else".to_owned(),
        rx_bytes: u64::MAX,
        ..InterfaceStats::default()
    };
    guest.guest = Some(GuestStats {
        cpu_usage_nanos: u64::MAX,
        memory_total_bytes: u64::MAX,
        process_count: u64::MAX,
        interfaces: vec![interface; 1000],
        scratch_bytes: u64::MAX,
        scratch_inodes: u64::MAX,
        scratch_free_inodes: u64::MAX,
        ..GuestStats::default()
    });
    let figures = seen.bounded(Some(&guest), &host, &pod, Instant::now());
    let (a, b) = (&figures.containers["a"], &figures.containers["b"]);
    assert_eq!(figures.containers.len(), 2);
    assert_eq!(a.cpu_usage_nanos, 500 * SECOND);
    assert!(a.memory_working_set_bytes <= 64 * MIB);
    assert!(b.memory_working_set_bytes + a.memory_working_set_bytes <= 400 * MIB);
    assert_eq!(a.fs_used_bytes + b.fs_used_bytes, 10 * GIB);
    assert_eq!((a.memory_limit_bytes, b.memory_limit_bytes), (64 * MIB, 0));
    assert_eq!(a.disks.len(), MAX_DISKS);
    assert_eq!(a.disks[0].name, " ]0;scratch-of-");
    for of in [a, b] {
        assert!(
            numbers(of).iter().all(|number| *number <= MAX_NANOS),
            "{of:?}"
        );
    }
    let guest = &figures.guest;
    assert_eq!(guest.interfaces.len(), MAX_INTERFACES);
    assert_eq!(guest.interfaces[0].name, "eth0 of somebod");
    assert_eq!(guest.interfaces[0].rx_bytes, MAX_COUNT);
    assert_eq!(guest.scratch_bytes, 10 * GIB);
    assert_eq!(guest.process_count, MAX_TASKS);
    assert_eq!(figures.pod.cpu_nanos, 500 * SECOND);
    assert_eq!(figures.pod.memory_working_set_bytes, 401 * MIB);

    // Nor does it get more by saying it again.
    let figures = seen.bounded(
        Some(&said(vec![everything("a"), everything("b")])),
        &host,
        &pod,
        Instant::now(),
    );
    assert_eq!(figures.containers["a"].cpu_usage_nanos, 500 * SECOND);
    assert_eq!(figures.containers["b"].cpu_usage_nanos, 500 * SECOND);
}

#[test]
fn without_the_nodes_figures_the_machines_size_is_the_bound() {
    let mut seen = Seen::default();
    let unknown = Host::default();
    let pod = pod(&[("a", None)]);
    let figures = seen.bounded(
        Some(&said(vec![everything("a")])),
        &unknown,
        &pod,
        Instant::now(),
    );
    assert_eq!(figures.containers["a"].memory_usage_bytes, 512 * MIB);
    assert!(figures.charge.is_none());
}

/// One round: what the guest says of three containers, or that it is silent,
/// and how the node's own counters go on.
fn round() -> impl Strategy<Value = (Option<Vec<[u64; 4]>>, u64, u64, u64)> {
    let number = prop_oneof![Just(0), Just(u64::MAX), 0..100 * SECOND, any::<u64>()];
    let of_one = prop::collection::vec(number, 4).prop_map(|n| [n[0], n[1], n[2], n[3]]);
    let of_all = prop::option::weighted(0.8, prop::collection::vec(of_one, 0..4));
    (of_all, 0..20 * SECOND, 0..512 * MIB, 0..10 * GIB)
}

proptest! {
    #[test]
    fn no_guest_gets_beyond_what_the_node_knows(rounds in prop::collection::vec(round(), 1..30)) {
        let names = ["a", "b", "c"];
        let pod = pod(&[("a", Some(64 * MIB)), ("b", None), ("c", None)]);
        let (mut seen, mut now) = (Seen::default(), Instant::now());
        let (mut pod_nanos, mut before): (u64, Option<Figures>) = (SECOND, None);
        for (guest, cpu, memory, disk) in rounds {
            pod_nanos += cpu;
            let mut host = host(0, memory, disk);
            if let Some(charge) = &mut host.charge {
                charge.cpu_nanos = pod_nanos;
            }
            let guest = guest.map(|all| {
                let one = |(id, n): (&&str, [u64; 4])| ContainerStats {
                    id: (*id).to_owned(),
                    cpu_usage_nanos: n[0],
                    cpu_user_nanos: n[1],
                    memory_working_set_bytes: n[2],
                    memory_usage_bytes: n[2],
                    fs_used_bytes: n[3],
                    oom_kills: n[1],
                    ..ContainerStats::default()
                };
                said(names.iter().zip(all).map(one).collect())
            });
            let figures = seen.bounded(guest.as_ref(), &host, &pod, now);
            let all = &figures.containers;
            prop_assert!(sum(all, |of| of.memory_working_set_bytes) <= memory);
            prop_assert!(sum(all, |of| of.fs_used_bytes) <= (10 * GIB).max(disk));
            for of in all.values() {
                prop_assert!(of.cpu_usage_nanos <= pod_nanos);
                prop_assert!(of.memory_working_set_bytes <= of.memory_usage_bytes);
                prop_assert!(of.oom_kills <= MAX_COUNT);
            }
            if let Some(before) = &before {
                let mut more = 0;
                for (id, was) in &before.containers {
                    // One that was never told of has a part of the disk alone.
                    let Some(is) = all.get(id) else {
                        prop_assert_eq!(was.cpu_usage_nanos, 0);
                        continue;
                    };
                    prop_assert!(is.cpu_usage_nanos >= was.cpu_usage_nanos);
                    prop_assert!(is.cpu_user_nanos >= was.cpu_user_nanos);
                    prop_assert!(is.oom_kills >= was.oom_kills);
                    more += is.cpu_usage_nanos - was.cpu_usage_nanos;
                }
                prop_assert!(more <= pod_nanos);
            }
            before = Some(figures);
            now += Duration::from_secs(10);
        }
    }
}
