//! Asking plugins whether an attachment is still as they made it (CHECK, CNI
//! 0.4.0 and later).
//!
//! Plugins in use fail for attachments that are fine: Debian 12's portmap
//! misses the IPv4 rules of a dual-stack pod, its bandwidth crashes for a pod
//! without a rate. So a plugin's complaint counts only where the same plugin
//! has once found the same attachment in order, which is kept in the record.

use super::{Cni, CniError, SpecVersion, Verb, not_attached, pod};

impl Cni {
    /// Returns the complaints that count, at most one a plugin. There are none
    /// for a network without CHECK (before 0.4.0) or with `disableCheck`.
    ///
    /// Dropping the future ends it, and kills the plugin that runs.
    pub async fn check(
        &self,
        sandbox_id: &str,
        interface: &str,
    ) -> Result<Vec<CniError>, CniError> {
        pod::check_ids(sandbox_id, interface)?;
        let mut lock = self.lock(sandbox_id, interface).await?;
        let found = self.records.find(sandbox_id, interface).await?;
        let Some(mut record) = found.filter(|record| record.complete) else {
            lock.release()?;
            return Err(not_attached(sandbox_id, interface));
        };
        if record.network.disable_check || record.network.version < SpecVersion::V0_4_0 {
            lock.release()?;
            return Ok(Vec::new());
        }
        let mut complaints = Vec::new();
        let mut approved = record.approved.clone();
        for (index, plugin) in record.network.plugins.iter().enumerate() {
            match self.call(Verb::Check, plugin, &record, &mut lock).await {
                Ok(_) => drop(approved.insert(index)),
                Err(error) if approved.contains(&index) => complaints.push(error),
                Err(error) => tracing::debug!(%error, "not counted: it never found this in order"),
            }
        }
        if approved != record.approved {
            record.approved = approved;
            self.records.update(&record).await?;
        }
        let (asked, in_order) = (record.network.plugins.len(), record.approved.len());
        tracing::debug!(sandbox_id, asked, in_order, "CNI CHECK ended");
        lock.release()?;
        Ok(complaints)
    }
}
