//! CRI v1 as Kubernetes 1.36 speaks it: messages, clients and servers, as
//! generated from `proto/`. The wire is that of the published interface
//! (`k8s.io/cri-api` v0.36, `runtime.v1`); the words are this project's own.
//! The daemon serves it, the end-to-end tests call it.
//!
//! `tests/wire.rs` holds the proto to the interface; `examples/compare.rs`
//! shows where it differs from a published `api.proto`, for the next version.
#![forbid(unsafe_code)]

pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

impl std::fmt::Debug for v1::AuthConfig {
    /// Whether there are secrets, never which: requests end up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hidden = |secret: &str| if secret.is_empty() { "" } else { "***" };
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("password", &hidden(&self.password))
            .field("auth", &hidden(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &hidden(&self.identity_token))
            .field("registry_token", &hidden(&self.registry_token))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::v1;

    #[test]
    fn credentials_are_not_shown() {
        let request = v1::PullImageRequest {
            auth: Some(v1::AuthConfig {
                username: "user".into(),
                password: "hunter-1".into(),
                auth: "hunter-2".into(),
                server_address: "registry".into(),
                identity_token: "hunter-3".into(),
                registry_token: "hunter-4".into(),
            }),
            ..Default::default()
        };
        let shown = format!("{request:?}");
        assert!(!shown.contains("hunter"), "{shown}");
        assert!(
            shown.contains("user") && shown.contains("registry"),
            "{shown}"
        );
    }
}
