//! What pods cost beyond their containers: where it is charged, and how people
//! and programs are told.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::{Node, Pod, cgroup, eventually, patient};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::command_line::{drupe_command, fails, prints};
use crate::prometheus::{ADDRESS, Scrape};
use crate::{drupe, on_drupe};

const MIB: u64 = 1 << 20;
const SOON: std::time::Duration = std::time::Duration::from_secs(20);

/// The pod's groups in each hierarchy that has them, below `parent`.
fn groups(pod: &Pod, parent: &str) -> Result<Vec<PathBuf>> {
    let below = parent.trim_start_matches('/');
    cgroup::groups(&format!("{below}/drupe-{}", pod.id))
}

fn inside(groups: &[PathBuf]) -> Result<Vec<u32>> {
    let mut pids = Vec::new();
    for group in groups {
        let text = fs::read_to_string(group.join("cgroup.procs"))?;
        pids.extend(text.lines().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(pids)
}

/// The one of two files, of whichever version of cgroups there is.
fn figure(groups: &[PathBuf], names: [&str; 2]) -> Result<String> {
    let mut files = groups
        .iter()
        .flat_map(|group| names.map(|name| group.join(name)));
    let file = files
        .find(|file| file.exists())
        .with_context(|| format!("none of {names:?} in {groups:?}"))?;
    fs::read_to_string(&file).with_context(|| file.display().to_string())
}

/// A group such as the kubelet makes for a pod, below another, in every
/// hierarchy. Both go with the variable.
struct PodGroup {
    above: String,
    dirs: Vec<PathBuf>,
}

impl PodGroup {
    fn make(node: &Node) -> Result<Self> {
        let name = node.pods_cgroup().replace('/', "-");
        let mut group = Self {
            above: format!("/overhead{name}"),
            dirs: Vec::new(),
        };
        for root in cgroup::groups("")? {
            let above = root.join(&group.above[1..]);
            fs::create_dir(&above)?;
            group.dirs.push(above.clone());
            // Of version 2, where it is in use.
            let controllers = fs::read_to_string(above.join("cgroup.controllers"));
            for controller in controllers.unwrap_or_default().split_whitespace() {
                fs::write(
                    above.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                )?;
            }
            group.dirs.push(above.join("pod"));
            fs::create_dir(above.join("pod"))?;
        }
        Ok(group)
    }

    fn path(&self) -> String {
        format!("{}/pod", self.above)
    }

    /// Hundredths of a CPU; none: all there are.
    fn limit_cpu(&self, hundredths: Option<u32>) -> Result<()> {
        let quota = hundredths.map(|n| (n * 1000).to_string());
        let max = quota.as_deref().unwrap_or("max");
        let old = quota.as_deref().unwrap_or("-1");
        let mut limits = 0;
        for dir in &self.dirs {
            for (file, value) in [("cpu.max", max), ("cpu.cfs_quota_us", old)] {
                let file = dir.join(file);
                if dir.ends_with("pod") && file.exists() {
                    fs::write(&file, value).with_context(|| file.display().to_string())?;
                    limits += 1;
                }
            }
        }
        ensure!(limits == 1, "{limits} hierarchies limit CPUs");
        Ok(())
    }
}

impl Drop for PodGroup {
    fn drop(&mut self) {
        for dir in self.dirs.iter().rev() {
            // What is left in it the test has told.
            let _ = fs::remove_dir(dir);
        }
    }
}

#[test]
fn a_small_pods_cpu_limit_does_not_hold_up_its_boot() -> Result<()> {
    on_drupe(drupe()?, |node| {
        node.pull_busybox()?;
        let group = PodGroup::make(node)?;
        let (beside, parent) = (group.above.clone(), group.path());
        group.limit_cpu(Some(5))?;
        let mut config = node.pod_config("small");
        config
            .linux
            .get_or_insert_default()
            .cgroup_parent
            .clone_from(&parent);
        let pod = node.run_pod_with(config)?;
        group.limit_cpu(None)?;

        let booted = groups(&pod, &beside)?;
        let own = groups(&pod, &parent)?;
        assert_eq!(inside(&booted)?, Vec::<u32>::new());
        let pids = inside(&own)?;
        ensure!(!pids.is_empty(), "nothing runs in {own:?}");
        for (pid, line) in node.pod_processes()? {
            ensure!(pids.contains(&pid), "{line} is not in the pod's group");
        }
        // What the boot took is charged there; all that comes now, here.
        let memory = ["memory.current", "memory.usage_in_bytes"];
        let boot: u64 = figure(&booted, memory)?.trim().parse()?;
        let rest: u64 = figure(&own, memory)?.trim().parse()?;
        ensure!(boot > 8 * MIB, "the boot took {boot} bytes");
        ensure!(
            rest < boot / 2,
            "{rest} bytes in the pod's group, {boot} beside"
        );
        let container = pod.start_idle("c")?;
        container.exec(&["sh", "-c", "head -c 20000000 /dev/zero > /dev/shm/x"])?;
        let with: u64 = figure(&own, memory)?.trim().parse()?;
        ensure!(with > rest + 15 * MIB, "{with} bytes after {rest}");

        pod.remove()?;
        for parent in [&beside, &parent] {
            assert_eq!(groups(&pod, parent)?, Vec::<PathBuf>::new());
        }
        Ok(())
    })
}

fn with_overhead(node: &Node, name: &str, bytes: Option<u64>) -> Result<Pod> {
    let mut config = node.pod_config(name);
    let memory = bytes.map(|bytes| bytes as i64);
    config.linux.get_or_insert_default().overhead = memory.map(|bytes| LinuxContainerResources {
        memory_limit_in_bytes: bytes,
        ..Default::default()
    });
    node.run_pod_with(config)
}

#[test]
fn more_than_was_declared_is_told() -> Result<()> {
    let node = Node::builder()
        .config(|config| {
            config["metrics"] = json!({ "address": ADDRESS });
            config["overhead"] = json!({ "measure_every_seconds": 1 });
        })
        .start()?;
    on_drupe(node, |node| {
        let enough = with_overhead(node, "enough", Some(512 * MIB))?;
        let none = with_overhead(node, "none", None)?;
        let little = with_overhead(node, "little", Some(MIB))?;
        let of = [("handler", "microvm")];
        eventually("all pods to be measured", patient(SOON), || {
            let scrape = Scrape::of(node)?;
            let pods = scrape.value("drupe_pod_overhead_measured_pods", &of)?;
            ensure!(pods == 3.0, "{pods} pods");
            let above = scrape.value("drupe_pod_overhead_above_declared_pods", &of)?;
            ensure!(above == 1.0, "{above} pods above");
            let undeclared = scrape.value("drupe_pod_overhead_undeclared_pods", &of)?;
            ensure!(undeclared == 1.0, "{undeclared} pods undeclared");
            let declared = scrape.value("drupe_pod_overhead_declared_bytes", &of)?;
            ensure!(declared == (513 * MIB) as f64, "{declared} declared");
            let actual = scrape.value("drupe_pod_overhead_actual_bytes", &of)?;
            let each = actual / 3.0 / MIB as f64;
            ensure!((8.0..150.0).contains(&each), "{each} MiB a pod");
            Ok(())
        })?;
        let log = node.log()?;
        let told: Vec<_> = log
            .lines()
            .filter(|line| line.contains("costs more than the overhead"))
            .collect();
        ensure!(told.len() == 1 && told[0].contains(&little.id), "{told:?}");

        // Of each pod, as the kubelet passes it on.
        let list = node
            .cri()?
            .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})?;
        for (pod, declared) in [
            (&enough, Some(512 * MIB)),
            (&none, None),
            (&little, Some(MIB)),
        ] {
            let of = list
                .pod_metrics
                .iter()
                .find(|of| of.pod_sandbox_id == pod.id);
            let of = of.with_context(|| format!("no metrics of {}", pod.id))?;
            let value = |name: &str| {
                let metric = of.metrics.iter().find(|metric| metric.name == name)?;
                metric.value.as_ref().map(|value| value.value)
            };
            assert_eq!(value("drupe_pod_overhead_declared_memory_bytes"), declared);
            let actual = value("drupe_pod_overhead_memory_bytes").context("no overhead")?;
            ensure!((8 * MIB..150 * MIB).contains(&actual), "{actual}");
        }
        let shown: Value = serde_json::from_str(&node.crictl_ok(&["inspectp", &little.id])?)?;
        let shown = &shown["info"]["overhead"];
        assert_eq!(shown["declaredMemoryBytes"], json!(MIB));
        for figure in ["memoryBytes", "proportionalBytes", "cpuNanos"] {
            ensure!(
                shown[figure].as_u64().is_some_and(|n| n > 0),
                "{figure}: {shown}"
            );
        }
        Ok(())
    })
}

#[test]
fn the_overhead_is_measured_and_nothing_is_left_of_it() -> Result<()> {
    on_drupe(drupe()?, |node| {
        // The pods are in the daemon's own group.
        let _other_tests_look_later = cgroup::lock_parent_of_daemon();
        // Nobody else is shown them: a kubelet would end them.
        let pods = || -> Result<Vec<PodSandbox>> {
            let cri = node.cri()?;
            let all = cri.list_pod_sandbox(ListPodSandboxRequest { filter: None })?;
            assert_eq!(all.items, []);
            let label = ("drupe.internal/tool".to_owned(), "overhead".to_owned());
            let filter = Some(PodSandboxFilter {
                label_selector: [label].into(),
                ..Default::default()
            });
            let own = cri.list_pod_sandbox(ListPodSandboxRequest { filter })?;
            Ok(own.items)
        };
        let args = ["overhead", "--pods=2", "--seconds=1", "--memory=64,256"];
        let report = prints(node, &[&args[..], &["-o", "json"]].concat())?;
        let report: Value = serde_json::from_str(&report)?;
        let groups = report["groups"].as_array().context("groups")?;
        assert_eq!(groups.len(), 2, "{report}");
        let mut most = 0;
        for group in groups {
            let samples = group["samples"].as_array().context("samples")?;
            assert_eq!(samples.len(), 2, "{report}");
            for sample in samples {
                let figure = |name: &str| sample[name].as_u64().context("a figure is missing");
                let charged = figure("chargedBytes")?;
                ensure!((8 * MIB..150 * MIB).contains(&charged), "{sample}");
                most = most.max(charged);
                ensure!(figure("proportionalBytes")? > MIB, "{sample}");
                ensure!(figure("startCpuNanos")? > 1_000_000, "{sample}");
            }
        }
        let published = report["publish"]["memoryMib"].as_u64().context("memory")?;
        ensure!(published * MIB > most && published < 200, "{report}");
        assert_eq!(pods()?, []);

        let running = drupe_command(node, &["overhead", "--running"])?.output()?;
        fails(&running, &["microvm", "--running"])?;
        let unknown = drupe_command(node, &["overhead", "--handler=nope"])?.output()?;
        fails(&unknown, &["\"nope\"", "microvm"])?;
        let host = drupe_command(node, &["overhead", "--handler=host"])?.output()?;
        fails(&host, &["host", "node's kernel"])?;

        // Whoever is asked to end puts away what it has started.
        for signal in [Signal::SIGINT, Signal::SIGKILL] {
            let mut child = drupe_command(node, &["overhead", "--pods=1", "--seconds=600"])?
                .stderr(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            eventually("a pod to be measured", patient(SOON), || {
                let pods = pods()?;
                ensure!(!pods.is_empty(), "there is none");
                Ok(())
            })?;
            kill(Pid::from_raw(child.id().cast_signed()), signal)?;
            child.wait()?;
            let left = pods()?;
            assert_eq!(
                left.len(),
                usize::from(signal == Signal::SIGKILL),
                "{signal}"
            );
        }
        // Whoever was killed is followed by one that does.
        prints(node, &["overhead", "--pods=1", "--seconds=1"])?;
        assert_eq!(pods()?, []);
        Ok(())
    })
}

#[test]
fn each_handler_has_a_class() -> Result<()> {
    on_drupe(drupe()?, |node| {
        let printed = prints(node, &["runtimeclass", "--overhead=40,5"])?;
        let classes: Vec<&str> = printed.split("---\n").skip(1).collect();
        let [host, microvm] = classes[..] else {
            anyhow::bail!("not two classes: {printed}")
        };
        for line in [
            "kind: RuntimeClass",
            "handler: microvm",
            "memory: 40Mi",
            "cpu: 5m",
            "handler.drupe.internal/microvm: 'true'",
        ] {
            ensure!(microvm.contains(line), "no {line} in {microvm}");
        }
        ensure!(
            host.contains("handler: host") && !host.contains("overhead"),
            "{host}"
        );
        let wrong = drupe_command(node, &["runtimeclass", "--handler=x", "--overhead=1,1"])?;
        fails(&{ wrong }.output()?, &["\"x\"", "microvm"])
    })
}
