//! `kubectl exec`, `attach`, `cp` and `port-forward`, as their clients do it:
//! crictl, over SPDY and over WebSocket.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::streams::{cat, client, crictl_line};
use e2e::{Node, eventually};

use crate::with_node;

const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];
/// What a command is sent and sends back.
const CAT_MIB: usize = 1024;
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_command_gets_its_input_and_gives_output_errors_and_exit_code() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("p")?.start_idle("c")?;
        for transport in TRANSPORTS {
            let script = "cat; echo to stderr >&2; exit 7";
            let command = ["-i", &container.id, "sh", "-c", script];
            let output = exec(node, transport, &command, b"typed\n")?;
            assert_eq!(output.stdout, b"typed\n", "{transport}");
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(errors.contains("to stderr\n"), "{transport}: {errors}");
            ensure!(errors.contains("exit code 7"), "{transport}: {errors}");
            ensure!(!output.status.success(), "{transport}");

            let missing = exec(node, transport, &[&container.id, "/no/such"], b"")?;
            let errors = String::from_utf8_lossy(&missing.stderr).into_owned();
            ensure!(
                !missing.status.success() && errors.contains("/no/such"),
                "{transport}: {errors}"
            );
        }
        Ok(())
    })
}

#[test]
fn a_gibibyte_passes_unchanged_both_ways() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("p")?.start_idle("c")?;
        for transport in TRANSPORTS {
            cat(node, transport, &container, CAT_MIB).context(transport)?;
        }
        Ok(())
    })
}

#[test]
fn a_terminal_has_the_clients_size_and_no_standard_error() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("p")?.start_idle("c")?;
        for transport in TRANSPORTS {
            // script(1) is the terminal that crictl asks for; its size comes
            // after the command has begun.
            let line = format!(
                "stty rows 33 cols 111; exec {} exec -r {transport} -it {} sh -c 'n=0; until stty size | grep -q 111 || [ $n = 200 ]; do n=$((n+1)); sleep 0.05; done; stty size; tty; echo err >&2'",
                crictl_line(node)?,
                container.id
            );
            let output = node.netns.output("script", &["-qec", &line, "/dev/null"])?;
            ensure!(output.contains("33 111"), "{transport}: {output}");
            ensure!(output.contains("/dev/pts/"), "{transport}: {output}");
            ensure!(output.contains("err"), "{transport}: {output}");
        }
        Ok(())
    })
}

#[test]
fn a_client_attaches_to_a_container_and_leaves_it_running() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("p")?;
        let mut config =
            pod.container_config("echo", &["sh", "-c", "while read l; do echo got $l; done"]);
        config.stdin = true;
        let container = pod.start_with(config)?;
        for transport in TRANSPORTS {
            let mut client = client(node, &["attach", "-r", transport, "-i", &container.id])?;
            let mut input = client.stdin.take().context("its input")?;
            let mut output = client.stdout.take().context("its output")?;
            writeln!(input, "{transport}")?;
            let mut answer = vec![0; format!("got {transport}\n").len()];
            output.read_exact(&mut answer)?;
            assert_eq!(answer, format!("got {transport}\n").into_bytes());
            client.kill()?;
            client.wait()?;
            let state = container.status()?.state();
            ensure!(format!("{state:?}").ends_with("Running"), "{state:?}");
        }
        // The log has it as well.
        eventually("the log to have it all", PATIENCE, || {
            let log = container.stdout()?;
            ensure!(log == "got spdy\ngot websocket\n", "{log:?}");
            Ok::<_, anyhow::Error>(())
        })
    })
}

#[test]
fn input_that_is_given_once_ends_with_the_client_that_gave_it() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("p")?;
        for transport in TRANSPORTS {
            let mut config = pod.container_config(transport, &["sh", "-c", "cat; echo end"]);
            (config.stdin, config.stdin_once) = (true, true);
            let container = pod.start_with(config)?;
            let mut client = client(node, &["attach", "-r", transport, "-i", &container.id])?;
            let mut input = client.stdin.take().context("its input")?;
            writeln!(input, "{transport}")?;
            drop(input);
            assert_eq!(container.wait_exit()?.exit_code, 0);
            client.wait()?;
            assert_eq!(container.stdout()?, format!("{transport}\nend\n"));
        }
        Ok(())
    })
}

#[test]
fn a_port_is_forwarded_to_the_pods_loopback_for_many_at_once() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("p")?;
        let server = "mkdir /www; head -c 100000 /dev/zero | tr '\\0' x > /www/x; exec httpd -f -p 127.0.0.1:8000 -h /www";
        let server = pod.start("server", &["sh", "-c", server])?;
        let six = pod.start(
            "six",
            &[
                "sh",
                "-c",
                "mkdir /www; echo six > /www/x; exec httpd -f -p [::1]:8006 -h /www",
            ],
        )?;
        // A client ends with the first connection that the pod refuses.
        for (container, url) in [
            (&server, "http://127.0.0.1:8000/x"),
            (&six, "http://[::1]:8006/x"),
        ] {
            eventually("the servers to listen", PATIENCE, || {
                container.exec(&["wget", "-q", "-O", "/dev/null", url])
            })?;
        }
        for (transport, local) in TRANSPORTS.into_iter().zip([7001, 7003]) {
            let ports = [format!("{local}:8000"), format!("{}:8006", local + 1)];
            let mut arguments = vec!["port-forward", "-r", transport, &pod.id];
            arguments.extend(ports.iter().map(String::as_str));
            let mut forward = client(node, &arguments)?;
            let body = eventually("the port to be forwarded", PATIENCE, || {
                get(node, local, "/x")
            })?;
            ensure!(body.len() == 100_000, "{transport}: {} bytes", body.len());
            ensure!(get(node, local + 1, "/x")? == b"six\n", "{transport}: IPv6");
            std::thread::scope(|scope| {
                let gets: Vec<_> = (0..100)
                    .map(|_| scope.spawn(|| get(node, local, "/x")))
                    .collect();
                for got in gets {
                    let body = got.join().expect("thread")?;
                    ensure!(body == [b'x'; 100_000], "{transport}: {} bytes", body.len());
                }
                Ok(())
            })?;
            forward.kill()?;
            forward.wait()?;
        }
        Ok(())
    })
}

#[test]
fn two_hundred_commands_run_at_once() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("p")?.start_idle("c")?;
        let script = "echo on; read line; echo $line";
        let command = ["exec", "-i", &container.id, "sh", "-c", script];
        let mut clients = (0..200)
            .map(|_| client(node, &command))
            .collect::<Result<Vec<_>>>()?;
        // All of them run before the first may go on.
        for client in &mut clients {
            let mut word = [0; 3];
            client
                .stdout
                .as_mut()
                .context("stdout")?
                .read_exact(&mut word)?;
            assert_eq!(&word, b"on\n");
        }
        for (n, mut client) in clients.into_iter().enumerate() {
            let line = format!("{n}\n").into_bytes();
            let mut stdin = client.stdin.take().context("stdin")?;
            stdin.write_all(&line)?;
            drop(stdin);
            let output = client.wait_with_output()?;
            ensure!(output.stdout == line, "{n}: {output:?}");
        }
        Ok(())
    })
}

#[test]
fn clients_that_are_killed_leave_nothing_behind() -> Result<()> {
    with_node(|node| {
        let container = node.run_pod("p")?.start_idle("c")?;
        for n in 0..100 {
            let transport = TRANSPORTS[n % 2];
            let mut client = client(
                node,
                &[
                    "exec",
                    "-r",
                    transport,
                    "-i",
                    &container.id,
                    "sh",
                    "-c",
                    "echo on; exec cat",
                ],
            )?;
            let mut on = [0; 3];
            client
                .stdout
                .as_mut()
                .context("its output")?
                .read_exact(&mut on)?;
            client.kill()?;
            client.wait()?;
        }
        eventually("their processes to end", PATIENCE, || {
            let all = container.exec(&["ps", "-o", "pid,ppid,stat,args"])?;
            ensure!(!all.contains(" cat"), "{all}");
            Ok::<_, anyhow::Error>(())
        })
    })
}

fn exec(node: &Node, transport: &str, arguments: &[&str], input: &[u8]) -> Result<Output> {
    let mut all = vec!["exec", "-r", transport];
    all.extend(arguments);
    let mut client = client(node, &all)?;
    let mut stdin = client.stdin.take().context("its input")?;
    std::thread::scope(|scope| {
        let typing = scope.spawn(move || stdin.write_all(input));
        let output = client.wait_with_output().context("crictl")?;
        // One whose command does not read may be gone by then.
        let _typed = typing.join();
        Ok(output)
    })
}

/// The body that an HTTP server answers.
fn get(node: &Node, port: u16, path: &str) -> Result<Vec<u8>> {
    let mut stream = node
        .netns
        .run(|| Ok(TcpStream::connect(("127.0.0.1", port))?))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    Ok(answer.split_off(end.context("no HTTP answer")? + 4))
}
