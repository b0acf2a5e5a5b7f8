use proptest::prelude::*;

use super::EventKind::{Created, Deleted, Started, Stopped};
use super::*;

const POD: &str = "pod";

fn sight(serves: bool, containers: &[(&'static str, ContainerPhase)]) -> Sight<'static> {
    let of = |&(id, phase)| (id, (phase, phase != ContainerPhase::Created));
    Sight {
        pod: POD,
        serves,
        listed: true,
        gone: false,
        containers: containers.iter().map(of).collect(),
    }
}

fn seen(told: &mut Told, sight: &Sight<'_>) -> Vec<(String, EventKind)> {
    told.see(sight)
}

fn told(changes: &[(&str, EventKind)]) -> Vec<(String, EventKind)> {
    let own = |&(id, kind): &(&str, EventKind)| (id.to_owned(), kind);
    changes.iter().map(own).collect()
}

#[test]
fn a_pods_life_is_told_in_order() {
    let mut of = Told::default();
    let starting = Sight {
        listed: false,
        ..sight(false, &[])
    };
    assert_eq!(seen(&mut of, &starting), []);
    assert_eq!(
        seen(&mut of, &sight(true, &[])),
        told(&[(POD, Created), (POD, Started)])
    );
    assert_eq!(seen(&mut of, &sight(true, &[])), []);
    let created = sight(true, &[("c", ContainerPhase::Created)]);
    assert_eq!(seen(&mut of, &created), told(&[("c", Created)]));
    let running = sight(true, &[("c", ContainerPhase::Running)]);
    assert_eq!(seen(&mut of, &running), told(&[("c", Started)]));
    let exited = sight(false, &[("c", ContainerPhase::Exited)]);
    assert_eq!(
        seen(&mut of, &exited),
        told(&[("c", Stopped), (POD, Stopped)])
    );
    assert_eq!(seen(&mut of, &sight(false, &[])), told(&[("c", Deleted)]));
    let gone = Sight {
        gone: true,
        listed: false,
        ..sight(false, &[])
    };
    assert_eq!(seen(&mut of, &gone), told(&[(POD, Deleted)]));
    assert_eq!(seen(&mut of, &gone), []);
}

#[test]
fn a_container_that_was_over_at_once_has_started_unless_it_could_not() {
    let mut of = Told::default();
    seen(&mut of, &sight(true, &[]));
    let over = sight(true, &[("quick", ContainerPhase::Exited)]);
    assert_eq!(
        seen(&mut of, &over),
        told(&[("quick", Created), ("quick", Started), ("quick", Stopped)])
    );
    let mut never = sight(true, &[]);
    never
        .containers
        .insert("never", (ContainerPhase::Exited, false));
    let changes = seen(&mut of, &never);
    assert!(
        !changes.contains(&("never".to_owned(), Started)),
        "{changes:?}"
    );
}

#[test]
fn of_a_create_that_failed_nothing_is_told() {
    let mut of = Told::default();
    seen(&mut of, &sight(true, &[]));
    for phase in [ContainerPhase::Creating, ContainerPhase::Removing] {
        assert_eq!(seen(&mut of, &sight(true, &[("c", phase)])), []);
    }
    assert_eq!(seen(&mut of, &sight(true, &[])), []);
}

const PHASES: [ContainerPhase; 5] = [
    ContainerPhase::Creating,
    ContainerPhase::Created,
    ContainerPhase::Running,
    ContainerPhase::Exited,
    ContainerPhase::Removing,
];

proptest! {
    #[test]
    fn whatever_is_seen_each_is_told_once_and_in_order(
        sights in prop::collection::vec(
            (any::<bool>(), any::<bool>(), prop::option::of((prop::sample::select(&PHASES[..]), any::<bool>()))),
            0..30,
        ),
    ) {
        let mut of = Told::default();
        let mut all = Vec::new();
        let mut sights: Vec<_> = sights.into_iter().map(|sight| (sight, false)).collect();
        sights.push(((false, false, None), true));
        for ((serves, listed, container), gone) in sights {
            all.extend(of.see(&Sight {
                pod: POD,
                serves,
                listed,
                gone,
                containers: container.into_iter().map(|state| ("c", state)).collect(),
            }));
        }
        for id in [POD, "c"] {
            // A container's id may be seen again after it was deleted here.
            let mut before = None;
            for (_, kind) in all.iter().filter(|(of, _)| of == id) {
                match before {
                    None | Some(Deleted) => prop_assert_eq!(*kind, Created),
                    Some(before) => prop_assert!(before < *kind, "{:?} after {:?}", kind, before),
                }
                before = Some(*kind);
            }
            prop_assert!(matches!(before, None | Some(Deleted)), "{:?} is the last", before);
        }
    }
}

#[tokio::test]
async fn a_subscriber_that_reads_nothing_is_told_what_it_missed_and_holds_nobody_up() {
    let events = Events::default();
    let mut idle = events.subscribe();
    for number in 0..=QUEUE {
        drop(events.sender.send(Arc::new(Event {
            id: number.to_string(),
            kind: Created,
            at_nanos: 0,
            pod: snapshot(),
        })));
    }
    assert_eq!(idle.next().await.unwrap().unwrap_err(), Missed(1));
    assert_eq!(idle.next().await.unwrap().unwrap().id, "1");
    drop(events);
}

pub(crate) fn snapshot() -> PodSnapshot {
    let resources = serde_json::json!({
        "cpu_period_us": null, "cpu_quota_us": null, "cpu_shares": null,
        "memory_limit_bytes": null, "memory_swap_limit_bytes": null, "oom_score_adj": 0,
        "cpuset_cpus": "", "cpuset_mems": "", "unified": {},
    });
    let record = serde_json::json!({
        "id": POD, "handler": "microvm", "phase": "ready", "created_at_nanos": 0, "uid": 1,
        "vcpus": 1, "memory_mib": 512, "cgroup": null, "network": null, "vmm_pid": null,
        "failure": null, "timeline": [],
        "spec": {
            "name": { "name": "p", "namespace": "n", "uid": "u", "attempt": 0 },
            "handler": "", "hostname": "p", "log_directory": null, "dns": null,
            "port_mappings": [], "bandwidth": { "ingress_bits": null, "egress_bits": null },
            "labels": {}, "annotations": {}, "sysctls": {}, "share_process_namespace": false,
            "cgroup_parent": null, "resources": resources, "overhead": resources,
        },
    });
    PodSnapshot {
        pod: Arc::new(serde_json::from_value(record).unwrap()),
        containers: BTreeMap::new(),
        agent: None,
        gone: false,
    }
}
