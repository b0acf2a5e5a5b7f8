//! The files of the node's CDI directories, and the devices in them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::edits::Edits;
use super::file::{Device, Spec};
use super::{CdiError, Name};

/// Read at once; a node has a few.
const MAX_FILES: usize = 1024;

struct Registry {
    files: Vec<(PathBuf, Spec)>,
    /// What was not read, and why.
    broken: Vec<String>,
}

/// Where a device is: its file's directory, file, and place in it.
#[derive(Clone, Copy)]
struct Place {
    priority: usize,
    file: usize,
    device: usize,
}

/// What the devices `names` change, from the files below `dirs`. Reads the
/// files, which may be slow.
pub fn resolve(dirs: &[PathBuf], names: &[Name]) -> Result<Edits, CdiError> {
    if names.is_empty() {
        return Ok(Edits::default());
    }
    let mut registry = Registry {
        files: Vec::new(),
        broken: Vec::new(),
    };
    let mut places: BTreeMap<Name, Vec<Place>> = BTreeMap::new();
    for (priority, dir) in dirs.iter().enumerate() {
        let first = registry.files.len();
        registry.read_dir(dir);
        for file in first..registry.files.len() {
            let spec = &registry.files[file].1;
            for (device, Device { name, .. }) in spec.devices.iter().enumerate() {
                let name = Name {
                    kind: spec.kind.clone(),
                    device: name.clone(),
                };
                let place = Place {
                    priority,
                    file,
                    device,
                };
                places.entry(name).or_default().push(place);
            }
        }
    }
    registry.edits(names, &places)
}

impl Registry {
    fn read_dir(&mut self, dir: &Path) {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return self.complain(dir, &error.to_string()),
        };
        let is_spec = |path: &PathBuf| {
            let extension = path.extension().unwrap_or_default();
            extension == "json" || extension == "yaml"
        };
        let mut paths: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(is_spec)
            // No FIFO that would be waited for.
            .filter(|path| fs::metadata(path).is_ok_and(|metadata| metadata.is_file()))
            .take(MAX_FILES + 1)
            .collect();
        paths.sort();
        for path in paths {
            if self.files.len() + self.broken.len() >= MAX_FILES {
                let why = format!("there are more than {MAX_FILES} files, the rest is not read");
                return self.complain(dir, &why);
            }
            match Spec::read(&path) {
                Ok(spec) => self.files.push((path, spec)),
                Err(error) => self.complain(&path, &error.to_string()),
            }
        }
    }

    /// Each is logged, and said to those who miss a device.
    fn complain(&mut self, path: &Path, why: &str) {
        let why = why.replace('\n', " ");
        tracing::warn!(?path, why, "a CDI file is passed over");
        self.broken.push(format!("{}: {why}", path.display()));
    }

    fn edits(
        &self,
        names: &[Name],
        places: &BTreeMap<Name, Vec<Place>>,
    ) -> Result<Edits, CdiError> {
        let (mut found, mut missing, mut why) = (Vec::new(), Vec::new(), Vec::new());
        for name in names {
            let all = places.get(name).map(Vec::as_slice).unwrap_or_default();
            let highest = all.iter().map(|place| place.priority).max();
            let mut best = all.iter().filter(|place| Some(place.priority) == highest);
            match (best.next(), best.next()) {
                (Some(place), None) => found.push((name, *place)),
                (Some(one), Some(other)) => {
                    missing.push(name.to_string());
                    let path = |place: &Place| self.files[place.file].0.display();
                    why.push(format!("{name} is in {} and {}", path(one), path(other)));
                }
                (None, _) => missing.push(name.to_string()),
            }
        }
        if !missing.is_empty() {
            why.extend(self.broken.iter().take(3).cloned());
            if why.is_empty() {
                why.push("no file of cdi_spec_dirs has them".to_owned());
            }
            return Err(CdiError::Unresolvable {
                names: missing.join(", "),
                why: why.join("; "),
            });
        }
        let mut edits = Edits::default();
        let mut used = Vec::new();
        for (name, place) in found {
            let spec = &self.files[place.file].1;
            // What a file says of all its devices is done once.
            if !used.contains(&place.file) {
                used.push(place.file);
                edits.append(&name.to_string(), &spec.container_edits);
            }
            let device = &spec.devices[place.device];
            edits.append(&name.to_string(), &device.container_edits);
        }
        Ok(edits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        dir: tempfile::TempDir,
        dirs: Vec<PathBuf>,
    }

    impl Node {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let dirs = ["etc", "run"].map(|name| dir.path().join(name)).to_vec();
            for dir in &dirs {
                fs::create_dir(dir).unwrap();
            }
            Self { dir, dirs }
        }

        /// A file of devices v/c=NAME that set `FROM` to the file's name.
        fn write(&self, name: &str, devices: &[&str]) {
            let devices: Vec<String> = devices
                .iter()
                .map(|device| format!("{{name: {device}, containerEdits: {{env: [FROM={name}]}}}}"))
                .collect();
            let text = format!(
                "{{cdiVersion: 0.6.0, kind: v/c, containerEdits: {{env: [FILE={name}]}}, devices: [{}]}}",
                devices.join(",")
            );
            fs::write(self.dir.path().join(name), text).unwrap();
        }

        fn env(&self, names: &[&str]) -> Result<Vec<String>, String> {
            let names: Vec<Name> = names.iter().map(|name| name.parse().unwrap()).collect();
            let edits = resolve(&self.dirs, &names).map_err(|error| error.to_string())?;
            let shown = edits
                .env
                .iter()
                .map(|(name, value)| format!("{name}={value}"));
            Ok(shown.collect())
        }
    }

    #[test]
    fn a_later_directory_wins_and_a_files_own_edits_come_once() {
        let node = Node::new();
        node.write("etc/a.yaml", &["x", "y"]);
        node.write("run/a.yaml", &["x"]);
        assert_eq!(
            node.env(&["v/c=y", "v/c=x"]).unwrap(),
            [
                "FILE=etc/a.yaml",
                "FROM=etc/a.yaml",
                "FILE=run/a.yaml",
                "FROM=run/a.yaml"
            ]
        );
        node.write("run/b.yaml", &["z", "y"]);
        let env = node.env(&["v/c=z", "v/c=y"]).unwrap();
        assert_eq!(
            env,
            ["FILE=run/b.yaml", "FROM=run/b.yaml", "FROM=run/b.yaml"]
        );
    }

    #[test]
    fn a_device_of_two_files_is_no_device_and_both_are_named() {
        let node = Node::new();
        node.write("run/a.yaml", &["x"]);
        node.write("run/b.yaml", &["x", "y"]);
        let error = node.env(&["v/c=x", "v/c=y"]).unwrap_err();
        assert!(
            error.starts_with("unresolvable CDI devices v/c=x: "),
            "{error}"
        );
        assert!(
            error.contains("a.yaml") && error.contains("b.yaml"),
            "{error}"
        );
        assert!(node.env(&["v/c=y"]).is_ok());
    }

    #[test]
    fn a_broken_file_leaves_the_others_devices_and_is_named_to_who_misses_one() {
        let node = Node::new();
        node.write("etc/good.yaml", &["x"]);
        fs::write(node.dirs[1].join("bad.json"), "{").unwrap();
        fs::write(node.dirs[1].join("notes.txt"), "{").unwrap();
        fs::create_dir(node.dirs[1].join("dir.yaml")).unwrap();
        assert!(node.env(&["v/c=x"]).is_ok());
        let error = node.env(&["v/c=x", "v/c=gone"]).unwrap_err();
        assert!(
            error.starts_with("unresolvable CDI devices v/c=gone: "),
            "{error}"
        );
        assert!(
            error.contains("bad.json") && !error.contains("notes"),
            "{error}"
        );
    }

    #[test]
    fn no_directory_is_no_device() {
        let names = ["v/c=x".parse().unwrap()];
        let error = resolve(&["/no/such".into()], &names).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::NotFound);
        assert!(error.to_string().contains("cdi_spec_dirs"), "{error}");
    }
}
