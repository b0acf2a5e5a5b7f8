//! A container is what its image and its request say, and ends with the truth
//! about how.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::eventually;
use tonic::Code;

use crate::{drupe, refused, shares_the_hosts_kernel, took_less, with_drupe, with_node};

#[test]
fn a_container_runs_its_images_command_unless_it_is_given_another() -> Result<()> {
    with_node(|node| {
        let registry = node.registry()?;
        let mut image = e2e::image::busybox()?;
        image.config["Entrypoint"] = serde_json::json!(["echo", "entry"]);
        image.config["Cmd"] = serde_json::json!(["cmd"]);
        registry.push("entry", "latest", &image)?;
        let name = "127.0.0.1:5000/entry:latest";
        node.cri()?.pull(name)?;
        let pod = node.run_pod("entry")?;
        let words = |list: &[&str]| {
            list.iter()
                .map(|word| (*word).to_owned())
                .collect::<Vec<_>>()
        };
        for (container, command, args, expected) in [
            ("neither", vec![], vec![], "entry cmd\n"),
            ("args", vec![], vec!["args"], "entry args\n"),
            ("command", vec!["echo", "own"], vec![], "own\n"),
            ("both", vec!["echo"], vec!["a", "b"], "a b\n"),
        ] {
            let mut config = pod.container_config(container, &[]);
            config.image.get_or_insert_default().image = name.to_owned();
            config.command = words(&command);
            config.args = words(&args);
            let container = pod.start_with(config)?;
            container.wait_exit()?;
            assert_eq!(container.stdout()?, expected, "{}", container.name);
        }
        Ok(())
    })
}

#[test]
fn environment_and_working_directory_come_from_image_and_request() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("env")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config.working_dir = "/made/for/it".to_owned();
        config.envs = vec![
            KeyValue {
                key: "GIVEN".to_owned(),
                value: "a b=\"c\"\n$HOME".into(),
            },
            KeyValue {
                key: "EMPTY".to_owned(),
                value: Vec::new(),
            },
        ];
        let container = pod.start_with(config)?;
        assert_eq!(container.exec(&["pwd"])?, "/made/for/it");
        assert_eq!(
            container.exec(&["sh", "-c", "echo \"$FROM_IMAGE|$GIVEN|${EMPTY-unset}\""])?,
            "yes|a b=\"c\"\n$HOME|"
        );
        assert_eq!(
            container.exec(&[
                "sh",
                "-c",
                "tr '\\0' '\\n' < /proc/1/environ | grep -c ^PATH="
            ])?,
            "1"
        );
        Ok(())
    })
}

#[test]
fn a_working_directory_is_made_before_the_root_becomes_read_only() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("read-only")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config.working_dir = "/made/for/it".to_owned();
        e2e::pod::security(&mut config).readonly_rootfs = true;
        let container = pod.start_with(config)?;
        assert_eq!(container.exec(&["pwd"])?, "/made/for/it");
        assert_eq!(
            container.exec(&["readlink", "/proc/1/cwd"])?,
            "/made/for/it"
        );
        let answer = container.exec_sync(&["touch", "/made/for/it/file"], 20)?;
        let said = String::from_utf8_lossy(&answer.stderr);
        ensure!(said.contains("Read-only file system"), "{said}");
        Ok(())
    })
}

#[test]
fn a_container_has_its_place_among_those_to_be_killed_first() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("scores")?;
        for score in [-998, 0, 789] {
            let mut config = pod.container_config(&format!("c{score}"), e2e::pod::IDLE);
            config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
                oom_score_adj: score,
                ..Default::default()
            });
            let read = ["cat", "/proc/1/oom_score_adj", "/proc/self/oom_score_adj"];
            let scores = pod.start_with(config)?.exec(&read)?;
            assert_eq!(scores, format!("{score}\n{score}"));
        }
        Ok(())
    })
}

#[test]
fn an_exit_code_and_its_reason_are_told() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("ends")?;
        for (name, script, code, reason) in [
            ("fine", "exit 0", 0, "Completed"),
            ("failed", "exit 3", 3, "Error"),
            ("killed", "kill -KILL $$", 137, "Error"),
        ] {
            let before = i64::try_from(
                std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)?
                    .as_nanos(),
            )?;
            // As a child of PID 1, which a signal from inside could not end.
            let container =
                pod.start(name, &["sh", "-c", &format!("sh -c '{script}'; exit $?")])?;
            let status = container.wait_exit()?;
            assert_eq!(
                (status.exit_code, status.reason.as_str()),
                (code, reason),
                "{name}"
            );
            let slack = 1_000_000_000;
            ensure!(
                status.created_at >= before - slack,
                "{name}: created before it was asked for"
            );
            ensure!(
                status.started_at >= status.created_at,
                "{name}: started before it was created"
            );
            // containerd notes the start once the call returns.
            let ordered = status.finished_at >= status.started_at;
            ensure!(
                ordered || shares_the_hosts_kernel(node),
                "{name}: finished before it started"
            );
        }
        Ok(())
    })
}

#[test]
fn a_container_beyond_its_memory_limit_is_oom_killed() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("hungry")?;
        // It keeps what it reads until a line ends.
        let mut config = pod.container_config("c", &["tail", "/dev/zero"]);
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            ..Default::default()
        });
        let container = pod.start_with(config)?;
        let status = container.wait_exit()?;
        assert_eq!(
            (status.reason.as_str(), status.exit_code),
            ("OOMKilled", 137)
        );
        // The pod and its other containers go on.
        pod.start_idle("next")?.exec(&["true"]).map(drop)
    })
}

#[test]
fn cpu_and_memory_limits_are_in_force_inside() -> Result<()> {
    with_node(|node| {
        if shares_the_hosts_kernel(node) {
            return Ok(()); // The host may have cgroup v1.
        }
        let pod = node.run_pod("limited")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 20_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        });
        let container = pod.start_with(config)?;
        assert_eq!(
            container.exec(&["cat", "/sys/fs/cgroup/cpu.max"])?,
            "20000 100000"
        );
        // What runc makes of 512 shares.
        assert_eq!(container.exec(&["cat", "/sys/fs/cgroup/cpu.weight"])?, "59");
        assert_eq!(
            container.exec(&["cat", "/sys/fs/cgroup/memory.max"])?,
            (64 << 20).to_string()
        );
        // Two seconds of work in which it gets a fifth of a CPU.
        let used = "timeout 2 sh -c 'while :; do :; done'; cat /sys/fs/cgroup/cpu.stat";
        let stat = container.exec(&["sh", "-c", used])?;
        let figure = |name: &str| -> Result<u64> {
            let value = stat.lines().find_map(|line| line.strip_prefix(name));
            Ok(value.with_context(|| stat.clone())?.trim().parse()?)
        };
        ensure!(figure("nr_throttled ")? > 5, "not held back: {stat}");
        ensure!(
            figure("usage_usec ")? < 1_000_000,
            "more than its quota: {stat}"
        );
        Ok(())
    })
}

#[test]
fn stopping_asks_first_and_kills_only_who_does_not_listen() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("stops")?;
        let polite = pod.start(
            "polite",
            &[
                "sh",
                "-c",
                "trap 'exit 7' TERM; echo listening; while :; do sleep 1000 & wait $!; done",
            ],
        )?;
        // As the first process of its namespace it is not even sent a signal
        // that it has not asked for yet.
        eventually("the shell to listen", Duration::from_secs(10), || {
            let output = polite.stdout()?;
            ensure!(output.contains("listening"), "output: {output:?}");
            Ok::<_, anyhow::Error>(())
        })?;
        let begun = Instant::now();
        polite.stop(20)?;
        took_less(begun, Duration::from_secs(10))?;
        assert_eq!(polite.status()?.exit_code, 7);

        let deaf = pod.start(
            "deaf",
            &["sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
        )?;
        let begun = Instant::now();
        deaf.stop(2)?;
        ensure!(
            begun.elapsed() >= Duration::from_secs(2),
            "killed after {:?}, within its grace",
            begun.elapsed()
        );
        assert_eq!(deaf.status()?.exit_code, 137);
        deaf.stop(2).context("a second stop")?;
        deaf.remove()?;
        deaf.remove().context("a second removal")
    })
}

#[test]
fn the_signal_to_stop_with_is_the_one_asked_for() -> Result<()> {
    let node = drupe()?;
    node.pull_busybox()?;
    let pod = node.run_pod("signals")?;
    // By number, since shells' names for it differ.
    let script = "trap 'exit 7' TERM; trap 'exit 8' 36; echo listening; \
                  while :; do sleep 1000 & wait $!; done";
    let mut config = pod.container_config("c", &["sh", "-c", script]);
    config.stop_signal = Signal::Sigrtminplus2.into();
    let container = pod.start_with(config)?;
    assert_eq!(container.status()?.stop_signal(), Signal::Sigrtminplus2);
    eventually("the shell to listen", Duration::from_secs(10), || {
        let output = container.stdout()?;
        ensure!(output.contains("listening"), "output: {output:?}");
        Ok::<_, anyhow::Error>(())
    })?;
    container.stop(20)?;
    assert_eq!(container.status()?.exit_code, 8);

    let default = pod.start_idle("default")?;
    assert_eq!(default.status()?.stop_signal(), Signal::Sigterm);
    let mut config = pod.container_config("unknown", e2e::pod::IDLE);
    config.stop_signal = 66;
    refused(
        pod.create(config).map(drop),
        Code::InvalidArgument,
        &["config.stop_signal", "66"],
    )?;
    node.finish()
}

#[test]
fn the_images_signal_to_stop_with_counts_unless_another_is_asked_for() -> Result<()> {
    with_node(|node| {
        let mut image = e2e::image::busybox()?;
        image.config["StopSignal"] = serde_json::json!("SIGUSR1");
        node.registry()?.push("signals", "latest", &image)?;
        let name = "127.0.0.1:5000/signals:latest";
        node.cri()?.pull(name)?;
        let pod = node.run_pod("image-signal")?;
        let script = "trap 'exit 7' TERM; trap 'exit 9' USR1; echo listening; \
                      while :; do sleep 1000 & wait $!; done";
        let mut config = pod.container_config("c", &["sh", "-c", script]);
        config.image.get_or_insert_default().image = name.to_owned();
        let container = pod.start_with(config)?;
        eventually("the shell to listen", Duration::from_secs(10), || {
            let output = container.stdout()?;
            ensure!(output.contains("listening"), "output: {output:?}");
            Ok::<_, anyhow::Error>(())
        })?;
        container.stop(20)?;
        assert_eq!(container.status()?.exit_code, 9);
        Ok(())
    })
}

#[test]
fn an_ended_container_is_followed_by_its_next_attempt() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("again")?;
        let first = pod.start("c", &["sh", "-c", "echo mark > /left; exit 1"])?;
        first.wait_exit()?;
        let mut config = pod.container_config("c", &["sh", "-c", "test ! -e /left"]);
        config.metadata = Some(ContainerMetadata {
            name: "c".to_owned(),
            attempt: 1,
        });
        let second = pod.start_with(config)?;
        assert_eq!(
            second.wait_exit()?.exit_code,
            0,
            "the second attempt sees what the first has written"
        );
        Ok(())
    })
}

#[test]
fn more_containers_come_and_go_than_a_pod_holds_at_once() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("turnover")?;
        for n in 0..12 {
            let container = pod.start(&format!("c{n}"), &["true"])?;
            assert_eq!(container.wait_exit()?.exit_code, 0);
            container.remove()?;
        }
        Ok(())
    })
}

#[test]
fn containers_are_found_by_id_pod_state_and_label() -> Result<()> {
    with_node(|node| {
        let cri = node.cri()?;
        let pod = node.run_pod("listed")?;
        let running = pod.start_idle("running")?;
        let ended = pod.start("ended", &["true"])?;
        ended.wait_exit()?;
        let mut config = pod.container_config("created", &["true"]);
        config.annotations = HashMap::from([("note".to_owned(), "kept".to_owned())]);
        let created = pod.create(config.clone())?;

        let status = created.status()?;
        assert_eq!(status.annotations, config.annotations);
        assert_eq!(status.labels, config.labels);
        assert_eq!(status.metadata, config.metadata);
        assert_eq!(status.log_path, created.log.display().to_string());
        ensure!(
            !status.image_ref.is_empty() && !status.image_id.is_empty()
                || shares_the_hosts_kernel(node)
        );

        let find = |filter: ContainerFilter| -> Result<Vec<String>> {
            let request = ListContainersRequest {
                filter: Some(filter),
            };
            let mut names: Vec<_> = cri
                .list_containers(request)?
                .containers
                .into_iter()
                .map(|container| container.metadata.unwrap_or_default().name)
                .collect();
            names.sort();
            Ok(names)
        };
        let by_state = |state: ContainerState| ContainerFilter {
            state: Some(ContainerStateValue {
                state: state.into(),
            }),
            ..Default::default()
        };
        assert_eq!(
            find(ContainerFilter::default())?,
            ["created", "ended", "running"]
        );
        assert_eq!(
            find(ContainerFilter {
                id: running.id.clone(),
                ..Default::default()
            })?,
            ["running"]
        );
        assert_eq!(
            find(ContainerFilter {
                pod_sandbox_id: pod.id.clone(),
                ..Default::default()
            })?
            .len(),
            3
        );
        assert_eq!(
            find(by_state(ContainerState::ContainerRunning))?,
            ["running"]
        );
        assert_eq!(find(by_state(ContainerState::ContainerExited))?, ["ended"]);
        assert_eq!(
            find(by_state(ContainerState::ContainerCreated))?,
            ["created"]
        );
        let label_selector = HashMap::from([("container".to_owned(), "ended".to_owned())]);
        assert_eq!(
            find(ContainerFilter {
                label_selector,
                ..Default::default()
            })?,
            ["ended"]
        );
        Ok(())
    })
}
