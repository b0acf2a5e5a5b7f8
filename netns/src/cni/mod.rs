//! A CNI runtime (CNI specification 1.1.0, sections 2 to 4): attaches pods to
//! the network that an operator configured, by running plugins.
//!
//! [`CniWatcher`] says which network there is. [`Cni::add`] attaches a pod to
//! it, [`Cni::del`] detaches it again, with the configuration that it was
//! attached with. Both are called by the pod's driver, one at a time for a pod:
//!
//! ```text
//!            record written      last plugin succeeded
//! (nothing) ───────────────► begun ──────────────────► complete
//!     ▲                        │ failed: DEL of the chain  │
//!     └────────────────────────┴───────────────────────────┘ del
//! ```
//!
//! A plugin outlives a daemon that is killed: whoever calls plugins for a pod
//! first waits for the run that may still go on (see `lock`).
//!
//! A driver that finds a sandbox after a restart calls [`Cni::del`] to undo it
//! wherever it stood, or [`Cni::result`] to go on with it. [`Cni::begin_gc`],
//! called once the daemon knows its pods, detaches what nobody answers for. The
//! directory of records belongs on a disk, not in /run: plugins keep leases of
//! addresses on disk, and a machine that was switched off has to return them.

mod check;
mod config;
mod error;
mod exec;
mod gc;
mod lock;
mod pod;
mod record;
mod result;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::RwLock;

pub use config::{ConfigError, NetworkList, NotReady, Plugin, SpecVersion, load_network};
pub use error::{Call, CniError};
pub use exec::Verb;
pub use gc::Collection;
pub use pod::{Bandwidth, PodDns, PodNetwork, PortMapping, Protocol};
pub use record::Attachment;
pub use result::{AddResult, ResultDns, ResultInterface, ResultIp, ResultRoute};
pub use watch::{CniWatcher, NetworkState};

use crate::namespace::is_namespace;
use exec::{Pod, REAP_TIMEOUT, Runner, Target};
use lock::RunLock;
use record::{Record, Records};

pub const DEFAULT_CONF_DIR: &str = "/etc/cni/net.d";
pub const DEFAULT_BIN_DIRS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];
/// For one plugin. The slow ones ask an API server or a DHCP server.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub struct CniOptions {
    pub bin_dirs: Vec<PathBuf>,
    /// Where the attachments' records are kept.
    pub record_dir: PathBuf,
    /// For one run of one plugin.
    pub timeout: Duration,
}

/// Runs CNI plugins. Cheap to clone; what it knows is in its files.
#[derive(Clone, Debug)]
pub struct Cni {
    runner: Runner,
    records: Records,
    /// Held shared by each ADD and DEL, alone by GC. Taken before an
    /// attachment's lock.
    gate: Arc<RwLock<()>>,
}

impl Cni {
    #[must_use]
    pub fn new(options: CniOptions) -> Self {
        Self {
            runner: Runner {
                bin_dirs: options.bin_dirs,
                timeout: options.timeout,
            },
            records: Records {
                dir: options.record_dir,
            },
            gate: Arc::default(),
        }
    }

    /// Attaches `pod` to `network`.
    ///
    /// When a plugin fails, the chain's DEL has run before the error is
    /// returned; if that failed as well ([`CniError::Undo`]), or this future
    /// was dropped, [`Cni::del`] has something left to do. It is right to call
    /// it after any error.
    pub async fn add(
        &self,
        network: &NetworkList,
        pod: &PodNetwork,
    ) -> Result<AddResult, CniError> {
        pod.check()?;
        // Asked first: a chain that cannot run to its end cannot be undone
        // by its DEL either.
        if let Some(plugin) = network.missing_plugin(&self.runner.bin_dirs) {
            return Err(CniError::NoPlugin {
                plugin: plugin.to_owned(),
                dirs: self.runner.bin_dirs.clone(),
            });
        }
        let _gate = self.gate.read().await;
        let mut lock = self.lock(&pod.sandbox_id, &pod.interface).await?;
        let found = self.records.find(&pod.sandbox_id, &pod.interface).await?;
        if let Some(old) = found {
            lock.release()?;
            return Err(CniError::AlreadyAttached {
                sandbox: old.sandbox_id,
                interface: old.interface,
            });
        }
        let mut record = Record {
            network: network.clone(),
            sandbox_id: pod.sandbox_id.clone(),
            interface: pod.interface.clone(),
            netns: pod.netns.clone(),
            args: pod.args(),
            capabilities: pod.capabilities(),
            result: None,
            complete: false,
            approved: BTreeSet::new(),
        };
        if let Err(error) = self.records.insert(&record).await {
            lock.unlink().await?;
            return Err(error);
        }
        let source = match self.add_chain(&mut record, &mut lock).await {
            Ok(result) => {
                lock.release()?;
                return Ok(result);
            }
            Err(source) => source,
        };
        // Not released: a plugin that was killed, or a child of it, may not be
        // gone yet. DEL waits for it.
        drop(lock);
        let undone = match self.lock(&pod.sandbox_id, &pod.interface).await {
            Ok(lock) => self.undo(&record, lock).await,
            Err(error) => Err(error),
        };
        match undone {
            Ok(()) => Err(source),
            Err(undo) => Err(CniError::Undo {
                source: Box::new(source),
                undo: Box::new(undo),
            }),
        }
    }

    /// Detaches a pod, in whatever state its attachment is. None is no error.
    /// On an error the caller tries again later.
    pub async fn del(&self, sandbox_id: &str, interface: &str) -> Result<(), CniError> {
        pod::check_ids(sandbox_id, interface)?;
        let _gate = self.gate.read().await;
        let lock = self.lock(sandbox_id, interface).await?;
        match self.records.find(sandbox_id, interface).await? {
            Some(record) => self.undo(&record, lock).await,
            // Of an ADD that was cut off before it wrote one.
            None => {
                lock.unlink().await?;
                lock.release()
            }
        }
    }

    /// The result of the attachment's ADD.
    pub async fn result(&self, sandbox_id: &str, interface: &str) -> Result<AddResult, CniError> {
        let record = self.complete_record(sandbox_id, interface).await?;
        let call = Call {
            plugin: record.network.name,
            verb: Verb::Add,
            sandbox: Some(record.sandbox_id),
        };
        AddResult::parse(record.result.unwrap_or_default())
            .map_err(|source| CniError::Answer { call, source })
    }

    /// Every attachment that has a record, complete or not.
    pub async fn attachments(&self) -> Result<Vec<Attachment>, CniError> {
        let records = self.records.all().await?;
        Ok(records.into_iter().map(attachment_of).collect())
    }

    /// Asks the plugins that know STATUS (CNI 1.1) whether they can take pods.
    pub async fn status(&self, network: &NetworkList) -> Result<(), CniError> {
        for plugin in &network.plugins {
            self.call_network(Verb::Status, plugin, network, None)
                .await?;
        }
        Ok(())
    }

    /// Waits for as long as a daemon that lived would have let a plugin run.
    async fn lock(&self, sandbox_id: &str, interface: &str) -> Result<RunLock, CniError> {
        let limit = self.runner.timeout + REAP_TIMEOUT;
        RunLock::take(&self.records.dir, sandbox_id, interface, limit).await
    }

    async fn add_chain(
        &self,
        record: &mut Record,
        lock: &mut RunLock,
    ) -> Result<AddResult, CniError> {
        let mut last = None;
        for index in 0..record.network.plugins.len() {
            let plugin = &record.network.plugins[index];
            let output = self.call(Verb::Add, plugin, record, lock).await?;
            let parsed =
                parse_result(&output, &record.network).map_err(|source| CniError::Answer {
                    call: Call {
                        plugin: plugin.kind.clone(),
                        verb: Verb::Add,
                        sandbox: Some(record.sandbox_id.clone()),
                    },
                    source,
                })?;
            record.result = Some(parsed.json.clone());
            record.complete = index + 1 == record.network.plugins.len();
            self.records.update(record).await?;
            last = Some(parsed);
        }
        // A network has at least one plugin: `NetworkList::parse`.
        last.ok_or_else(|| not_attached(&record.sandbox_id, &record.interface))
    }

    /// Detaches, then forgets the attachment.
    async fn undo(&self, record: &Record, mut lock: RunLock) -> Result<(), CniError> {
        self.del_chain(record, &mut lock).await?;
        // The record last: what still has one is found by `begin_gc`.
        lock.unlink().await?;
        self.records.remove(record).await?;
        lock.release()
    }

    /// Runs the chain's DEL backwards. Stops at a failure: an address must not
    /// return to its pool while a rule of a later plugin still leads to it.
    async fn del_chain(&self, record: &Record, lock: &mut RunLock) -> Result<(), CniError> {
        for plugin in record.network.plugins.iter().rev() {
            match self.call(Verb::Del, plugin, record, lock).await {
                // Where an ADD was cut off, the bridge plugin's DEL removes the
                // link and then fails for the masquerade chain that was not
                // made yet; the next one finds no link and succeeds.
                Err(error) if error.reported() => {
                    tracing::warn!(%error, "CNI DEL is tried once more");
                    self.call(Verb::Del, plugin, record, lock).await?;
                }
                result => {
                    result?;
                }
            }
        }
        Ok(())
    }

    async fn complete_record(&self, sandbox_id: &str, interface: &str) -> Result<Record, CniError> {
        pod::check_ids(sandbox_id, interface)?;
        match self.records.find(sandbox_id, interface).await? {
            Some(record) if record.complete => Ok(record),
            _ => Err(not_attached(sandbox_id, interface)),
        }
    }

    /// Runs one plugin for the record's pod.
    async fn call(
        &self,
        verb: Verb,
        plugin: &Plugin,
        record: &Record,
        lock: &mut RunLock,
    ) -> Result<Vec<u8>, CniError> {
        // DEL and CHECK have had the result since 0.4.0.
        let takes_result = verb == Verb::Add || record.network.version >= SpecVersion::V0_4_0;
        let previous = record
            .result
            .clone()
            .filter(|_| takes_result)
            .map(|result| ("prevResult", result));
        let config = plugin.execution_config(&record.network, &record.capabilities, previous);
        let target = Target {
            sandbox_id: &record.sandbox_id,
            interface: &record.interface,
            netns: netns_for(verb, &record.netns),
            args: &record.args,
        };
        self.runner
            .run(
                verb,
                &plugin.kind,
                Some(Pod { target, lock }),
                &to_bytes(config),
            )
            .await
    }

    /// Runs one plugin for the network as a whole, if it knows the verb.
    async fn call_network(
        &self,
        verb: Verb,
        plugin: &Plugin,
        network: &NetworkList,
        extra: Option<(&str, Value)>,
    ) -> Result<(), CniError> {
        if network.version < SpecVersion::V1_1_0 || !self.speaks_1_1(plugin).await? {
            return Ok(());
        }
        let config = plugin.execution_config(network, &serde_json::Map::new(), extra);
        self.runner
            .run(verb, &plugin.kind, None, &to_bytes(config))
            .await?;
        Ok(())
    }

    /// Whether the plugin's VERSION lists CNI 1.1, which has GC and STATUS.
    async fn speaks_1_1(&self, plugin: &Plugin) -> Result<bool, CniError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Versions {
            #[serde(default)]
            supported_versions: Vec<String>,
        }
        let newest = SpecVersion::V1_1_0.name();
        let input = json!({ "cniVersion": newest }).to_string();
        let output = self
            .runner
            .run(Verb::Version, &plugin.kind, None, input.as_bytes())
            .await?;
        let versions: Versions =
            serde_json::from_slice(&output).map_err(|source| CniError::Answer {
                call: Call {
                    plugin: plugin.kind.clone(),
                    verb: Verb::Version,
                    sandbox: None,
                },
                source,
            })?;
        Ok(versions
            .supported_versions
            .iter()
            .any(|name| name == newest))
    }
}

fn attachment_of(record: Record) -> Attachment {
    Attachment {
        sandbox_id: record.sandbox_id,
        interface: record.interface,
    }
}

fn not_attached(sandbox_id: &str, interface: &str) -> CniError {
    CniError::NotAttached {
        sandbox: sandbox_id.to_owned(),
        interface: interface.to_owned(),
    }
}

/// A DEL whose namespace is gone is told so by an empty CNI_NETNS; plugins
/// then only return what they keep elsewhere.
fn netns_for(verb: Verb, path: &Path) -> Option<&Path> {
    (verb != Verb::Del || is_namespace(path)).then_some(path)
}

/// The result of a plugin that left out its version is of the list's.
fn parse_result(output: &[u8], network: &NetworkList) -> Result<AddResult, serde_json::Error> {
    let mut json: Value = serde_json::from_slice(output)?;
    if let Value::Object(fields) = &mut json {
        fields
            .entry("cniVersion")
            .or_insert_with(|| network.version.name().into());
    }
    AddResult::parse(json)
}

fn to_bytes(config: serde_json::Map<String, Value>) -> Vec<u8> {
    Value::Object(config).to_string().into_bytes()
}
