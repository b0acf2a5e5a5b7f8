//! `make demo`: one pod on its own kernel, driven by crictl, from an image in
//! a registry to nothing left on the machine.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::node::BUSYBOX;
use e2e::{Node, eventually, pod};
use serde_json::json;

/// How long an image's own command may take to say something.
const OUTPUT_WITHIN: Duration = Duration::from_secs(10);

/// Columns of the timeline's bars.
const BAR_WIDTH: u128 = 40;

fn main() -> Result<()> {
    let begun = Instant::now();
    let image = std::env::args().nth(1);
    let node = match &image {
        Some(_) => Node::builder().on_the_machines_network().start()?,
        None => Node::start()?,
    };
    show(
        "host kernel",
        nix::sys::utsname::uname()?.release().to_string_lossy(),
    );
    run(&node, image.as_deref())?;
    node.finish().context("something is left on the machine")?;
    show(
        "left behind",
        "nothing: no process, mount, link, address, loop device or file",
    );
    show(
        "took",
        format_args!("{:.1} s", begun.elapsed().as_secs_f64()),
    );
    Ok(())
}

fn run(node: &Node, image: Option<&str>) -> Result<()> {
    let name = image.unwrap_or(BUSYBOX);
    let mut container = json!({
        "metadata": { "name": "hello" },
        "image": { "image": name },
        "log_path": "hello.log",
        "linux": {},
    });
    if image.is_none() {
        let script = "echo hello from $(hostname), process $$ of a kernel of its own; \
                      trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
        container["command"] = json!(["sh", "-c", script]);
    }
    let logs = node.logs().join("demo");
    std::fs::create_dir(&logs).with_context(|| logs.display().to_string())?;
    let sandbox = json!({
        "metadata": { "name": "demo", "namespace": "default", "uid": "demo", "attempt": 0 },
        "hostname": "demo",
        "log_directory": logs,
        "linux": { "cgroup_parent": node.pods_cgroup() },
    });
    let sandbox_file = write(node, "pod.json", &sandbox)?;
    let container_file = write(node, "container.json", &container)?;

    crictl(node, &["pull", name])?;
    let pod_id = crictl(node, &["runp", &sandbox_file])?;
    let id = crictl(
        node,
        &[
            "create",
            "--no-pull",
            &pod_id,
            &container_file,
            &sandbox_file,
        ],
    )?;
    crictl(node, &["start", &id])?;

    // Through a container of its own: the image's command may end at once.
    container["metadata"]["name"] = json!("kernel");
    container["command"] = json!(["uname", "-r"]);
    container["args"] = json!([]);
    container["log_path"] = json!("kernel.log");
    let kernel_file = write(node, "kernel.json", &container)?;
    let kernel = kernel(node, &pod_id, &kernel_file, &sandbox_file);
    if image.is_none() {
        let kernel = kernel
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error:#}"))?;
        ensure!(
            *kernel != nix::sys::utsname::uname()?.release().to_string_lossy(),
            "the pod runs on the host's kernel"
        );
    }
    match kernel {
        Ok(kernel) => show("pod kernel", kernel),
        Err(error) => show(
            "pod kernel",
            format_args!("this image cannot tell: {error:#}"),
        ),
    }
    let status: serde_json::Value = serde_json::from_str(&node.crictl_ok(&["inspectp", &pod_id])?)?;
    let network = &status["status"]["network"];
    let mut addresses = vec![network["ip"].as_str().context("the pod has no address")?];
    addresses.extend(
        network["additionalIps"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["ip"].as_str()),
    );
    show("pod address", addresses.join(", "));

    let output = eventually("output of the container", OUTPUT_WITHIN, || {
        let output = node.crictl_ok(&["logs", &id])?;
        ensure!(!output.is_empty(), "none");
        Ok::<_, anyhow::Error>(output)
    });
    match output {
        Ok(output) => output
            .lines()
            .take(20)
            .for_each(|line| show("container says", line)),
        Err(error) if image.is_none() => return Err(error),
        Err(_) => show("container says", "nothing yet"),
    }
    show_timeline(node, &pod_id)?;
    crictl(node, &["stopp", &pod_id])?;
    crictl(node, &["rmp", &pod_id])?;
    Ok(())
}

fn kernel(node: &Node, pod: &str, container: &str, sandbox: &str) -> Result<String> {
    let id = node.crictl_ok(&["create", "--no-pull", pod, container, sandbox])?;
    node.crictl_ok(&["start", &id])?;
    eventually("uname's output", OUTPUT_WITHIN, || {
        let output = node.crictl_ok(&["logs", &id])?;
        ensure!(!output.is_empty(), "none");
        Ok::<_, anyhow::Error>(output)
    })
}

/// Runs crictl and says how long it took.
fn crictl(node: &Node, args: &[&str]) -> Result<String> {
    let begun = Instant::now();
    let output = node.crictl_ok(args)?;
    let verb = args.first().context("no verb")?;
    show(
        &format!("crictl {verb}"),
        format_args!("{:.2} s", begun.elapsed().as_secs_f64()),
    );
    Ok(output)
}

fn write(node: &Node, name: &str, value: &serde_json::Value) -> Result<String> {
    let path = node.dir.join(name);
    std::fs::write(&path, value.to_string()).with_context(|| path.display().to_string())?;
    Ok(path.display().to_string())
}

fn show_timeline(node: &Node, pod_id: &str) -> Result<()> {
    let phases = pod::timeline(node, pod_id)?;
    let Some(whole) = phases
        .iter()
        .map(|phase| phase.start + phase.duration)
        .max()
    else {
        bail!("the timeline of the pod's start is empty");
    };
    show(
        "pod's start",
        format_args!("{:.0} ms", whole.as_secs_f64() * 1e3),
    );
    let column = |at: Duration| (at.as_micros() * BAR_WIDTH / whole.as_micros().max(1)) as usize;
    for phase in &phases {
        let (from, to) = (column(phase.start), column(phase.start + phase.duration));
        println!(
            "  {:<14} {:>7.1} ms  {}{}",
            phase.name,
            phase.duration.as_secs_f64() * 1e3,
            " ".repeat(from),
            "=".repeat((to - from).max(1))
        );
    }
    Ok(())
}

fn show(what: &str, value: impl std::fmt::Display) {
    println!("{what:<16} {value}");
}
