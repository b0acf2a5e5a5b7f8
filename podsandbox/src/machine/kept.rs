//! Which machine each handler's pods have been given on this node, kept over
//! restarts of daemon and node: what has had kvm does not get uml because a
//! driver, a setting of the firmware or a file is gone.
//!
//! A file of its own beside the records of pods: `drupe check` reads it while
//! the daemon holds those, and after a daemon that was killed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmm_client::Machine;

use super::Decision;

/// Below the daemon's root directory.
const FILE: &str = "machines.json";

/// What a handler's pods have had on this node so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Had {
    #[default]
    Nothing,
    Uml,
    /// And what spoke for it then.
    Kvm(String),
    /// What is kept cannot be read, for this reason: it may have been kvm.
    Unknown(String),
}

impl Had {
    /// What pods of the handler were given and can rely on, and what makes an
    /// end of that beside mending it; none if that is nothing beyond uml.
    pub(super) fn promise(&self) -> Option<(String, &'static str)> {
        match self {
            Self::Nothing | Self::Uml => None,
            Self::Kvm(why) => Some((
                format!("its pods have had kvm on this node ({why})"),
                "set `machine: uml`, by which the jail alone keeps its pods from the node",
            )),
            Self::Unknown(why) => Some((
                format!("its pods may have had kvm on this node ({why})"),
                "mend or remove that file, or set `machine: uml`",
            )),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Kvm,
    Uml,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    machine: Kind,
    why: String,
}

/// By handler. One that is configured no more keeps its machine: it may come
/// back.
type Entries = BTreeMap<String, Entry>;

/// What is kept below one root directory.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    entries: Result<Entries, String>,
    changed: bool,
}

impl Kept {
    /// Reads what is there, and writes nothing.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let path = root.join(FILE);
        let entries = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| format!("{path:?} cannot be understood: {error}")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Entries::new()),
            Err(error) => Err(format!("{path:?} cannot be read: {error}")),
        };
        Self {
            path,
            entries,
            changed: false,
        }
    }

    #[must_use]
    pub fn of(&self, handler: &str) -> Had {
        match &self.entries {
            Err(why) => Had::Unknown(why.clone()),
            Ok(entries) => match entries.get(handler) {
                None => Had::Nothing,
                Some(entry) => match entry.machine {
                    Kind::Uml => Had::Uml,
                    Kind::Kvm => Had::Kvm(entry.why.clone()),
                },
            },
        }
    }

    /// Takes down what pods of `handler` get from now on. A decision by which
    /// none can start changes nothing; nor is what cannot be read replaced,
    /// since it may hold other handlers as well.
    pub fn take_down(&mut self, handler: &str, decision: &Decision) {
        let Ok(entries) = &mut self.entries else {
            return;
        };
        let machine = match decision.machine {
            Machine::Kvm => Kind::Kvm,
            Machine::Uml(_) => Kind::Uml,
        };
        let known = entries.get(handler).map(|entry| entry.machine);
        if !decision.usable || known == Some(machine) {
            return;
        }
        let why = decision.why.clone();
        entries.insert(handler.to_owned(), Entry { machine, why });
        self.changed = true;
    }

    /// Puts what was taken down on the disk, all of it or nothing.
    ///
    /// # Errors
    ///
    /// When the file cannot be written; the one before is still there then.
    pub fn save(&mut self) -> io::Result<()> {
        let (Ok(entries), true) = (&self.entries, self.changed) else {
            return Ok(());
        };
        let bytes = serde_json::to_vec_pretty(entries)?;
        let fresh = self.path.with_extension("json.new");
        let mut file = File::create(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        self.changed = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_client::UmlMode;

    use super::*;

    const UML: Machine = Machine::Uml(UmlMode::Ptrace);

    fn decision(machine: Machine, usable: bool) -> Decision {
        Decision {
            machine,
            kernel: "/kernel".into(),
            why: "it works".to_owned(),
            remedy: None,
            usable,
            withheld: false,
            had: Had::Nothing,
        }
    }

    #[test]
    fn what_was_taken_down_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = Kept::read(dir.path());
        assert_eq!(kept.of("a"), Had::Nothing);
        kept.take_down("a", &decision(Machine::Kvm, true));
        kept.take_down("b", &decision(UML, true));
        kept.take_down("c", &decision(Machine::Kvm, false));
        kept.save().unwrap();

        let mut kept = Kept::read(dir.path());
        let had = ["a", "b", "c"].map(|handler| kept.of(handler));
        let kvm = Had::Kvm("it works".to_owned());
        assert_eq!(had, [kvm.clone(), Had::Uml, Had::Nothing]);
        // Up, and down where somebody has said so.
        kept.take_down("b", &decision(Machine::Kvm, true));
        kept.take_down("a", &decision(UML, true));
        kept.save().unwrap();
        let kept = Kept::read(dir.path());
        assert_eq!((kept.of("a"), kept.of("b")), (Had::Uml, kvm));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn to_read_it_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = Kept::read(&dir.path().join("not there"));
        assert_eq!(kept.of("a"), Had::Nothing);
        // Nothing new: nothing is written.
        kept.save().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_cannot_be_read_may_have_been_kvm_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        for text in [
            "",
            "{",
            "[]",
            "\0\0\0\0",
            r#"{"a": {"machine": "tdx", "why": "of a later version"}}"#,
            r#"{"a": {"machine": "kvm"}}"#,
        ] {
            fs::write(&path, text).unwrap();
            let mut kept = Kept::read(dir.path());
            let Had::Unknown(why) = kept.of("a") else {
                panic!("{text:?} was understood");
            };
            assert!(why.contains("machines.json"), "{why}");
            kept.take_down("a", &decision(UML, true));
            kept.save().unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(Kept::read(dir.path()).of("a"), Had::Unknown(_)));
    }
}
