//! What a pod's processes may take of the node whatever the pod is promised:
//! limits in the groups that are the pod's own, below those of the kubelet.
//!
//! They are no part of a pod's resources. A guest keeps within them by what it
//! is; whoever has broken out of one, or makes its kernel multiply, does not.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use vmm_client::{Confinement, Machine};

use super::{ROOT, dirs_of, failed, has_controller, is_unified};
use crate::{Error, Result};

/// Threads and processes of the monitor and the file server: a thread for each
/// of up to 32 vCPUs, event loops, disk workers, requests to the log.
const OWN_PROCESSES: u64 = 128;
/// Address spaces of a guest of User Mode Linux, each a process of the node:
/// more than busy servers have, an eighth of what the smallest nodes have ids.
const UML_PROCESSES: u64 = 4096;
/// Of the node's memory for each of those: stack, page tables, descriptors.
const UML_PROCESS_KIB: u64 = 64;
/// The monitor, the file server and what they have of page tables.
const OWN_MIB: u64 = 128;
/// Of a guest's memory, what page tables on the node take at most.
const PAGE_TABLES: u64 = 64;

/// What a pod's groups get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    processes: u64,
    memory_bytes: u64,
}

impl Limits {
    pub fn of_machine(machine: Machine, memory_mib: u32) -> Self {
        let guest = match machine {
            Machine::Kvm => 0,
            Machine::Uml(_) => UML_PROCESSES,
        };
        let memory = u64::from(memory_mib);
        let mib = memory + memory / PAGE_TABLES + OWN_MIB + guest * UML_PROCESS_KIB / 1024;
        Self {
            processes: OWN_PROCESSES + guest,
            memory_bytes: mib << 20,
        }
    }

    /// Sets them in `group`, which exists. Fails where the node refuses one, and,
    /// if all are `wanted`, where it does not have one for this group.
    pub(super) fn set(self, group: &Path, wanted: Confinement) -> Result<()> {
        for (controller, file, value) in self.files() {
            let path = dir(controller, group).join(file);
            // Not made where it is not: control groups refuse that as not permitted.
            let opened = fs::File::options().write(true).open(&path);
            match opened.and_then(|mut file| file.write_all(value.as_bytes())) {
                // The controller is not there, or off for this group.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    go_without(file, &path, wanted)?;
                }
                written => written.map_err(|error| failed(&path, error))?,
            }
        }
        Ok(())
    }

    fn files(self) -> Vec<(&'static str, &'static str, String)> {
        let (processes, memory) = (self.processes.to_string(), self.memory_bytes.to_string());
        if is_unified() {
            // The rule for devices is the monitor's to set: it takes a program.
            return vec![
                ("pids", "pids.max", processes),
                ("memory", "memory.max", memory),
                ("memory", "memory.oom.group", "1".to_owned()),
            ];
        }
        let mut files = vec![
            ("pids", "pids.max", processes),
            ("memory", "memory.limit_in_bytes", memory),
            ("devices", "devices.deny", "a".to_owned()),
        ];
        // Of the files that the jail has; none is to be made.
        for device in ["c 1:3 rw", "c 1:5 rw", "c 1:9 rw"] {
            files.push(("devices", "devices.allow", device.to_owned()));
        }
        files
    }
}

/// Of each limit the first time is told: other pods' groups are as this one's.
fn go_without(file: &'static str, path: &Path, wanted: Confinement) -> Result<()> {
    static TOLD: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    if wanted.is_required() {
        return Err(Error::NoLimit {
            path: path.to_owned(),
        });
    }
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if told.insert(file) {
        tracing::warn!(path = %path.display(), "pods go without a limit: their control groups do not have it");
    }
    Ok(())
}

/// The controllers that keep a pod's limits.
fn controllers() -> &'static [&'static str] {
    match is_unified() {
        true => &["pids", "memory"],
        false => &["pids", "memory", "devices"],
    }
}

/// Those of them that no group of the node has, and all.
pub fn lacking_controllers() -> (Vec<&'static str>, &'static [&'static str]) {
    let all = controllers();
    let lacking = all.iter().copied().filter(|name| !has_controller(name));
    (lacking.collect(), all)
}

fn dir(controller: &str, group: &Path) -> PathBuf {
    let below = group.strip_prefix("/").unwrap_or(group);
    if is_unified() {
        Path::new(ROOT).join(below)
    } else {
        Path::new(ROOT).join(controller).join(below)
    }
}

/// The directories of `group` whose rule for devices the monitor has to set.
pub(super) fn without_device_rule(group: &Path) -> Vec<PathBuf> {
    match is_unified() {
        true => dirs_of(group),
        false => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use vmm_client::UmlMode;

    use super::*;
    use crate::cgroup::{make, remove};

    #[test]
    fn a_limit_has_room_for_the_guest_and_grows_with_it() {
        let uml = |mib| Limits::of_machine(Machine::Uml(UmlMode::Seccomp), mib);
        let kvm = Limits::of_machine(Machine::Kvm, 512);
        assert!(kvm.memory_bytes > 512 << 20 && kvm.processes < 1000);
        assert!(uml(512).memory_bytes > kvm.memory_bytes);
        assert!(uml(2048).memory_bytes - uml(512).memory_bytes > 1536 << 20);
        // A node's smallest space of process ids has room for several.
        assert!(uml(512).processes * 7 < 32768);
    }

    #[test]
    fn a_group_that_does_not_have_a_limit_is_one_where_all_are_required() {
        let limits = Limits::of_machine(Machine::Kvm, 512);
        // There is no such group, so it has none.
        let group = Path::new("/drupe-unit-test-none");
        limits.set(group, Confinement::BestEffort).unwrap();
        let refused = limits.set(group, Confinement::Required).unwrap_err();
        assert_eq!(refused.kind(), crate::ErrorKind::FailedPrecondition);
        let text = refused.sentence();
        assert!(
            text.contains("pids.max") && text.contains("`confinement: required`"),
            "{text}"
        );
        assert!(!lacking_controllers().0.contains(&"memory"));
    }

    #[tokio::test]
    async fn what_is_in_the_group_opens_no_device_and_does_not_multiply() {
        let parent = Path::new("/drupe-unit-test-limits");
        let files = make(parent, "p").unwrap();
        let limits = Limits {
            processes: 20,
            memory_bytes: 64 << 20,
        };
        limits
            .set(
                &crate::cgroup::group(parent, "p").unwrap(),
                Confinement::Required,
            )
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("node");
        let script = format!(
            "read go
             echo x > /dev/null && head -c1 /dev/urandom > /dev/zero && echo has those of the jail
             mknod {node} c 1 5 2> /dev/null || echo makes none
             (exec < /dev/tty) 2> /dev/null || true
             (exec < /dev/full) 2> /dev/null || echo opens no other
             for n in $(seq 50); do sleep 100 > /dev/null & done 2> /dev/null
             kill $(jobs -p)",
            node = node.display()
        );
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        for file in &files {
            fs::write(file, child.id().to_string()).unwrap();
        }
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"go\n").unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let pids = super::dir("pids", &crate::cgroup::group(parent, "p").unwrap());
        let events = fs::read_to_string(pids.join("pids.events"));
        remove(parent, "p").await.unwrap();
        for file in files {
            fs::remove_dir(file.parent().unwrap().parent().unwrap()).unwrap();
        }
        assert!(said.contains("has those of the jail"), "{said}");
        if !is_unified() {
            assert!(said.contains("makes none"), "{said}");
            assert!(said.contains("opens no other"), "{said}");
        }
        // Refused a process at least once.
        assert_ne!(events.unwrap().trim(), "max 0");
    }
}
