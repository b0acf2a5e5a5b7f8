//! Commands run inside a container, beside its own process.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::eventually;
use tonic::Code;

use crate::{refused, shares_the_hosts_kernel, took_less, with_node};

#[test]
fn a_command_gives_its_output_and_exit_code() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("exec")?.start_idle("c")?;
        let answer = container.exec_sync(&["sh", "-c", "echo out; echo err >&2; exit 42"], 20)?;
        assert_eq!(answer.exit_code, 42);
        assert_eq!(answer.stdout, b"out\n");
        assert_eq!(answer.stderr, b"err\n");
        Ok(())
    })
}

#[test]
fn a_commands_output_is_byte_exact_up_to_megabytes() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("bulk")?.start_idle("c")?;
        let script = "head -c 3000000 /dev/urandom > /blob; sha256sum < /blob >&2; cat /blob";
        let answer = container.exec_sync(&["sh", "-c", script], 60)?;
        assert_eq!(answer.stdout.len(), 3_000_000);
        let sum = e2e::layer::digest(&answer.stdout).replace("sha256:", "");
        ensure!(
            String::from_utf8_lossy(&answer.stderr).starts_with(&sum),
            "the bytes differ"
        );
        Ok(())
    })
}

#[test]
fn a_command_that_takes_too_long_is_killed_with_its_children() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("slow")?.start_idle("c")?;
        let begun = Instant::now();
        if shares_the_hosts_kernel(node) {
            return Ok(()); // containerd waits for whoever still holds the output.
        }
        let answer = container.exec_sync(&["sh", "-c", "sleep 87654 & sleep 87654; true"], 1);
        refused(answer, Code::DeadlineExceeded, &[])?;
        let took = begun.elapsed();
        ensure!(
            took >= Duration::from_secs(1) && took < e2e::patient(Duration::from_secs(10)),
            "answered after {took:?}"
        );
        eventually(
            "the killed command to be gone",
            Duration::from_secs(10),
            || {
                let processes = container.exec(&["ps", "-o", "args"])?;
                ensure!(!processes.contains("87654"), "{processes}");
                Ok::<_, anyhow::Error>(())
            },
        )
    })
}

#[test]
fn a_command_that_leaves_a_background_process_still_answers() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("daemonic")?.start_idle("c")?;
        let begun = Instant::now();
        let answer = container.exec_sync(
            &["sh", "-c", "sleep 76543 > /dev/null 2>&1 & echo started"],
            20,
        )?;
        assert_eq!(answer.stdout, b"started\n");
        took_less(begun, Duration::from_secs(10))?;
        Ok(())
    })
}

#[test]
fn many_commands_run_at_once() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("many")?.start_idle("c")?;
        std::thread::scope(|scope| {
            let container = &container;
            let runs: Vec<_> = (0..16)
                .map(|n| {
                    scope.spawn(move || {
                        container.exec(&["sh", "-c", &format!("echo {n}; sleep 0.1")])
                    })
                })
                .collect();
            for (n, run) in runs.into_iter().enumerate() {
                assert_eq!(run.join().expect("thread")?, n.to_string());
            }
            Ok(())
        })
    })
}

#[test]
fn a_container_without_stdin_reads_nothing() -> Result<()> {
    with_node(|node| {
        assert_eq!(
            node.run_pod("eof")?.run_to_end("c", "cat; echo end")?,
            "end\n"
        );
        Ok(())
    })
}

#[test]
fn a_container_with_stdin_waits_for_whoever_attaches() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("stdin")?;
        for (name, stdin) in [("open", true), ("closed", false)] {
            let mut config = pod.container_config(name, &["readlink", "/proc/self/fd/0"]);
            config.stdin = stdin;
            let container = pod.start_with(config)?;
            container.wait_exit()?;
            let target = container.stdout()?;
            assert_eq!(target.starts_with("pipe:"), stdin, "{name}: {target}");
        }
        Ok(())
    })
}

#[test]
fn a_container_gets_a_terminal_when_it_asks_for_one() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("terminal")?;
        let mut config = pod.container_config("c", &["sh", "-c", "tty; test -t 1 && echo yes"]);
        config.tty = true;
        let container = pod.start_with(config)?;
        assert_eq!(container.wait_exit()?.exit_code, 0);
        let output = container.output()?.replace('\r', "");
        ensure!(
            output.starts_with("/dev/") && output.ends_with("yes\n"),
            "{output:?}"
        );
        Ok(())
    })
}

#[test]
fn a_containers_orphans_are_reaped_and_end_with_it() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("orphans")?;
        let container = pod.start("c", &["sh", "-c", "sh -c 'sleep 65432 &'; exit 0"])?;
        assert_eq!(container.wait_exit()?.exit_code, 0);
        let other = pod.start_idle("other")?;
        let processes = other.exec(&["ps", "-o", "args"])?;
        ensure!(!processes.contains("65432"), "{processes}");
        Ok(())
    })
}
