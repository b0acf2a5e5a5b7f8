//! Output, commands, terminals and ports.

use std::fs;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::pod::security;
use e2e::{Server, eventually};
use tonic::Code;

use super::{
    NETWORK, PATIENCE, Shared, client, container_config, crictl, get, idle, pod_config, run,
    run_by_handler,
};
use crate::{with_drupe, with_node};

#[test]
fn output_exit_codes_users_and_volumes_are_as_in_any_pod() -> Result<()> {
    with_node(|node| {
        let pod = run(node, "usual", NETWORK)?;
        let volume = node.dir.join("volume");
        fs::create_dir(&volume)?;
        fs::write(volume.join("given"), "from the node")?;
        let script = "echo out; echo err >&2; id -u; cat /v/given; echo back > /v/taken; exit 3";
        let mut config = container_config(&pod, "c", &["sh", "-c", script], NETWORK);
        config.mounts = vec![Mount {
            container_path: "/v".to_owned(),
            host_path: volume.display().to_string(),
            ..Default::default()
        }];
        let container = pod.start_with(config)?;
        let status = container.wait_exit()?;
        assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
        ensure!(status.finished_at >= status.started_at, "{status:?}");
        assert_eq!(container.stdout()?, "out\n0\nfrom the node");
        ensure!(container.output()?.contains("err\n"), "no error output");
        assert_eq!(fs::read_to_string(volume.join("taken"))?, "back\n");

        let mut config = container_config(&pod, "user", &["sh", "-c", "id; echo ~"], NETWORK);
        security(&mut config).run_as_username = "alice".to_owned();
        let container = pod.start_with(config)?;
        container.wait_exit()?;
        let printed = container.stdout()?;
        ensure!(
            printed.contains("uid=1000(alice) gid=1000(alice)") && printed.contains("50(staff)"),
            "{printed}"
        );
        ensure!(printed.ends_with("/home/alice\n"), "{printed}");

        let config = container_config(&pod, "missing", &["/no/such/program"], NETWORK);
        let missing = pod.create(config)?;
        let why = missing.start().unwrap_err();
        ensure!(why.message().contains("/no/such/program"), "{why}");
        let status = missing.wait_exit()?;
        assert_eq!(status.exit_code, 128);

        // A container that ends is replaced by the next attempt.
        let mut config = container_config(&pod, "c", &["echo", "again"], NETWORK);
        config.metadata.get_or_insert_default().attempt = 1;
        config.log_path = "again.log".to_owned();
        let again = pod.start_with(config)?;
        assert_eq!(again.wait_exit()?.exit_code, 0);
        assert_eq!(again.stdout()?, "again\n");
        Ok(())
    })
}

#[test]
fn commands_terminals_and_ports_are_streamed() -> Result<()> {
    with_node(|node| {
        let pod = run(node, "streams", NETWORK)?;
        let container = idle(&pod, "c", NETWORK)?;
        // ExecSync with both streams, an exit code, and a time limit.
        let answer = container.exec_sync(&["sh", "-c", "echo a; echo b >&2; exit 4"], 20)?;
        assert_eq!(
            (answer.exit_code, answer.stdout.as_slice()),
            (4, b"a\n".as_slice())
        );
        assert_eq!(answer.stderr, b"b\n");
        let slow = container.exec_sync(&["sh", "-c", "sleep 1234 & sleep 1234"], 1);
        assert_eq!(slow.unwrap_err().code(), Code::DeadlineExceeded);
        if node.server == Server::Drupe {
            let left = node.pod_processes()?;
            ensure!(!left.values().any(|l| l.contains("1234")), "{left:?}");
        }

        let mut data = vec![0; 4 << 20];
        fs::File::open("/dev/urandom")?.read_exact(&mut data)?;
        let mut child = client(node, &["exec", "-i", &container.id, "cat"])?;
        let mut input = child.stdin.take().context("its input")?;
        let sent = data.clone();
        let writer = std::thread::spawn(move || input.write_all(&sent));
        let output = child.wait_with_output()?;
        writer.join().unwrap()?;
        ensure!(
            output.status.success() && output.stdout == data,
            "bytes differ"
        );

        let line = format!(
            "stty rows 33 cols 111; exec {} exec -it {} sh -c 'n=0; until stty size | grep -q 111 || [ $n = 200 ]; do n=$((n+1)); sleep 0.05; done; stty size; tty'",
            crictl(node)?,
            container.id
        );
        let shown = node.netns.output("script", &["-qec", &line, "/dev/null"])?;
        ensure!(
            shown.contains("33 111") && shown.contains("/dev/pts/"),
            "{shown}"
        );

        let mut config = container_config(
            &pod,
            "echo",
            &["sh", "-c", "while read l; do echo got $l; done"],
            NETWORK,
        );
        config.stdin = true;
        let echo = pod.start_with(config)?;
        let mut child = client(node, &["attach", "-i", &echo.id])?;
        writeln!(child.stdin.as_mut().context("its input")?, "this")?;
        let mut answer = [0; 9];
        child
            .stdout
            .as_mut()
            .context("its output")?
            .read_exact(&mut answer)?;
        assert_eq!(&answer, b"got this\n");
        child.kill()?;
        child.wait()?;
        assert_eq!(echo.status()?.state(), ContainerState::ContainerRunning);
        assert_eq!(echo.stdout()?, "got this\n");

        let mut config = container_config(&pod, "terminal", &["sh", "-c", "tty; cat"], NETWORK);
        (config.tty, config.stdin) = (true, true);
        let terminal = pod.start_with(config)?;
        eventually("the terminal's name", PATIENCE, || {
            let written = terminal.stdout()?;
            ensure!(written.contains("/dev/pts/"), "{written:?}");
            Ok::<_, anyhow::Error>(())
        })?;
        terminal.stop(0)?;
        Ok(())
    })
}

#[test]
fn a_port_of_a_pod_with_a_network_of_its_own_is_forwarded() -> Result<()> {
    with_drupe(|node| {
        let pod = run_by_handler(node, pod_config(node, "ports", Shared::default()))?;
        let serve = "echo forwarded > /x; exec httpd -f -p 127.0.0.1:8000 -h /";
        let config = container_config(&pod, "c", &["sh", "-c", serve], Shared::default());
        let container = pod.start_with(config)?;
        eventually("the server to listen", PATIENCE, || {
            container.exec(&["wget", "-qO-", "http://127.0.0.1:8000/x"])
        })?;
        let mut forward = client(node, &["port-forward", &pod.id, "18000:8000"])?;
        let answer = eventually("the forwarded port to answer", PATIENCE, || {
            get(node, 18000, "/x")
        });
        forward.kill()?;
        forward.wait()?;
        let answer = answer?;
        ensure!(answer.ends_with("forwarded\n"), "{answer}");
        Ok(())
    })
}
