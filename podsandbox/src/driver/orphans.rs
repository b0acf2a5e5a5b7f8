//! What is left of a pod whose monitor or supervisor is gone, or cannot be
//! reached any more: ended, so that nothing runs on unseen.

use std::path::Path;
use std::time::Duration;

use super::Driver;
use crate::agent::plain;
use crate::process::Process;
use crate::record::PodKind;
use crate::{Result, cgroup};

/// A monitor that has told of its machine's end writes logs out and exits.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl Driver {
    /// Ends the monitor or supervisor, if it still is there, and all that is in
    /// the pod's control groups. What resists is tried again.
    pub(super) async fn end_orphans(&mut self) {
        if let Some(process) = self.monitor() {
            process.kill();
        }
        let ended = self.remove_groups().await;
        self.has_orphans = ended.is_err();
        if let Err(error) = ended {
            tracing::error!(pod = %self.record.id, error = %error.sentence(), "cannot end what a lost pod runs yet");
        }
    }

    /// The process that the pod's machine hangs on, while it is there.
    pub(super) fn monitor(&self) -> Option<Process> {
        let pid = self.record.vmm_pid?;
        Process::open(pid, &self.record.id)
    }

    /// Gives one that is about to end by itself the time for it.
    pub(super) async fn await_monitor(&self) {
        if let Some(process) = self.monitor() {
            process.ended_within(LAST_WORDS).await;
        }
    }

    /// The pod's control groups with all that runs in them.
    pub(super) async fn remove_groups(&self) -> Result<()> {
        let (id, parent) = (&self.record.id, self.cgroup_parent());
        let mut removed = cgroup::remove(parent, id).await;
        if parent == Path::new(cgroup::OWN_PARENT) {
            cgroup::remove_own_parent();
        } else if !self.is_on_host() {
            // Where its machine has booted.
            removed = removed.and(cgroup::remove(cgroup::beside(parent), id).await);
        }
        removed
    }

    /// What the loss of the machine is called; `reason` may be the guest's word.
    pub(super) fn ended(&self, reason: &str) -> String {
        let reason = plain(reason);
        match self.record.kind {
            PodKind::MicroVm => format!("the virtual machine ended: {reason}"),
            PodKind::Host => format!("the pod's supervisor ended: {reason}"),
        }
    }
}
