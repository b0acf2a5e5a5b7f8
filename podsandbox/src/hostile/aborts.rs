//! A pod over which the daemon panics, again and again: here because of who
//! counts machines' ends, which it is told from the pod's own driver.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::agent::Guest;
use super::daemon::{end_on_panic, open, root, this_test};
use super::monitor::Monitor;
use super::{HONEST, HOSTILE, Node, OF_HONEST, OF_HOSTILE};
use crate::error::Step;
use crate::observer::{MachineEnd, NotStarted, Observer};
use crate::record::ExitReason;
use crate::{Error, ErrorKind};

/// Counts to none.
#[derive(Debug)]
struct Panics;

impl Observer for Panics {
    fn pod_started(&self, _: &str, _: &[(Step, Duration)], _: Duration) {}
    fn pod_not_started(&self, _: &str, _: NotStarted) {}
    fn machine_ended(&self, end: MachineEnd) {
        assert_eq!(end, MachineEnd::Stopped, "a fault, for the test");
    }
    fn agent_failed(&self, _: tonic::Code) {}
}

#[test]
fn a_pod_that_ends_the_daemon_twice_is_left_alone_and_others_are_served() {
    let node = Node::new();
    // The other's machine is gone, which its driver tells.
    let _monitor = Monitor::listen(&node.paths(HONEST).control);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    let day = Duration::from_secs(24 * 3600);
    Guest::honest(OF_HONEST, day).listen(&node.paths(HONEST).vsock);
    for start in 1..=3 {
        let mut command = this_test("hostile::aborts::takes_up", &node.root);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if start < 3 {
            let signal = output.status.signal();
            assert_eq!(signal, Some(Signal::SIGABRT as i32), "{start}: {said}");
        } else {
            assert!(output.status.success(), "{said}");
        }
    }
}

#[test]
#[ignore = "run by other tests as a process of its own"]
fn takes_up() {
    let root = root();
    end_on_panic();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let pods = open(&root, Arc::new(Panics)).await;
        let left = pods.pod(HOSTILE).unwrap();
        assert!(!left.is_ready());
        let failure = left.pod.failure.clone().unwrap();
        assert!(failure.contains("has ended drupe 2 times"), "{failure}");
        let exit = left.containers[OF_HOSTILE].exit.clone().unwrap();
        assert_eq!((exit.reason, exit.code), (ExitReason::Unknown, 255));
        assert!(pods.pod(HONEST).unwrap().is_ready());

        // The kubelet makes another in its place.
        let mut spec = left.pod.spec.clone();
        spec.name.attempt += 1;
        let refused = pods.run(spec, None).await.unwrap_err();
        assert!(matches!(refused, Error::EndedDaemon { .. }), "{refused}");
        assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);

        pods.stop(HOSTILE).await.unwrap();
        pods.remove(HOSTILE).await.unwrap();
        assert!(pods.pod(HOSTILE).is_err());
        assert!(pods.pod(HONEST).unwrap().is_ready());
    });
    runtime.shutdown_background();
}
