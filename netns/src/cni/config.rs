//! Network configurations: `*.conflist`, `*.conf` and `*.json` files
//! (CNI 1.1, section 1) and which of them counts.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::join;

/// A network configuration is a page of JSON.
const MAX_CONFIG_BYTES: u64 = 1024 * 1024;
/// Real chains have three or four.
const MAX_PLUGINS: usize = 32;
/// Leaves room for a pod's id and interface in a record's file name.
const MAX_NAME: usize = 96;

/// A version of the CNI specification that this crate speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum SpecVersion {
    #[serde(rename = "0.3.0")]
    V0_3_0,
    #[serde(rename = "0.3.1")]
    V0_3_1,
    #[serde(rename = "0.4.0")]
    V0_4_0,
    #[serde(rename = "1.0.0")]
    V1_0_0,
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl SpecVersion {
    const ALL: [Self; 5] = [
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.name() == name)
    }
}

/// A network that pods can be attached to: its plugins, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkList {
    pub name: String,
    pub version: SpecVersion,
    pub disable_check: bool,
    pub disable_gc: bool,
    pub plugins: Vec<Plugin>,
    /// The file it was read from.
    pub source: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugin {
    /// The name of its executable.
    pub kind: String,
    /// The capabilities that it wants the runtime's values for.
    pub capabilities: BTreeSet<String>,
    /// Its part of the configuration, as written.
    pub config: Map<String, Value>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    #[error("it is longer than {MAX_CONFIG_BYTES} bytes")]
    TooLong,
    #[error("it is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{0} is missing or not of the right type")]
    Field(&'static str),
    #[error("name {0:?} is not made of letters, digits, '_', '.' and '-'")]
    Name(String),
    #[error("plugin type {0:?} is not a plain file name")]
    Kind(String),
    #[error("cniVersion {0:?} is not one of 0.3.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0")]
    Version(String),
    #[error("it has {0} plugins, not 1 to {MAX_PLUGINS}")]
    PluginCount(usize),
}

/// Why there is no network to attach pods to.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    #[error("no CNI configuration (*.conflist, *.conf, *.json) in {0}")]
    NoConfig(PathBuf),
    #[error("cannot read CNI configuration directory {dir}: {source}")]
    Unreadable { dir: PathBuf, source: io::Error },
    #[error("no usable CNI configuration in {dir}: {}", list(files))]
    NoneValid {
        dir: PathBuf,
        files: Vec<(PathBuf, ConfigError)>,
    },
    #[error("CNI plugin {plugin} of {config} is not in {}", join(dirs))]
    NoPlugin {
        plugin: String,
        config: PathBuf,
        dirs: Vec<PathBuf>,
    },
}

fn list(files: &[(PathBuf, ConfigError)]) -> String {
    let each: Vec<String> = files
        .iter()
        .map(|(path, error)| {
            let name = path.file_name().unwrap_or(path.as_os_str());
            format!("{}: {error}", name.display())
        })
        .collect();
    each.join("; ")
}

/// The first valid configuration of `conf_dir` in the order of file names, if
/// the executables of all its plugins are there. Files before it that are not
/// valid are reported in the log, as other runtimes do.
pub fn load_network(conf_dir: &Path, bin_dirs: &[PathBuf]) -> Result<NetworkList, NotReady> {
    let unreadable = |source| NotReady::Unreadable {
        dir: conf_dir.to_owned(),
        source,
    };
    let entries = match fs::read_dir(conf_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(NotReady::NoConfig(conf_dir.to_owned()));
        }
        Err(source) => return Err(unreadable(source)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conflist" | "conf" | "json")) && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();

    let mut invalid: Vec<(PathBuf, ConfigError)> = Vec::new();
    for path in paths {
        match read(&path) {
            Ok(network) => {
                for (path, error) in &invalid {
                    tracing::warn!(path = %path.display(), %error, "CNI configuration passed over");
                }
                // No other network stands in while a plugin is being replaced.
                return match network.missing_plugin(bin_dirs) {
                    None => Ok(network),
                    Some(plugin) => Err(NotReady::NoPlugin {
                        plugin: plugin.to_owned(),
                        config: path,
                        dirs: bin_dirs.to_owned(),
                    }),
                };
            }
            Err(error) => invalid.push((path, error)),
        }
    }
    if invalid.is_empty() {
        return Err(NotReady::NoConfig(conf_dir.to_owned()));
    }
    Err(NotReady::NoneValid {
        dir: conf_dir.to_owned(),
        files: invalid,
    })
}

fn read(path: &Path) -> Result<NetworkList, ConfigError> {
    if fs::metadata(path)?.len() > MAX_CONFIG_BYTES {
        return Err(ConfigError::TooLong);
    }
    NetworkList::parse(path, &fs::read(path)?)
}

impl NetworkList {
    /// Parses a list, or a single plugin's configuration as a list of one.
    pub fn parse(source: &Path, bytes: &[u8]) -> Result<Self, ConfigError> {
        let Value::Object(mut top) = serde_json::from_slice(bytes)? else {
            return Err(ConfigError::Field("the top-level object"));
        };
        let name = match top.get("name") {
            Some(Value::String(name)) if is_identifier(name, MAX_NAME) => name.clone(),
            Some(Value::String(name)) => return Err(ConfigError::Name(name.clone())),
            _ => return Err(ConfigError::Field("name")),
        };
        let version = choose_version(&top)?;
        let disable_check = flag(&top, "disableCheck")?;
        let disable_gc = flag(&top, "disableGC")?;
        let plugins = match top.remove("plugins") {
            Some(Value::Array(plugins)) => plugins,
            Some(_) => return Err(ConfigError::Field("plugins")),
            None => vec![Value::Object(top)],
        };
        if !(1..=MAX_PLUGINS).contains(&plugins.len()) {
            return Err(ConfigError::PluginCount(plugins.len()));
        }
        Ok(Self {
            name,
            version,
            disable_check,
            disable_gc,
            plugins: plugins
                .into_iter()
                .map(Plugin::parse)
                .collect::<Result<_, _>>()?,
            source: source.to_owned(),
        })
    }

    /// The first plugin without an executable.
    pub(crate) fn missing_plugin(&self, bin_dirs: &[PathBuf]) -> Option<&str> {
        self.plugins
            .iter()
            .map(|plugin| plugin.kind.as_str())
            .find(|kind| find_plugin(kind, bin_dirs).is_none())
    }
}

impl Plugin {
    fn parse(value: Value) -> Result<Self, ConfigError> {
        let Value::Object(config) = value else {
            return Err(ConfigError::Field("an entry of plugins"));
        };
        let kind = match config.get("type") {
            Some(Value::String(kind)) if is_file_name(kind) => kind.clone(),
            Some(Value::String(kind)) => return Err(ConfigError::Kind(kind.clone())),
            _ => return Err(ConfigError::Field("type")),
        };
        let mut capabilities = BTreeSet::new();
        match config.get("capabilities") {
            None | Some(Value::Null) => {}
            Some(Value::Object(wanted)) => {
                for (name, wants) in wanted {
                    if wants.as_bool().ok_or(ConfigError::Field("capabilities"))? {
                        capabilities.insert(name.clone());
                    }
                }
            }
            Some(_) => return Err(ConfigError::Field("capabilities")),
        }
        Ok(Self {
            kind,
            capabilities,
            config,
        })
    }

    /// What the plugin reads on its standard input (CNI 1.1, "Deriving
    /// execution configuration from plugin configuration"): its own
    /// configuration with the list's name and version, the runtime's values of
    /// the capabilities that it declares, and `extra`.
    #[must_use]
    pub fn execution_config(
        &self,
        network: &NetworkList,
        runtime: &Map<String, Value>,
        extra: Option<(&str, Value)>,
    ) -> Map<String, Value> {
        let mut config = self.config.clone();
        config.remove("capabilities");
        config.insert("name".to_owned(), network.name.clone().into());
        config.insert("cniVersion".to_owned(), network.version.name().into());
        let wanted: Map<String, Value> = runtime
            .iter()
            .filter(|(name, _)| self.capabilities.contains(*name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !wanted.is_empty() {
            config.insert("runtimeConfig".to_owned(), wanted.into());
        }
        if let Some((key, value)) = extra {
            config.insert(key.to_owned(), value);
        }
        config
    }
}

/// The executable of a plugin: the first in the order of the directories.
#[must_use]
pub fn find_plugin(kind: &str, bin_dirs: &[PathBuf]) -> Option<PathBuf> {
    bin_dirs.iter().map(|dir| dir.join(kind)).find(|path| {
        fs::metadata(path)
            .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    })
}

/// The newest version of the list's that this crate speaks.
fn choose_version(top: &Map<String, Value>) -> Result<SpecVersion, ConfigError> {
    let mut names = Vec::new();
    match top.get("cniVersion") {
        Some(Value::String(name)) => names.push(name.as_str()),
        None => {}
        Some(_) => return Err(ConfigError::Field("cniVersion")),
    }
    match top.get("cniVersions") {
        Some(Value::Array(more)) => {
            for name in more {
                names.push(name.as_str().ok_or(ConfigError::Field("cniVersions"))?);
            }
        }
        None => {}
        Some(_) => return Err(ConfigError::Field("cniVersions")),
    }
    if names.is_empty() {
        return Err(ConfigError::Field("cniVersion"));
    }
    names
        .iter()
        .filter_map(|name| SpecVersion::parse(name))
        .max()
        .ok_or_else(|| ConfigError::Version(names.join(", ")))
}

/// Older lists write booleans as strings; libcni takes both.
fn flag(top: &Map<String, Value>, key: &'static str) -> Result<bool, ConfigError> {
    match top.get(key) {
        None => Ok(false),
        Some(Value::Bool(set)) => Ok(*set),
        Some(Value::String(set)) if set.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(set)) if set.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(ConfigError::Field(key)),
    }
}

/// The specification's form of network names and container ids.
pub(crate) fn is_identifier(name: &str, max: usize) -> bool {
    name.len() <= max
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn is_file_name(name: &str) -> bool {
    (1..=128).contains(&name.len()) && name != "." && name != ".." && !name.contains(['/', '\0'])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parse(value: &Value) -> Result<NetworkList, ConfigError> {
        NetworkList::parse(Path::new("10-net.conflist"), value.to_string().as_bytes())
    }

    fn plugin_dir(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        dir
    }

    #[test]
    fn a_list_is_parsed() {
        let network = parse(&json!({
            "cniVersion": "1.0.0", "name": "pods", "disableCheck": "true",
            "plugins": [
                {"type": "bridge", "bridge": "cni0"},
                {"type": "portmap", "capabilities": {"portMappings": true, "other": false}},
            ],
        }))
        .unwrap();
        assert_eq!(network.name, "pods");
        assert_eq!(network.version, SpecVersion::V1_0_0);
        assert!(network.disable_check && !network.disable_gc);
        assert_eq!(network.plugins[0].config["bridge"], "cni0");
        assert_eq!(
            network.plugins[1].capabilities,
            BTreeSet::from(["portMappings".to_owned()])
        );
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() {
        let network = parse(&json!({"cniVersion": "0.3.1", "name": "n", "type": "ptp"})).unwrap();
        assert_eq!(network.plugins.len(), 1);
        assert_eq!(network.plugins[0].kind, "ptp");
    }

    #[test]
    fn the_newest_common_version_is_taken() {
        let plugins = json!([{"type": "bridge"}]);
        let network = parse(&json!({
            "cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.1.0", "1.2.0"],
            "name": "n", "plugins": plugins,
        }))
        .unwrap();
        assert_eq!(network.version, SpecVersion::V1_1_0);
        let error = parse(&json!({"cniVersion": "2.0.0", "name": "n", "plugins": plugins}));
        assert!(matches!(error, Err(ConfigError::Version(_))));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let plugins = json!([{"type": "bridge"}]);
        let cases = [
            (json!([]), "top-level"),
            (json!({"cniVersion": "1.0.0", "plugins": plugins}), "name"),
            (
                json!({"cniVersion": "1.0.0", "name": "a/b", "plugins": plugins}),
                "a/b",
            ),
            (json!({"name": "n", "plugins": plugins}), "cniVersion"),
            (
                json!({"cniVersion": "1.0.0", "name": "n", "plugins": []}),
                "0 plugins",
            ),
            (
                json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{}]}),
                "type",
            ),
            (
                json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "../sh"}]}),
                "../sh",
            ),
        ];
        for (config, word) in cases {
            let error = parse(&config).unwrap_err().to_string();
            assert!(error.contains(word), "{config}: {error}");
        }
    }

    #[test]
    fn capabilities_become_runtime_config_only_where_declared() {
        let network = parse(&json!({
            "cniVersion": "1.0.0", "name": "n",
            "plugins": [
                {"type": "bridge", "capabilities": {"dns": true}},
                {"type": "portmap", "capabilities": {"portMappings": true}},
                {"type": "tuning"},
            ],
        }))
        .unwrap();
        let runtime = json!({"portMappings": [1], "bandwidth": {}});
        let runtime = runtime.as_object().unwrap();
        let config =
            |index: usize| network.plugins[index].execution_config(&network, runtime, None);
        assert!(!config(0).contains_key("runtimeConfig"));
        assert_eq!(config(1)["runtimeConfig"], json!({"portMappings": [1]}));
        assert!(!config(2).contains_key("runtimeConfig"));
        assert!((0..3).all(|index| !config(index).contains_key("capabilities")));
    }

    #[test]
    fn the_first_valid_file_in_name_order_counts() {
        let bins = plugin_dir(&["a", "b"]);
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, kind: &str| {
            let text = json!({"cniVersion": "1.0.0", "name": name, "type": kind}).to_string();
            fs::write(dir.path().join(name), text).unwrap();
        };
        let load = || load_network(dir.path(), &[bins.path().to_owned()]);
        let reason = || load().unwrap_err().to_string();

        assert!(reason().contains("no CNI configuration"));
        fs::write(dir.path().join("05-x.conflist"), "{").unwrap();
        fs::write(dir.path().join("readme.txt"), "{").unwrap();
        assert!(
            reason().contains("05-x.conflist: it is not JSON"),
            "{}",
            reason()
        );
        write("20-b.conf", "b");
        assert_eq!(load().unwrap().name, "20-b.conf");
        write("10-a.json", "a");
        assert_eq!(load().unwrap().name, "10-a.json");
        fs::remove_file(bins.path().join("a")).unwrap();
        assert!(reason().contains("CNI plugin a of "), "{}", reason());
    }

    proptest! {
        #[test]
        fn the_execution_config_is_the_plugins_own_and_what_the_runtime_must_add(
            own in proptest::collection::btree_map("[a-z]{1,6}", any::<u32>(), 0..6),
            declared in proptest::collection::btree_map("[A-D]", any::<bool>(), 0..4),
            given in proptest::collection::btree_map("[A-D]", any::<u8>(), 0..4),
        ) {
            let mut config = json!({"capabilities": declared});
            for (key, value) in &own {
                config[key] = (*value).into();
            }
            config["type"] = "p".into();
            let list = json!({"cniVersion": "0.4.0", "name": "n", "plugins": [config]});
            let network = parse(&list).unwrap();
            let runtime: Map<String, Value> =
                given.iter().map(|(k, v)| (k.clone(), (*v).into())).collect();
            let result = network.plugins[0].execution_config(
                &network,
                &runtime,
                Some(("prevResult", json!({}))),
            );
            for (key, value) in own.iter().filter(|(key, _)| *key != "type" && *key != "name") {
                prop_assert_eq!(&result[key], &json!(value));
            }
            let wanted: Map<String, Value> = runtime
                .into_iter()
                .filter(|(key, _)| declared.get(key) == Some(&true))
                .collect();
            prop_assert_eq!(
                result.get("runtimeConfig").cloned(),
                (!wanted.is_empty()).then_some(Value::Object(wanted))
            );
            prop_assert_eq!(&result["cniVersion"], "0.4.0");
            prop_assert!(result.contains_key("prevResult"));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = NetworkList::parse(Path::new("x"), &bytes);
        }
    }
}
