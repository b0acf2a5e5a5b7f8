//! A CDI file: JSON or YAML, as the specification's schema has it. An unknown
//! field is an error: what a file asks for is done or refused, never passed
//! over.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::name::{check_device, check_kind};
use crate::devices::Access;

const MAX_BYTES: u64 = 1 << 20;
/// Major versions of the specification that are understood.
const MAJORS: [u32; 2] = [0, 1];

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("it is larger than {MAX_BYTES} bytes")]
    TooLarge,
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    #[error("{0}")]
    Yaml(#[from] serde_norway::Error),
    #[error("cdiVersion {0:?} is not 0.x or 1.x")]
    Version(String),
    #[error("kind {kind:?}: {why}")]
    Kind { kind: String, why: &'static str },
    #[error("it has no devices")]
    NoDevices,
    #[error("device {name:?}: {why}")]
    Device { name: String, why: &'static str },
    #[error("{what}: {why}")]
    Edit { what: String, why: &'static str },
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    cdi_version: String,
    pub kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    pub devices: Vec<Device>,
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    pub name: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    pub container_edits: ContainerEdits,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ContainerEdits {
    pub env: Vec<String>,
    pub device_nodes: Vec<DeviceNode>,
    pub net_devices: Vec<NetDevice>,
    pub hooks: Vec<Hook>,
    pub mounts: Vec<Mount>,
    pub intel_rdt: Option<IntelRdt>,
    #[serde(rename = "additionalGids")]
    pub additional_gids: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceNode {
    pub path: PathBuf,
    pub host_path: Option<PathBuf>,
    /// b, c, u or p.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub file_mode: Option<u32>,
    pub permissions: Option<Access>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetDevice {
    pub host_interface_name: String,
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    pub hook_name: HookName,
    pub path: PathBuf,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub env: Vec<String>,
    pub timeout: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HookName {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

impl HookName {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    #[serde(default)]
    pub options: Vec<String>,
    #[serde(default, rename = "type")]
    pub kind: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IntelRdt {
    #[serde(rename = "closID")]
    pub clos_id: Option<String>,
    #[serde(rename = "l3CacheSchema")]
    pub l3_cache_schema: Option<String>,
    #[serde(rename = "memBwSchema")]
    pub mem_bw_schema: Option<String>,
    pub schemata: Option<Vec<String>>,
    #[serde(rename = "enableMonitoring")]
    pub enable_monitoring: bool,
    #[serde(rename = "enableCMT")]
    pub enable_cmt: bool,
    #[serde(rename = "enableMBM")]
    pub enable_mbm: bool,
}

impl Spec {
    /// Reads and checks a file whose name says which of the two it is.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let mut text = Vec::new();
        File::open(path)?
            .take(MAX_BYTES + 1)
            .read_to_end(&mut text)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(FileError::TooLarge);
        }
        let spec: Self = match path.extension() {
            Some(extension) if extension == "json" => serde_json::from_slice(&text)?,
            _ => serde_norway::from_slice(&text)?,
        };
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), FileError> {
        let version = self.cdi_version.trim_start_matches('v');
        let major = version.split('.').next().and_then(|m| m.parse().ok());
        if !major.is_some_and(|major| MAJORS.contains(&major)) || !version.contains('.') {
            return Err(FileError::Version(self.cdi_version.clone()));
        }
        check_kind(&self.kind).map_err(|why| FileError::Kind {
            kind: self.kind.clone(),
            why,
        })?;
        if self.devices.is_empty() {
            return Err(FileError::NoDevices);
        }
        self.container_edits.check()?;
        let mut names = BTreeSet::new();
        for device in &self.devices {
            let refuse = |why| FileError::Device {
                name: device.name.clone(),
                why,
            };
            check_device(&device.name).map_err(refuse)?;
            if !names.insert(&device.name) {
                return Err(refuse("is there twice"));
            }
            if device.container_edits == ContainerEdits::default() {
                return Err(refuse("has no containerEdits"));
            }
            device.container_edits.check()?;
        }
        Ok(())
    }
}

impl ContainerEdits {
    fn check(&self) -> Result<(), FileError> {
        let refuse = |what: String, why| Err(FileError::Edit { what, why });
        for variable in &self.env {
            let name = variable.split_once('=').map(|(name, _)| name);
            if name.is_none_or(str::is_empty) || variable.contains('\0') {
                return refuse(format!("env {variable:?}"), "is not NAME=value");
            }
        }
        for node in &self.device_nodes {
            let what = || format!("deviceNodes {:?}", node.path);
            if !is_place(&node.path) {
                return refuse(what(), "is not an absolute path without '..'");
            }
            if node
                .host_path
                .as_ref()
                .is_some_and(|path| !path.is_absolute())
            {
                return refuse(what(), "has a hostPath that is not absolute");
            }
            if !matches!(
                node.kind.as_deref(),
                None | Some("" | "b" | "c" | "u" | "p")
            ) {
                return refuse(what(), "has a type that is none of b, c, u and p");
            }
        }
        for hook in &self.hooks {
            let what = || format!("hooks {:?}", hook.path);
            if !hook.path.is_absolute() {
                return refuse(what(), "is not an absolute path");
            }
            if hook.timeout.is_some_and(|timeout| timeout < 0) {
                return refuse(what(), "has a negative timeout");
            }
            if hook.env.iter().any(|variable| !variable.contains('=')) {
                return refuse(what(), "has an env that is not NAME=value");
            }
        }
        for mount in &self.mounts {
            let what = || format!("mounts {:?}", mount.container_path);
            if !is_place(&mount.container_path) {
                return refuse(what(), "is not an absolute path without '..'");
            }
            if mount.host_path.as_os_str().is_empty() {
                return refuse(what(), "has no hostPath");
            }
        }
        let is_name = |name: &str| !name.is_empty();
        for device in &self.net_devices {
            if !is_name(&device.host_interface_name) || !is_name(&device.name) {
                return refuse("netDevices".to_owned(), "has an empty name");
            }
        }
        Ok(())
    }
}

/// A path below a container's root.
fn is_place(path: &Path) -> bool {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    path.is_absolute()
        && path.components().count() > 1
        && path.components().all(plain)
        && !path.as_os_str().as_encoded_bytes().contains(&0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<Spec, FileError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Spec::read(&path)
    }

    const FULL: &str = r#"
cdiVersion: "1.1.0"
kind: vendor.com/class
annotations: {a: b}
containerEdits:
  env: [ALL=1]
  hooks:
    - {hookName: createRuntime, path: /bin/true, args: ["true"], env: [A=b], timeout: 5}
devices:
  - name: "0"
    annotations: {c: d}
    containerEdits:
      deviceNodes:
        - {path: /dev/x, hostPath: /dev/null, type: c, major: 1, minor: 3, fileMode: 438, permissions: rw, uid: 1, gid: 2}
        - {path: /dev/fuse}
      mounts:
        - {hostPath: /srv, containerPath: /data, options: [ro, nosuid, bind], type: bind}
      additionalGids: [7]
      intelRdt: {closID: c, l3CacheSchema: "L3:0=f"}
      netDevices: [{hostInterfaceName: eth5, name: net0}]
"#;

    #[test]
    fn a_file_of_everything_is_read_as_yaml_and_json() {
        let spec = read("a.yaml", FULL).unwrap();
        let edits = &spec.devices[0].container_edits;
        assert_eq!(edits.device_nodes[0].permissions.unwrap().to_string(), "rw");
        assert_eq!(edits.additional_gids, [7]);
        assert_eq!(
            edits.intel_rdt.as_ref().unwrap().clos_id.as_deref(),
            Some("c")
        );
        assert_eq!(
            spec.container_edits.hooks[0].hook_name,
            HookName::CreateRuntime
        );
        let json = r#"{"cdiVersion":"0.8.0","kind":"v/c","devices":[{"name":"a","containerEdits":{"env":["A=b"]}}]}"#;
        assert_eq!(read("a.json", json).unwrap().devices[0].name, "a");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let device = |edits: &str| {
            format!(
                "{{cdiVersion: 0.6.0, kind: v/c, devices: [{{name: a, containerEdits: {edits}}}]}}"
            )
        };
        for (text, why) in [
            ("devices: [", "line"),
            ("{kind: v/c, devices: []}", "cdiVersion"),
            ("{cdiVersion: 2.0.0, kind: v/c, devices: []}", "2.0.0"),
            ("{cdiVersion: 0.6.0, kind: c, devices: []}", "kind"),
            ("{cdiVersion: 0.6.0, kind: v/c, devices: []}", "no devices"),
            (&device("{}"), "no containerEdits"),
            (&device("{env: [x]}"), "NAME=value"),
            (&device("{env: [A=b], unknown: 1}"), "unknown"),
            (&device("{deviceNodes: [{path: dev/x}]}"), "dev/x"),
            (
                &device("{deviceNodes: [{path: /dev/x, permissions: z}]}"),
                "\"z\"",
            ),
            (
                &device("{deviceNodes: [{path: /dev/x, type: q}]}"),
                "none of b",
            ),
            (&device("{hooks: [{hookName: never, path: /x}]}"), "never"),
            (
                &device("{hooks: [{hookName: poststop, path: x}]}"),
                "absolute",
            ),
            (
                &device("{mounts: [{hostPath: /x, containerPath: /a/../b}]}"),
                "mounts",
            ),
            (
                &device("{mounts: [{hostPath: /x, containerPath: /}]}"),
                "mounts",
            ),
            (
                "{cdiVersion: 0.6.0, kind: v/c, devices: [\
                 {name: a, containerEdits: {env: [A=b]}}, {name: a, containerEdits: {env: [A=b]}}]}",
                "twice",
            ),
        ] {
            let error = read("a.yaml", text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        let large = " ".repeat(MAX_BYTES as usize + 1);
        assert!(matches!(read("a.json", &large), Err(FileError::TooLarge)));
    }
}
