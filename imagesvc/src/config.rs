//! The `images:` part of the daemon's configuration.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use reqwest::Url;
use serde::{Deserialize, Serialize};
use unpacker_client::Limits;

/// Every key has a default; an unknown key is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageServiceConfig {
    /// How to reach registries, by the host (and port) that image names carry,
    /// such as `docker.io` or `localhost:5000`. The entry `*` is for every
    /// registry without an entry of its own. Default: none, each registry is
    /// reached directly.
    pub registries: BTreeMap<String, RegistryConfig>,
    /// Layers of one image that are fetched at once, 1 to 16. Default: 3.
    pub parallel_layers: u32,
    /// A transfer from a registry that brings no byte for this long fails.
    /// 1 to 3600. Default: 60.
    pub no_progress_timeout_seconds: u64,
    /// The largest layer that is taken, once decompressed. Default: 64 GiB.
    pub max_layer_bytes: u64,
    /// The most files, directories and links in one layer. Default: 1048576.
    pub max_layer_entries: u64,
    /// How many bytes one byte of a layer may decompress to, beyond the first
    /// 2 GiB: more is taken for a decompression bomb. Default: 200.
    pub max_layer_ratio: u64,
    /// Whether no container reads a layer through pages that the node has cached
    /// for another one. Takes a file system with clones. Default: false.
    pub private_cache: bool,
    /// Images (references) that the kubelet's garbage collection must spare,
    /// such as the pause image. Default: none.
    pub pinned: Vec<String>,
}

/// How to reach one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Base URLs that are asked first, in order; the registry itself is asked
    /// when none of them delivers. A URL with a path stands for the whole API
    /// root (`https://cache.example/v2/hub`); one without gets `/v2`. A mirror
    /// is sent the registry's name as `?ns=`, and the credentials of the
    /// request unless these name another server or would cross the network
    /// in plain text.
    pub mirrors: Vec<String>,
    /// Speak HTTP instead of HTTPS with the registry itself. Default: only
    /// with a registry on this machine (`localhost`, loopback addresses) that
    /// has no `ca_file`.
    pub plain_http: Option<bool>,
    /// PEM file of certificates to trust beside the system's, for the registry
    /// and for those of its mirrors that have no `ca_file` of their own (an
    /// entry of `registries` under the mirror's host).
    pub ca_file: Option<PathBuf>,
}

impl Default for ImageServiceConfig {
    fn default() -> Self {
        Self {
            registries: BTreeMap::new(),
            parallel_layers: 3,
            no_progress_timeout_seconds: 60,
            max_layer_bytes: Limits::DEFAULT_MAX_UNCOMPRESSED_BYTES,
            max_layer_entries: Limits::DEFAULT_MAX_ENTRIES,
            max_layer_ratio: Limits::DEFAULT_MAX_RATIO,
            private_cache: false,
            pinned: Vec::new(),
        }
    }
}

/// What is wrong with a configuration; each names the key.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{key} is {value}, which is not from {min} to {max}")]
    OutOfRange {
        key: &'static str,
        value: u64,
        min: u64,
        max: u64,
    },
    #[error("registries: {registry:?} is neither a host with optional port nor \"*\"")]
    Registry { registry: String },
    #[error("registries: {registry}: mirror {mirror:?} {reason}")]
    Mirror {
        registry: String,
        mirror: String,
        reason: String,
    },
    #[error("registries: {registry}: ca_file {}: {reason}", path.display())]
    CaFile {
        registry: String,
        path: PathBuf,
        reason: String,
    },
    #[error("pinned: {0}")]
    Pinned(#[from] crate::reference::InvalidReference),
}

impl ImageServiceConfig {
    /// # Errors
    /// The first key whose value cannot work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let ranges = [
            ("parallel_layers", self.parallel_layers.into(), 1, 16),
            (
                "no_progress_timeout_seconds",
                self.no_progress_timeout_seconds,
                1,
                3600,
            ),
            ("max_layer_bytes", self.max_layer_bytes, 1 << 20, 1 << 44),
            ("max_layer_entries", self.max_layer_entries, 1, 1 << 30),
            ("max_layer_ratio", self.max_layer_ratio, 1, 1 << 20),
        ];
        for (key, value, min, max) in ranges {
            if !(min..=max).contains(&value) {
                return Err(ConfigError::OutOfRange {
                    key,
                    value,
                    min,
                    max,
                });
            }
        }
        for pinned in &self.pinned {
            pinned.parse::<crate::reference::Reference>()?;
        }
        for (registry, config) in &self.registries {
            // A repository completes the host to a reference.
            let named = format!("{registry}/r/r").parse::<crate::reference::Reference>();
            let whole = named.is_ok_and(|r| r.registry() == registry);
            if registry != "*" && !whole {
                return Err(ConfigError::Registry {
                    registry: registry.clone(),
                });
            }
            for mirror in &config.mirrors {
                parse_mirror(mirror).map_err(|reason| ConfigError::Mirror {
                    registry: registry.clone(),
                    mirror: mirror.clone(),
                    reason,
                })?;
            }
            if let Some(path) = &config.ca_file {
                crate::registry::tls::read_certificates(path).map_err(|reason| {
                    ConfigError::CaFile {
                        registry: registry.clone(),
                        path: path.clone(),
                        reason,
                    }
                })?;
            }
        }
        Ok(())
    }

    pub(crate) fn no_progress(&self) -> Duration {
        Duration::from_secs(self.no_progress_timeout_seconds)
    }

    /// The entry for `registry`, or that of `*`, or the defaults.
    pub(crate) fn registry(&self, registry: &str) -> RegistryConfig {
        self.registries
            .get(registry)
            .or_else(|| self.registries.get("*"))
            .cloned()
            .unwrap_or_default()
    }
}

/// The API root of a mirror, ending in a slash.
pub(crate) fn parse_mirror(text: &str) -> Result<Url, String> {
    let mut url = Url::parse(text).map_err(|e| format!("is not a URL: {e}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("is not an http or https URL".into());
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err("has no host".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds credentials, which belong in the pull request".into());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("has a query or a fragment".into());
    }
    let path = match url.path().trim_end_matches('/') {
        "" => "/v2/".to_owned(),
        path => format!("{path}/"),
    };
    url.set_path(&path);
    Ok(url)
}

/// Whether `host` (with optional port) is this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_json(json: &str) -> Result<ImageServiceConfig, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn an_empty_configuration_is_the_default_and_valid() {
        let config = from_json("{}").unwrap();
        assert_eq!(config, ImageServiceConfig::default());
        config.validate().unwrap();
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(from_json(r#"{"paralel_layers": 3}"#).is_err());
        assert!(from_json(r#"{"registries": {"a.io": {"mirror": "x"}}}"#).is_err());
    }

    #[test]
    fn errors_name_the_key() {
        for (json, part) in [
            (r#"{"parallel_layers": 0}"#, "parallel_layers is 0"),
            (r#"{"registries": {"http://a": {}}}"#, "http://a"),
            (r#"{"registries": {"a/b": {}}}"#, "a/b"),
            (
                r#"{"registries": {"docker.io": {"mirrors": ["m:1"]}}}"#,
                "m:1",
            ),
            (
                r#"{"registries": {"docker.io": {"mirrors": ["http://u:p@m"]}}}"#,
                "credentials",
            ),
            (
                r#"{"registries": {"a.io": {"ca_file": "/nowhere/ca.pem"}}}"#,
                "/nowhere/ca.pem",
            ),
            (r#"{"pinned": ["UPPER CASE"]}"#, "pinned"),
        ] {
            let error = from_json(json).unwrap().validate().unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn mirrors_get_the_api_root_unless_they_name_one() {
        for (given, base) in [
            ("http://127.0.0.1:5000", "http://127.0.0.1:5000/v2/"),
            ("https://m.example/", "https://m.example/v2/"),
            ("https://m.example/v2/hub", "https://m.example/v2/hub/"),
        ] {
            assert_eq!(parse_mirror(given).unwrap().as_str(), base);
        }
    }

    #[test]
    fn loopback_hosts_are_known() {
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:1",
            "127.3.2.1",
            "[::1]:5000",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "docker.io",
            "10.0.0.1:5000",
            "localhost.example",
            "[fe80::1]:5000",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
