//! What hostile guests do.

use std::time::Duration;

use agent_api::{
    ContainerState, ContainerStats, Event, ExecSyncEvent, Exit, ListContainersResponse, OomKill,
    StatsResponse, container_state, event, exec_sync_event,
};
use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::agent::{Answer, Guest, at_once, exit_of, framed, in_turn, message};
use super::{OF_HOSTILE, check};

const TIME: Duration = Duration::from_secs(2);

/// One that does as agents do, in everything that is not scripted otherwise.
fn guest(answers: &[(&'static str, Answer)]) -> Guest {
    Guest::honest(OF_HOSTILE, TIME / 3).but(answers)
}

/// Of two bytes each, and of hundreds in memory.
fn empty_entries(bytes: usize) -> Bytes {
    framed(&[0x0a, 0].repeat(bytes / 2))
}

fn listing(state: ContainerState) -> Bytes {
    message(&ListContainersResponse {
        containers: vec![state],
    })
}

fn event(container: &str, event: Option<event::Event>) -> Bytes {
    message(&Event {
        container_id: container.to_owned(),
        event,
    })
}

fn output(bytes: usize) -> Bytes {
    message(&ExecSyncEvent {
        event: Some(exec_sync_event::Event::Stdout(vec![b'x'; bytes])),
    })
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, payload: &[u8]) -> Bytes {
    let [.., high, middle, low] = payload.len().to_be_bytes();
    let head = [high, middle, low, kind, flags, 0, 0, 0, 0];
    [&head, payload].concat().into()
}

const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const UNKNOWN: u8 = 0x55;

fn frames_of(kind: u8, flags: u8, payload: &[u8]) -> Guest {
    Guest::Raw(frame(SETTINGS, 0, &[]), frame(kind, flags, payload))
}

#[test]
fn two_million_empty_entries_take_no_memory() {
    for bytes in [4 << 20, 60 << 10] {
        let flood = at_once(empty_entries(bytes));
        let all = [("Stats", flood.clone()), ("ListContainers", flood)];
        check(&guest(&all), TIME);
    }
}

#[test]
fn an_answer_without_end_is_cut_off() {
    let stats = StatsResponse {
        containers: vec![ContainerStats::default(); 100],
        ..StatsResponse::default()
    };
    let endless = [
        ("Stats", Answer::Endless(message(&stats))),
        ("ListContainers", Answer::Endless(empty_entries(60 << 10))),
        ("ExecSync", Answer::Endless(output(64 << 10))),
    ];
    check(&guest(&endless), TIME);
}

#[test]
fn a_flood_of_events_is_taken_a_few_at_a_time() {
    let oom_kill = event(OF_HOSTILE, Some(event::Event::OomKill(OomKill {})));
    for flood in [
        exit_of(OF_HOSTILE),
        exit_of("nobody's"),
        oom_kill,
        framed(&[]),
    ] {
        check(&guest(&[("Events", Answer::Endless(flood))]), TIME);
    }
}

#[test]
fn who_says_something_else_each_time_has_nothing_written() {
    let states = (1..100).map(|number| ContainerState {
        id: OF_HOSTILE.to_owned(),
        phase: container_state::Phase::Running.into(),
        pid: number,
        started_at_unix_nanos: number.into(),
        uid: number,
        supplemental_groups: (number..number + 1200).collect(),
        ..ContainerState::default()
    });
    let lists = in_turn(states.map(|state| at_once(listing(state))));
    // The stream ends at once, so that the daemon lists again.
    let over = Answer::Messages(Vec::new());
    check(&guest(&[("ListContainers", lists), ("Events", over)]), TIME);
    check(&Guest::Closes, TIME);
}

#[test]
fn a_guest_that_stalls_holds_nobody_up() {
    for stalled in [
        Answer::Mute,
        Answer::Held(Bytes::new()),
        Answer::Held(Bytes::from_static(&[0, 0, 0, 0xff, 0xff, 1])),
    ] {
        let methods = ["Stats", "ListContainers", "Events", "ExecSync"];
        check(&guest(&methods.map(|name| (name, stalled.clone()))), TIME);
    }
}

#[test]
fn control_frames_are_not_answered_for_ever() {
    for flood in [
        frames_of(PING, 0, &[0; 8]),
        // An answer to a ping that nobody sent.
        frames_of(PING, 1, &[0; 8]),
        frames_of(SETTINGS, 0, &[]),
        frames_of(WINDOW_UPDATE, 0, &[0, 0, 0, 1]),
        frames_of(UNKNOWN, 0, &[]),
        Guest::Raw(
            Bytes::from_static(b"HTTP/1.1 200 OK\r\n"),
            Bytes::from_static(b"\xff"),
        ),
    ] {
        check(&flood, TIME);
    }
}

#[test]
fn texts_that_are_long_or_act_do_no_harm() {
    let long = "\x1b[31m\u{202e}".repeat(1000);
    let exit = Exit {
        code: -1,
        finished_at_unix_nanos: i64::MIN,
        start_error: long.clone(),
        ..Exit::default()
    };
    let all = [
        ("Stats", Answer::Refused(long.clone())),
        ("ListContainers", Answer::Refused(long.repeat(10))),
        (
            "Events",
            at_once(event(OF_HOSTILE, Some(event::Event::Exit(exit)))),
        ),
    ];
    check(&guest(&all), TIME);
}

fn bytes() -> impl Strategy<Value = Bytes> {
    let likely = prop::sample::select(vec![
        exit_of(OF_HOSTILE),
        exit_of("nobody's"),
        framed(&[]),
        empty_entries(60 << 10),
        empty_entries(4 << 20),
        output(64 << 10),
        output(1),
        message(&StatsResponse::default()),
        listing(ContainerState {
            id: OF_HOSTILE.to_owned(),
            ..ContainerState::default()
        }),
        Bytes::from_static(&[1, 0, 0, 0, 0]),
        Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]),
    ]);
    let any = prop::collection::vec(any::<u8>(), 1..400).prop_map(|bytes| framed(&bytes));
    prop_oneof![3 => likely, 1 => any]
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        bytes().prop_map(at_once),
        bytes().prop_map(Answer::Endless),
        bytes().prop_map(Answer::Broken),
        bytes().prop_map(Answer::Held),
        Just(Answer::Mute),
        ".{0,2000}".prop_map(Answer::Refused),
    ]
}

/// Each is another guest; none is made smaller, as each takes its time.
#[test]
fn whatever_a_guest_does_costs_no_more() {
    let mut runner = TestRunner::new(Config {
        cases: 5,
        max_shrink_iters: 0,
        failure_persistence: None,
        ..Config::default()
    });
    let all = (answer(), answer(), answer(), answer());
    let guests = all.prop_map(|(stats, list, events, exec)| {
        guest(&[
            ("Stats", stats),
            ("ListContainers", list),
            ("Events", events),
            ("ExecSync", exec),
        ])
    });
    let checked = runner.run(&guests, |guest| {
        check(&guest, TIME);
        Ok(())
    });
    checked.unwrap();
}
