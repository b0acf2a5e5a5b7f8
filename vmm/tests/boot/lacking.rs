//! Pods on a node whose kernel lacks a part of their confinement.

use std::fs;

use drupe_vmm::filter::{Answer, List, Program};
use nix::errno::Errno;
use vmm_client::{Confinement, SpawnError};

use crate::common::{Setup, prepare, tempdir, uml_kernel};

/// Starts a pod on a node whose kernel does not have `call`.
fn start_without(call: &'static str, confinement: Confinement) -> Result<String, SpawnError> {
    let start = move || {
        // Of this thread and of what it starts.
        let list = List::new(Answer::Allow).refuse(&[call], Errno::ENOSYS);
        Program::new(&list).install().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let dir = tempdir();
            let setup = Setup {
                confinement,
                unsealed: true,
                script: "sleep 1000",
                ..Setup::default()
            };
            let (request, _cleanup) = prepare(&uml_kernel().unwrap(), &setup, dir.path());
            let mut process = vmm_client::spawn(request).await?;
            process.kill();
            process.wait().await.unwrap();
            Ok(fs::read_to_string(dir.path().join("vmm.log")).unwrap())
        })
    };
    std::thread::spawn(start).join().unwrap()
}

#[test]
fn a_node_that_lacks_a_wall_starts_no_pod_that_is_to_have_all() {
    if uml_kernel().is_none() {
        return;
    }
    for (call, wall) in [
        ("landlock_create_ruleset", "Landlock"),
        ("seccomp", "seccomp filters"),
    ] {
        let log = start_without(call, Confinement::BestEffort);
        let log = log.unwrap();
        assert!(
            log.contains(wall) && log.contains("runs without it"),
            "{log}"
        );
        match start_without(call, Confinement::Required) {
            Err(SpawnError::Unconfined { message }) => assert!(
                message.contains(wall) && message.contains("`confinement: required`"),
                "{message}"
            ),
            other => panic!("without {call}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_pod_that_is_to_have_all_walls_runs_where_there_are_all() {
    let Some(kernel) = uml_kernel() else { return };
    let dir = tempdir();
    let setup = Setup {
        confinement: Confinement::Required,
        script: "sleep 1000",
        ..Setup::default()
    };
    let (request, _cleanup) = prepare(&kernel, &setup, dir.path());
    match vmm_client::spawn(request).await {
        Ok(mut process) => {
            let log = fs::read_to_string(dir.path().join("vmm.log")).unwrap();
            assert!(!log.contains("runs without it"), "{log}");
            process.kill();
            process.wait().await.unwrap();
        }
        // Linux before 6.12.
        Err(SpawnError::Unconfined { message }) => {
            assert!(message.contains("a part of Landlock only"), "{message}");
        }
        Err(other) => panic!("{other:?}"),
    }
}
