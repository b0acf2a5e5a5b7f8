//! kubectl's logs, exec, attach, cp, port-forward and debug.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};

use anyhow::{Context, Result, ensure};
use e2e::cluster::Namespace;
use e2e::{http, node};
use serde_json::json;

use crate::{IDLE, busybox, pod};

fn start(ns: &Namespace<'_>, name: &str, script: &str) -> Result<()> {
    let spec = json!({ "containers": [busybox("c", script)], "terminationGracePeriodSeconds": 1 });
    ns.apply(&pod(name, spec))?;
    ns.wait(&format!("pod/{name}"), "condition=Ready")
}

pub fn logs_are_followed(ns: &Namespace<'_>) -> Result<()> {
    start(
        ns,
        "counter",
        "for i in 1 2 3; do echo $i; sleep 1; done; sleep 1000",
    )?;
    let mut follower = ns.spawn_kubectl(&["logs", "-f", "counter"])?;
    let mut lines = BufReader::new(follower.stdout.take().context("output")?).lines();
    for expected in ["1", "2", "3"] {
        let line = lines.next().context("the log ended")??;
        ensure!(line == expected, "{line:?} instead of {expected:?}");
    }
    ns.kubectl(&["delete", "pod/counter", "--timeout=60s"])?;
    ensure!(lines.next().is_none(), "more than was said");
    follower.wait()?;
    Ok(())
}

pub fn commands_run_with_their_streams(ns: &Namespace<'_>) -> Result<()> {
    start(ns, "shell", IDLE)?;
    let done = ns.try_kubectl(
        &[
            "exec",
            "-i",
            "shell",
            "--",
            "sh",
            "-c",
            "cat; echo bad >&2; exit 7",
        ],
        Some("all of it"),
    )?;
    ensure!(
        done.status.code() == Some(7) && done.stdout == b"all of it",
        "{done:?}"
    );
    ensure!(done.stderr.starts_with(b"bad\n"), "{done:?}");
    // kubectl asks for a terminal only where it has one itself.
    let said =
        ns.kubectl_in_terminal(&["exec", "-it", "shell", "--", "sh", "-c", "tty; stty size"])?;
    ensure!(said.contains("/dev/pts/"), "{said:?}");
    Ok(())
}

pub fn a_container_is_attached_to(ns: &Namespace<'_>) -> Result<()> {
    let mut container = busybox("c", "while read -r line; do echo heard $line; done; exit 5");
    container["stdin"] = json!(true);
    container["stdinOnce"] = json!(true);
    ns.apply(&pod(
        "listener",
        json!({ "restartPolicy": "Never", "containers": [container] }),
    ))?;
    ns.wait("pod/listener", "condition=Ready")?;
    let mut attached = ns.spawn_kubectl(&["attach", "-i", "-q", "listener"])?;
    let mut stdin = attached.stdin.take().context("input")?;
    let mut lines = BufReader::new(attached.stdout.take().context("output")?).lines();
    for word in ["one", "two"] {
        writeln!(stdin, "{word}")?;
        let line = lines.next().context("it ended")??;
        ensure!(line == format!("heard {word}"), "{line:?} for {word:?}");
    }
    // The end of the only client's input is that of the container's.
    drop(stdin);
    ensure!(lines.next().is_none(), "more than was said");
    attached.wait()?;
    ns.wait("pod/listener", "jsonpath={.status.phase}=Failed")?;
    let code = ns.field(
        "pod/listener",
        "{.status.containerStatuses[0].state.terminated.exitCode}",
    )?;
    ensure!(code == "5", "{code}");
    Ok(())
}

pub fn files_are_copied_both_ways(ns: &Namespace<'_>) -> Result<()> {
    start(ns, "store", IDLE)?;
    let dir = std::env::temp_dir().join(format!("drupe-e2e-cp-{}", std::process::id()));
    fs::create_dir(&dir)?;
    let copied = (|| {
        let (there, back) = (dir.join("there"), dir.join("back"));
        let mut noise = vec![0; 8 << 20];
        fs::File::open("/dev/urandom")?.read_exact(&mut noise)?;
        fs::write(&there, &noise)?;
        let path = |path: &std::path::Path| path.display().to_string();
        ns.kubectl(&["cp", &path(&there), "store:/tmp/file"])?;
        ns.kubectl(&["cp", "store:/tmp/file", &path(&back)])?;
        ensure!(fs::read(&back)? == noise, "it came back another");
        Ok(())
    })();
    fs::remove_dir_all(&dir)?;
    copied
}

pub fn ports_are_forwarded(ns: &Namespace<'_>) -> Result<()> {
    let script =
        "mkdir /www && echo hello > /www/index.html && exec httpd -f -p 127.0.0.1:8080 -h /www";
    let mut server = busybox("c", script);
    let look = json!(["wget", "-q", "-O-", "http://127.0.0.1:8080/"]);
    server["readinessProbe"] = json!({ "exec": { "command": look }, "periodSeconds": 1 });
    ns.apply(&pod(
        "web",
        json!({ "containers": [server], "terminationGracePeriodSeconds": 1 }),
    ))?;
    ns.wait("pod/web", "condition=Ready")?;
    let mut forward = ns.spawn_kubectl(&["port-forward", "pod/web", ":8080"])?;
    let mut said = String::new();
    // Kept open: kubectl goes on to speak, and ends where nobody listens.
    let mut output = BufReader::new(forward.stdout.take().context("output")?);
    output.read_line(&mut said)?;
    let address = said
        .split_whitespace()
        .find(|word| word.starts_with("127.0.0.1:"))
        .with_context(|| format!("no address in {said:?}"))?;
    let answered = ns.in_node(|| {
        for _ in 0..20 {
            let response = http::request(address, "GET", "/index.html", &[], &[])?;
            ensure!(
                response.status == 200 && response.body == b"hello\n",
                "{}",
                response.status
            );
        }
        Ok(())
    });
    forward.kill()?;
    let ended = forward.wait_with_output()?;
    drop(output);
    answered.with_context(|| String::from_utf8_lossy(&ended.stderr).into_owned())
}

pub fn a_debug_container_joins(ns: &Namespace<'_>) -> Result<()> {
    start(ns, "broken", IDLE)?;
    let mut debug = ns.spawn_kubectl(&[
        "debug",
        "-i",
        "-q",
        "broken",
        "--image",
        node::BUSYBOX,
        "--image-pull-policy",
        "IfNotPresent",
        "--target",
        "c",
        "--profile",
        "general",
        "--",
        "sh",
    ])?;
    // Its end would detach kubectl, whatever is still to be said.
    let mut stdin = debug.stdin.take().context("input")?;
    stdin.write_all(b"ps -o args; exit\n")?;
    let output = debug.wait_with_output()?;
    drop(stdin);
    let seen = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(seen.contains("trap"), "{output:?}");
    Ok(())
}
