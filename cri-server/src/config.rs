//! The daemon's one YAML file. Every key has a default; `drupe config` prints
//! them all, commented. An unknown key is an error that names the nearest one.

#[cfg(test)]
mod page;
mod validate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use podsandbox::config::{HostPods, RuntimeConfig};
use podsandbox::confinement::Confinement;
use serde::{Deserialize, Serialize};

use crate::debug::DebugConfig;
use crate::overhead::OverheadConfig;
use crate::prometheus::MetricsConfig;
use crate::streaming::StreamingConfig;
use crate::traces::TracesConfig;

/// What `drupe config` prints; a test holds it to [`Config::default`].
pub const DEFAULT_YAML: &str = include_str!("default.yaml");

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub socket: PathBuf,
    pub root: PathBuf,
    pub run_dir: PathBuf,
    pub log_level: LogLevel,
    pub vmm: PathBuf,
    pub shim: PathBuf,
    pub unpacker: PathBuf,
    pub uid_base: u32,
    pub confinement: Confinement,
    pub cdi_spec_dirs: Vec<PathBuf>,
    pub default_runtime: String,
    pub runtimes: BTreeMap<String, RuntimeConfig>,
    pub network: NetworkConfig,
    pub streaming: StreamingConfig,
    pub metrics: MetricsConfig,
    pub traces: TracesConfig,
    pub overhead: OverheadConfig,
    pub debug: DebugConfig,
    pub images: imagesvc::ImageServiceConfig,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    pub conf_dir: PathBuf,
    pub bin_dirs: Vec<PathBuf>,
    pub netns_dir: PathBuf,
    pub plugin_timeout_seconds: u64,
    pub source_check_exempt: Vec<String>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            netns_dir: "/run/netns".into(),
            plugin_timeout_seconds: 30,
            source_check_exempt: Vec::new(),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: "/run/drupe/drupe.sock".into(),
            root: "/var/lib/drupe".into(),
            run_dir: "/run/drupe".into(),
            log_level: LogLevel::Info,
            vmm: "/usr/lib/drupe/drupe-vmm".into(),
            shim: "/usr/lib/drupe/drupe-shim".into(),
            unpacker: "/usr/lib/drupe/drupe-unpacker".into(),
            uid_base: 1_879_048_192,
            confinement: Confinement::BestEffort,
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            default_runtime: "microvm".to_owned(),
            runtimes: BTreeMap::from([
                ("microvm".to_owned(), RuntimeConfig::default()),
                (HostPods::HANDLER.to_owned(), RuntimeConfig::on_host("runc")),
            ]),
            network: NetworkConfig::default(),
            streaming: StreamingConfig::default(),
            metrics: MetricsConfig::default(),
            traces: TracesConfig::default(),
            overhead: OverheadConfig::default(),
            debug: DebugConfig::default(),
            images: imagesvc::ImageServiceConfig::default(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {path:?}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("configuration file {path:?}: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("configuration file {path:?}: {field}: {why}")]
    Value {
        path: PathBuf,
        field: String,
        why: String,
    },
}

impl Config {
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Self = if text.trim().is_empty() {
            Self::default()
        } else {
            serde_norway::from_str(&text).map_err(|error| ConfigError::Parse {
                path: path.to_owned(),
                message: with_nearest_key(&error.to_string()),
            })?
        };
        validate::validate(&config).map_err(|(field, why)| ConfigError::Value {
            path: path.to_owned(),
            field,
            why,
        })?;
        Ok(config)
    }
}

/// serde lists all known keys after an unknown one; people need the one they
/// meant.
fn with_nearest_key(message: &str) -> String {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let (Some((unknown, known)), true) = (quoted.split_first(), message.contains("unknown field"))
    else {
        return message.to_owned();
    };
    let nearest = known.iter().min_by_key(|key| distance(unknown, key));
    match nearest {
        Some(key) => format!("{message}; did you mean `{key}`?"),
        None => message.to_owned(),
    }
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn load(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(file.path())
    }

    #[test]
    fn the_printed_default_is_the_default() {
        assert_eq!(load(DEFAULT_YAML).unwrap(), Config::default());
        assert_eq!(load("").unwrap(), Config::default());
    }

    #[test]
    fn confinement_is_one_of_two_words() {
        assert!(
            load("confinement: required")
                .unwrap()
                .confinement
                .is_required()
        );
        let error = load("confinement: strict").unwrap_err().to_string();
        assert!(
            error.contains("best_effort") && error.contains("required"),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_key_names_the_one_that_was_meant() {
        let error = load("sockett: /x\n").unwrap_err().to_string();
        assert!(error.contains("did you mean `socket`?"), "{error}");
        let error = load("runtimes: {microvm: {kernal: /x}}\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("did you mean `kernel`?"), "{error}");
    }
}
