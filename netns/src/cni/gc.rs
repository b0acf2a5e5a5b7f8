//! Collecting what nobody answers for: the GC verb of CNI 1.1, and DEL of
//! attachments whose pod is gone.
//!
//! The specification keeps GC apart from every ADD and DEL of the same runtime.
//! A plugin's GC that hangs would so hold up all pods: it gets little time, and
//! is asked first of all, when a daemon that starts has nothing else to do yet.

use std::{collections::BTreeSet, time::Duration};

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::{sync::OwnedRwLockWriteGuard, time::Instant};

use super::{Attachment, Cni, CniError, NetworkList, Verb};

/// All plugins' GC together: no pod is attached or detached meanwhile.
const GC_TIMEOUT: Duration = Duration::from_secs(10);
/// Plugins that hang must not keep the others' pods from being detached.
const DELS_AT_ONCE: usize = 8;

/// A collection that was begun. Until it is finished or dropped, every ADD and
/// DEL waits.
pub struct Collection {
    cni: Cni,
    valid: BTreeSet<Attachment>,
    stale: Vec<Attachment>,
    alone: OwnedRwLockWriteGuard<()>,
}

impl Cni {
    /// Waits for what is under way, and notes which attachments belong to none
    /// of `valid`. Runs no plugin.
    pub async fn begin_gc(&self, valid: BTreeSet<Attachment>) -> Result<Collection, CniError> {
        let alone = self.gate.clone().write_owned().await;
        self.records.remove_unfinished().await?;
        let mut stale = self.attachments().await?;
        stale.retain(|one| !valid.contains(one));
        Ok(Collection {
            cni: self.clone(),
            valid,
            stale,
            alone,
        })
    }
}

impl Collection {
    /// Lets the plugins of `network` that know GC (CNI 1.1) drop what belongs to
    /// no valid attachment, then detaches every other one. Goes on past failures
    /// and reports the first.
    pub async fn finish(self, network: Option<&NetworkList>) -> Result<(), CniError> {
        let mut failures = match network {
            Some(network) if !network.disable_gc => self.ask_plugins(network).await,
            _ => Vec::new(),
        };
        let Self {
            cni, stale, alone, ..
        } = self;
        drop(alone);
        let detached: Vec<_> = stream::iter(stale)
            .map(|one| {
                let cni = cni.clone();
                async move { cni.del(&one.sandbox_id, &one.interface).await }
            })
            .buffer_unordered(DELS_AT_ONCE)
            .collect()
            .await;
        failures.extend(detached.into_iter().filter_map(Result::err));
        let failed = failures.len();
        match failures.into_iter().next() {
            None => Ok(()),
            Some(first) => Err(CniError::Collect {
                failed,
                source: Box::new(first),
            }),
        }
    }

    async fn ask_plugins(&self, network: &NetworkList) -> Vec<CniError> {
        let attachments: Vec<Value> = self
            .valid
            .iter()
            .map(|one| json!({"containerID": one.sandbox_id, "ifname": one.interface}))
            .collect();
        let extra = ("cni.dev/valid-attachments", Value::from(attachments));
        let deadline = Instant::now() + GC_TIMEOUT.min(self.cni.runner.timeout);
        let mut failures = Vec::new();
        for plugin in &network.plugins {
            let mut hasty = self.cni.clone();
            // Two runs: the plugin's version is asked first.
            hasty.runner.timeout = deadline.saturating_duration_since(Instant::now()) / 2;
            if let Err(error) = hasty
                .call_network(Verb::Gc, plugin, network, Some(extra.clone()))
                .await
            {
                failures.push(error);
            }
        }
        failures
    }
}
