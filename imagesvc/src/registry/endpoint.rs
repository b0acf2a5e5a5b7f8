//! Where a registry's content can be had: its mirrors, then itself.

use std::path::PathBuf;

use reqwest::Url;

use crate::{
    auth::Credentials,
    config::{ImageServiceConfig, is_loopback, parse_mirror},
    reference::canonical_registry,
};

use super::RegistryError;

/// The host that serves Docker Hub's API.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

#[derive(Clone)]
pub(super) struct Endpoint {
    /// Host and optional port: for messages, and to hold credentials against.
    pub(super) host: String,
    /// Ends in a slash; `REPOSITORY/manifests/…` follows.
    pub(super) api: Url,
    /// The registry that a mirror stands for.
    pub(super) namespace: Option<String>,
    pub(super) ca_file: Option<PathBuf>,
}

impl Endpoint {
    /// Credentials are for the registry of the image. As in containerd, its
    /// mirrors get them too, since the operator chose these to stand in for
    /// it; but not in plain text over a network.
    pub(super) fn may_have(&self, credentials: &Credentials) -> bool {
        let private =
            self.namespace.is_none() || self.api.scheme() == "https" || is_loopback(&self.host);
        private && credentials.are_for(&self.host)
    }
}

pub(super) fn endpoints(
    config: &ImageServiceConfig,
    registry: &str,
) -> Result<Vec<Endpoint>, RegistryError> {
    let entry = config.registry(registry);
    let mut endpoints = Vec::with_capacity(entry.mirrors.len() + 1);
    for mirror in &entry.mirrors {
        let bad_url = |reason| RegistryError::Url {
            url: mirror.clone(),
            reason,
        };
        let api = parse_mirror(mirror).map_err(bad_url)?;
        let host = host_and_port(&api);
        let own_ca = config.registries.get(&host).and_then(|e| e.ca_file.clone());
        endpoints.push(Endpoint {
            host,
            api,
            namespace: Some(registry.to_owned()),
            ca_file: own_ca.or_else(|| entry.ca_file.clone()),
        });
    }

    let plain = entry
        .plain_http
        .unwrap_or_else(|| is_loopback(registry) && entry.ca_file.is_none());
    let scheme = if plain { "http" } else { "https" };
    let host = if registry == canonical_registry(DOCKER_HUB_HOST) {
        DOCKER_HUB_HOST
    } else {
        registry
    };
    let url = format!("{scheme}://{host}/v2/");
    let api = Url::parse(&url).map_err(|e| RegistryError::Url {
        url,
        reason: e.to_string(),
    })?;
    endpoints.push(Endpoint {
        host: registry.to_owned(),
        api,
        namespace: None,
        ca_file: entry.ca_file,
    });
    Ok(endpoints)
}

fn host_and_port(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Auth;

    fn config(json: &str) -> ImageServiceConfig {
        serde_json::from_str(json).unwrap()
    }

    fn urls(config: &ImageServiceConfig, registry: &str) -> Vec<String> {
        let endpoints = endpoints(config, registry).unwrap();
        endpoints.iter().map(|e| e.api.to_string()).collect()
    }

    #[test]
    fn mirrors_come_first_and_the_registry_last() {
        let config = config(
            r#"{"registries": {
                "docker.io": {"mirrors": ["http://127.0.0.1:5000", "https://m.example/v2/hub"]},
                "*": {"mirrors": ["https://all.example"]},
                "plain.example:80": {"plain_http": true}
            }}"#,
        );
        assert_eq!(
            urls(&config, "docker.io"),
            [
                "http://127.0.0.1:5000/v2/",
                "https://m.example/v2/hub/",
                "https://registry-1.docker.io/v2/",
            ]
        );
        assert_eq!(
            urls(&config, "ghcr.io"),
            ["https://all.example/v2/", "https://ghcr.io/v2/"]
        );
        assert_eq!(
            urls(&config, "plain.example:80"),
            ["http://plain.example/v2/"]
        );
    }

    #[test]
    fn only_a_local_registry_is_spoken_to_in_plain_http_by_default() {
        let default = ImageServiceConfig::default();
        assert_eq!(
            urls(&default, "127.0.0.1:5000"),
            ["http://127.0.0.1:5000/v2/"]
        );
        assert_eq!(
            urls(&default, "10.0.0.1:5000"),
            ["https://10.0.0.1:5000/v2/"]
        );
        let tls = config(r#"{"registries": {"localhost:5000": {"ca_file": "/ca.pem"}}}"#);
        assert_eq!(urls(&tls, "localhost:5000"), ["https://localhost:5000/v2/"]);
    }

    #[test]
    fn credentials_reach_mirrors_only_where_nobody_listens() {
        let config = config(
            r#"{"registries": {"a.example": {"mirrors":
                ["http://127.0.0.1:5000", "https://m.example", "http://m.example"]}}}"#,
        );
        let endpoints = endpoints(&config, "a.example").unwrap();
        let may = |auth: &Auth| -> Vec<bool> {
            let credentials = auth.credentials().unwrap().unwrap();
            endpoints.iter().map(|e| e.may_have(&credentials)).collect()
        };
        let auth = Auth {
            username: "u".into(),
            ..Auth::default()
        };
        assert_eq!(may(&auth), [true, true, false, true]);
        let bound = Auth {
            server_address: "a.example".into(),
            ..auth
        };
        assert_eq!(may(&bound), [false, false, false, true]);
    }
}
