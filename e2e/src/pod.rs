//! Pods and containers the way a test thinks of them: made from the kubelet's
//! usual request, asked and ended in one call each.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use tonic::Status;

use crate::cri::image_spec;
use crate::machine::slowness;
use crate::node::BUSYBOX;
use crate::{Cri, Node, eventually, log};

/// Makes uids of pods unique.
static PODS: AtomicU32 = AtomicU32::new(0);

impl Node {
    /// What the kubelet sends for a plain pod.
    #[must_use]
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        let number = PODS.fetch_add(1, Ordering::Relaxed);
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id()),
                namespace: "e2e".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self
                .logs()
                .join(format!("{name}-{number}"))
                .display()
                .to_string(),
            labels: HashMap::from([("app".to_owned(), name.to_owned())]),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.pods_cgroup(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub fn run_pod(&self, name: &str) -> Result<Pod> {
        self.run_pod_with(self.pod_config(name))
            .with_context(|| format!("run pod {name}"))
    }

    pub fn run_pod_with(&self, config: PodSandboxConfig) -> Result<Pod> {
        std::fs::create_dir_all(&config.log_directory)
            .with_context(|| config.log_directory.clone())?;
        Ok(self.try_run_pod(config)?)
    }

    /// Like [`Self::run_pod_with`], but with the bare answer.
    pub fn try_run_pod(&self, config: PodSandboxConfig) -> Result<Pod, Status> {
        let cri = self
            .cri()
            .map_err(|error| Status::internal(error.to_string()))?;
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let id = cri.run_pod_sandbox(request)?.pod_sandbox_id;
        Ok(Pod { cri, id, config })
    }

    /// Pulls the busybox image.
    pub fn pull_busybox(&self) -> Result<()> {
        self.cri()?.pull(BUSYBOX).context("pull busybox").map(drop)
    }
}

/// What the kubelet asks for unless the pod says otherwise. CRI's own default
/// for processes is the pod's namespace.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}

pub struct Pod {
    cri: Cri,
    pub id: String,
    pub config: PodSandboxConfig,
}

impl Pod {
    /// A pod that was made by a request whose answer was lost.
    pub fn known(node: &Node, id: &str, config: PodSandboxConfig) -> Result<Self> {
        Ok(Self {
            cri: node.cri()?,
            id: id.to_owned(),
            config,
        })
    }

    /// What the kubelet sends for a plain container of the busybox image.
    #[must_use]
    pub fn container_config(&self, name: &str, command: &[&str]) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(image_spec(BUSYBOX)),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            labels: HashMap::from([("container".to_owned(), name.to_owned())]),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }
    }

    pub fn create(&self, mut config: ContainerConfig) -> Result<Container, Status> {
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        let name = config
            .metadata
            .as_ref()
            .map(|metadata| metadata.name.clone())
            .unwrap_or_default();
        // The kubelet says of each pod whether a container of it is privileged.
        let mut sandbox_config = self.config.clone();
        if security(&mut config).privileged {
            let linux = sandbox_config.linux.get_or_insert_default();
            linux.security_context.get_or_insert_default().privileged = true;
        }
        let id = self.try_create(config, sandbox_config)?;
        Ok(Container {
            cri: self.cri.clone(),
            id,
            name,
            log,
        })
    }

    /// The bare call, with what it says of the pod.
    pub fn try_create(
        &self,
        config: ContainerConfig,
        sandbox_config: PodSandboxConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        Ok(self.cri.create_container(request)?.container_id)
    }

    /// Creates and starts.
    pub fn start_with(&self, config: ContainerConfig) -> Result<Container> {
        let container = self.create(config).context("create the container")?;
        container
            .start()
            .with_context(|| format!("start {}", container.name))?;
        Ok(container)
    }

    pub fn start(&self, name: &str, command: &[&str]) -> Result<Container> {
        self.start_with(self.container_config(name, command))
    }

    /// A container that runs until it is stopped.
    pub fn start_idle(&self, name: &str) -> Result<Container> {
        self.start(name, IDLE)
    }

    /// Runs a command as a container to its end; returns what it wrote to its
    /// standard output.
    pub fn run_to_end(&self, name: &str, script: &str) -> Result<String> {
        let container = self.start(name, &["sh", "-c", script])?;
        let status = container.wait_exit()?;
        ensure!(
            status.exit_code == 0,
            "{name} ended with {}: {}",
            status.exit_code,
            container.output()?
        );
        container.stdout()
    }

    pub fn status(&self) -> Result<PodSandboxStatus, Status> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        self.cri
            .pod_sandbox_status(request)?
            .status
            .ok_or_else(|| Status::internal("no status"))
    }

    /// Addresses, the primary first.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let network = self.status()?.network.context("the pod has no network")?;
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        Ok(std::iter::once(network.ip).chain(more).collect())
    }

    /// States what its containers may use together, without overhead.
    pub fn update(&self, resources: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: self.id.clone(),
            resources: Some(resources),
            overhead: None,
        };
        self.cri.update_pod_sandbox_resources(request).map(drop)
    }

    pub fn stop(&self) -> Result<(), Status> {
        self.cri
            .stop_pod_sandbox(StopPodSandboxRequest {
                pod_sandbox_id: self.id.clone(),
            })
            .map(drop)
    }

    pub fn remove(&self) -> Result<(), Status> {
        self.cri
            .remove_pod_sandbox(RemovePodSandboxRequest {
                pod_sandbox_id: self.id.clone(),
            })
            .map(drop)
    }
}

/// A phase of a pod's start, from when the request arrived.
#[derive(Debug)]
pub struct Phase {
    pub name: String,
    pub start: Duration,
    pub duration: Duration,
}

/// How the pod came up, as `crictl inspectp` tells.
pub fn timeline(node: &Node, pod: &str) -> Result<Vec<Phase>> {
    let inspected: serde_json::Value = serde_json::from_str(&node.crictl_ok(&["inspectp", pod])?)?;
    let phases = inspected["info"]["timeline"]
        .as_array()
        .context("info.timeline is no array")?;
    let phase = |value: &serde_json::Value| -> Option<Phase> {
        Some(Phase {
            name: value["phase"].as_str()?.to_owned(),
            start: Duration::from_micros(value["start_us"].as_u64()?),
            duration: Duration::from_micros(value["duration_us"].as_u64()?),
        })
    };
    phases
        .iter()
        .map(|value| phase(value).with_context(|| format!("not a phase: {value}")))
        .collect()
}

/// A process that idles and ends at once when asked to.
pub const IDLE: &[&str] = &[
    "sh",
    "-c",
    "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done",
];

/// A command inside a container has this long, unless it is given another.
const EXEC_SECONDS: i64 = 60;

/// How long a container that was told to end, or has little to do, may run.
const EXIT_WITHIN: Duration = Duration::from_secs(30);

pub struct Container {
    cri: Cri,
    pub id: String,
    pub name: String,
    /// Where its log is.
    pub log: PathBuf,
}

impl Container {
    pub fn start(&self) -> Result<(), Status> {
        self.cri
            .start_container(StartContainerRequest {
                container_id: self.id.clone(),
            })
            .map(drop)
    }

    pub fn status(&self) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        self.cri
            .container_status(request)?
            .status
            .ok_or_else(|| Status::internal("no status"))
    }

    /// Waits until it has ended.
    pub fn wait_exit(&self) -> Result<ContainerStatus> {
        self.wait_exit_within(EXIT_WITHIN)
    }

    pub fn wait_exit_within(&self, within: Duration) -> Result<ContainerStatus> {
        eventually(&format!("container {} to end", self.name), within, || {
            let status = self.status()?;
            ensure!(
                status.state() == ContainerState::ContainerExited,
                "it is {:?}",
                status.state()
            );
            Ok::<_, anyhow::Error>(status)
        })
    }

    /// Runs a command inside; `timeout` in seconds, 0 for none.
    pub fn exec_sync(&self, command: &[&str], timeout: i64) -> Result<ExecSyncResponse, Status> {
        self.cri.exec_sync(ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout,
        })
    }

    /// Runs a command inside that succeeds; returns its output, trimmed.
    pub fn exec(&self, command: &[&str]) -> Result<String> {
        let answer = self
            .exec_sync(command, EXEC_SECONDS * i64::from(slowness()))
            .with_context(|| command.join(" "))?;
        ensure!(
            answer.exit_code == 0,
            "{} ended with {}: {}",
            command.join(" "),
            answer.exit_code,
            String::from_utf8_lossy(&answer.stderr)
        );
        Ok(String::from_utf8_lossy(&answer.stdout)
            .trim_end()
            .to_owned())
    }

    pub fn stop(&self, timeout: i64) -> Result<(), Status> {
        self.cri
            .stop_container(StopContainerRequest {
                container_id: self.id.clone(),
                timeout,
            })
            .map(drop)
    }

    pub fn remove(&self) -> Result<(), Status> {
        self.cri
            .remove_container(RemoveContainerRequest {
                container_id: self.id.clone(),
            })
            .map(drop)
    }

    /// Changes what `resources` names of its limits.
    pub fn update(&self, resources: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources),
            ..Default::default()
        };
        self.cri.update_container_resources(request).map(drop)
    }

    /// What it has written to its standard output.
    pub fn stdout(&self) -> Result<String> {
        let records = log::read(&self.log)?;
        Ok(String::from_utf8_lossy(&log::written(&records, log::Stream::Stdout)).into_owned())
    }

    /// What it has written to either stream.
    pub fn output(&self) -> Result<String> {
        let records = log::read(&self.log)?;
        let written: Vec<_> = [log::Stream::Stdout, log::Stream::Stderr]
            .iter()
            .flat_map(|stream| log::written(&records, *stream))
            .collect();
        Ok(String::from_utf8_lossy(&written).into_owned())
    }

    pub fn stats(&self) -> Result<ContainerStats, Status> {
        let request = ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        self.cri
            .container_stats(request)?
            .stats
            .ok_or_else(|| Status::internal("no stats"))
    }
}

/// What a container may do and as whom, to be changed.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}
