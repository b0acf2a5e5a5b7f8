//! `drupe serve`: config, build, spawn, drain.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cri_api::v1::image_service_server::ImageServiceServer;
use cri_api::v1::runtime_service_server::RuntimeServiceServer;
use imagesvc::{ImageService, Unpacker};
use podsandbox::config::{Engine, UIDS};
use podsandbox::confinement::{Confinement, Facilities};
use podsandbox::machine::{Kept, NodeFacts};
use podsandbox::{Exempt, Network, NetworkOptions, PodManager};
use sd_notify::NotifyState;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::config::Config;
use crate::deadline::Deadlines;
use crate::debug::Shells;
use crate::dirs;
use crate::images::Images;
use crate::overhead::Overheads;
use crate::prometheus::{self, Metrics, Requests};
use crate::runtime::Runtime;
use crate::streaming::Streaming;
use crate::traces::{Observers, Traces};

/// Largest request taken; a kubelet's are a few KiB.
const MAX_REQUEST_BYTES: usize = 16 << 20;
/// Largest answer: two streams of an ExecSync, each 16 MiB, and room.
const MAX_ANSWER_BYTES: usize = 40 << 20;
/// Requests under way get this long after a signal to stop.
const DRAIN: Duration = Duration::from_secs(10);

pub fn run(config: Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<()> {
    for warning in dirs::prepare(&config)? {
        tracing::warn!("{warning}");
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let scrapes = prometheus::listen(&config.metrics).await?;
    let metrics = Arc::new(Metrics::new(config.runtimes.keys()));
    let traces = Traces::start(&config.traces).context("traces")?;
    let images = ImageService::open(
        config.images.clone(),
        &config.root.join("images"),
        unpacker(&config),
        metrics.clone(),
    )
    .await
    .context("image store")?;
    let network = Network::open(NetworkOptions {
        conf_dir: config.network.conf_dir.clone(),
        bin_dirs: config.network.bin_dirs.clone(),
        record_dir: config.root.join("cni"),
        plugin_timeout: Duration::from_secs(config.network.plugin_timeout_seconds),
        source_check_exempt: Exempt::new(&config.network.source_check_exempt),
    })
    .await
    .context("network")?;
    let runtimes = decide(&config);
    let pods = pod_config(&config, runtimes);
    let observer = Arc::new(Observers {
        metrics: Arc::clone(&metrics),
        traces: traces.clone(),
    });
    let pods = PodManager::open(pods, images.clone(), network, observer)
        .await
        .context("pods")?;
    let overheads = Arc::new(Overheads::default());
    // Serves until it is dropped.
    let _scrapes = scrapes.map(|listener| {
        tracing::info!(address = ?config.metrics.address, "metrics are served");
        prometheus::Server::start(
            listener,
            metrics.registry(pods.clone(), Arc::clone(&overheads)),
        )
    });

    let listener = listen(&config.socket).await?;
    tracing::info!(
        socket = ?config.socket,
        version = env!("CARGO_PKG_VERSION"),
        pods = pods.list().len(),
        "drupe serves CRI v1"
    );
    let streaming = Streaming::start(&config.streaming, pods.clone())
        .await
        .context("streaming")?;
    let stopping = CancellationToken::new();
    let measured = pods.clone();
    let rhythm = config.overhead.clone();
    tokio::spawn(async move { overheads.keep(&measured, &rhythm).await });
    let shells = Shells::server(&config.debug, pods.clone(), stopping.clone());
    let runtime = Runtime::new(pods.clone(), streaming, stopping.clone());
    let runtime = RuntimeServiceServer::new(runtime)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    let images = ImageServiceServer::new(Images::new(images, pods))
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = Server::builder()
        .layer(tower::layer::layer_fn(move |service| {
            Requests::new(service, Arc::clone(&metrics))
        }))
        .layer(tower::layer::layer_fn(Deadlines))
        .add_service(runtime)
        .add_service(images)
        .add_service(shells)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            // The sender is dropped when a signal came.
            if stopped.await.is_err() {
                tracing::debug!("no new requests are taken");
            }
        });
    let mut server = std::pin::pin!(server);
    tell_systemd(NotifyState::Ready);
    tokio::select! {
        result = &mut server => return result.context("the CRI server ended"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; pods keep running");
    tell_systemd(NotifyState::Stopping);
    drop(stop);
    stopping.cancel();
    if tokio::time::timeout(DRAIN, server).await.is_err() {
        tracing::warn!(
            "requests still under way after {} s were cut off",
            DRAIN.as_secs()
        );
    }
    if let Some(traces) = traces {
        traces.stop().await;
    }
    remove_socket(&config.socket)
}

/// Nothing, unless systemd has started this daemon and wants to know: the unit
/// is started when requests are taken, and what is ordered after it, such as
/// the kubelet, finds them taken.
fn tell_systemd(state: NotifyState) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot tell systemd of the daemon's state");
    }
}

/// Each handler's machine, decided once and kept for the daemons to come: a pod
/// that is taken up later has the one it was started with.
fn decide(config: &Config) -> BTreeMap<String, podsandbox::config::Runtime> {
    let node = NodeFacts::read();
    let mut kept = Kept::read(&config.root);
    let runtimes = config.runtimes.iter().map(|(name, settings)| {
        if let Some(program) = &settings.oci {
            let found = podsandbox::host::find_program(program);
            tracing::info!(handler = name, ?program, ?found, "handler on the host's kernel");
            let runtime = podsandbox::config::Runtime {
                settings: settings.clone(),
                engine: Engine::Oci(program.clone()),
            };
            return (name.clone(), runtime);
        }
        let decision = settings.decide(&node, &kept.of(name));
        kept.take_down(name, &decision);
        let (machine, why) = (decision.machine, &decision.why);
        if decision.usable {
            tracing::info!(handler = name, %machine, why, "handler");
        } else {
            let remedy = decision.remedy.as_deref().unwrap_or_default();
            tracing::error!(handler = name, %machine, why, remedy, "pods of this handler cannot start");
        }
        let runtime = podsandbox::config::Runtime {
            settings: settings.clone(),
            engine: Engine::Machine(decision),
        };
        (name.clone(), runtime)
    });
    let runtimes = runtimes.collect();
    // This daemon knows; only the next one does not.
    if let Err(error) = kept.save() {
        tracing::error!(%error, root = ?config.root, "cannot keep which machine each handler has: make room; the next start of the daemon decides anew");
    }
    runtimes
}

/// As whom layers are unpacked: not as a pod's machine.
fn unpacker(config: &Config) -> Unpacker {
    let behind_pods = config.uid_base + UIDS;
    Unpacker {
        program: config.unpacker.clone(),
        uid: behind_pods,
        gid: behind_pods,
        strict: config.confinement.is_required(),
    }
}

/// What of pods' confinement the node's kernel has. What it lacks is told here,
/// once for all pods.
fn facilities(config: &Config) -> Facilities {
    let facilities = Facilities::read();
    for lack in facilities.lacks(config.runtimes.values()) {
        let (meaning, remedy) = (&lack.meaning, &lack.remedy);
        match config.confinement {
            Confinement::BestEffort => tracing::warn!(meaning, remedy, "{lack}"),
            Confinement::Required => {
                tracing::error!(
                    remedy,
                    "{lack}, and `confinement: required` starts no pod with less than all"
                );
            }
        }
    }
    facilities
}

fn pod_config(
    config: &Config,
    runtimes: BTreeMap<String, podsandbox::config::Runtime>,
) -> podsandbox::config::Config {
    podsandbox::config::Config {
        root: config.root.clone(),
        run_dir: config.run_dir.clone(),
        netns_dir: config.network.netns_dir.clone(),
        vmm: config.vmm.clone(),
        shim: config.shim.clone(),
        uid_base: config.uid_base,
        confinement: config.confinement,
        facilities: facilities(config),
        cdi_spec_dirs: config.cdi_spec_dirs.clone(),
        default_runtime: config.default_runtime.clone(),
        runtimes,
    }
}

/// Takes the socket's path over from a daemon that is gone, never from one
/// that serves.
async fn listen(path: &Path) -> Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        bail!("another daemon serves on {path:?}; stop it or set `socket` to another path");
    }
    remove_socket(path)?;
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {path:?}"))?;
    // CRI is root on the node.
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))
        .with_context(|| format!("cannot set the mode of {path:?}"))?;
    Ok(listener)
}

fn remove_socket(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {path:?}"))
        }
        _ => Ok(()),
    }
}
