//! Credentials of a pull request, in all the forms of CRI's `AuthConfig`.

use std::fmt;

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use crate::reference::canonical_registry;

/// CRI `AuthConfig`. Empty fields are absent.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    pub username: String,
    pub password: String,
    /// Base64 of `username:password`.
    pub auth: String,
    /// Where the credentials may be sent, as a host or a URL. Empty: to the
    /// registry that the image names and its mirrors.
    pub server_address: String,
    /// A refresh token, exchanged at the registry's token server.
    pub identity_token: String,
    /// A bearer token for the registry itself.
    pub registry_token: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

/// What of an [`Auth`] is used.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Secret {
    Basic { username: String, password: String },
    Identity(String),
    Registry(String),
}

#[derive(Clone)]
pub(crate) struct Credentials {
    pub(crate) secret: Secret,
    /// Canonical host, when the request restricts them to one.
    server: Option<String>,
}

impl Auth {
    /// # Errors
    /// A sentence about the malformed field.
    pub(crate) fn credentials(&self) -> Result<Option<Credentials>, &'static str> {
        let secret = if !self.registry_token.is_empty() {
            Secret::Registry(self.registry_token.clone())
        } else if !self.username.is_empty() {
            Secret::Basic {
                username: self.username.clone(),
                password: self.password.clone(),
            }
        } else if !self.identity_token.is_empty() {
            Secret::Identity(self.identity_token.clone())
        } else if !self.auth.is_empty() {
            decode_basic(&self.auth)?
        } else {
            return Ok(None);
        };
        let server = match self.server_address.trim() {
            "" => None,
            address => Some(server_host(address)),
        };
        Ok(Some(Credentials { secret, server }))
    }
}

impl Credentials {
    /// Whether they may go to `host` (with optional port).
    pub(crate) fn are_for(&self, host: &str) -> bool {
        self.server
            .as_ref()
            .is_none_or(|server| server == canonical_registry(host))
    }
}

/// `https://index.docker.io/v1/` is how Docker's own configuration files name
/// Docker Hub.
fn server_host(address: &str) -> String {
    let rest = address
        .strip_prefix("https://")
        .or_else(|| address.strip_prefix("http://"))
        .unwrap_or(address);
    let host = rest.split('/').next().unwrap_or(rest);
    canonical_registry(&host.to_ascii_lowercase()).to_owned()
}

fn decode_basic(text: &str) -> Result<Secret, &'static str> {
    const BAD: &str = "the auth field is not base64 of username:password";
    let engine = GeneralPurpose::new(
        &alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let bytes = engine.decode(text.trim()).map_err(|_| BAD)?;
    let text = String::from_utf8(bytes).map_err(|_| BAD)?;
    let (username, password) = text.split_once(':').ok_or(BAD)?;
    Ok(Secret::Basic {
        username: username.to_owned(),
        // Docker pads some passwords with NULs.
        password: password.trim_end_matches('\0').to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(username: &str, password: &str) -> Secret {
        Secret::Basic {
            username: username.into(),
            password: password.into(),
        }
    }

    fn secret(auth: &Auth) -> Option<Secret> {
        auth.credentials().unwrap().map(|c| c.secret)
    }

    #[test]
    fn every_form_is_understood() {
        assert!(secret(&Auth::default()).is_none());
        let plain = Auth {
            username: "u".into(),
            password: "p".into(),
            identity_token: "i".into(),
            ..Auth::default()
        };
        assert!(secret(&plain) == Some(basic("u", "p")));
        for encoded in ["dTpwOnE=", "dTpwOnE", " dTpwOnE=\n"] {
            let auth = Auth {
                auth: encoded.into(),
                ..Auth::default()
            };
            assert!(secret(&auth) == Some(basic("u", "p:q")), "{encoded}");
        }
        let identity = Auth {
            identity_token: "i".into(),
            ..Auth::default()
        };
        assert!(secret(&identity) == Some(Secret::Identity("i".into())));
        let registry = Auth {
            registry_token: "r".into(),
            ..plain
        };
        assert!(secret(&registry) == Some(Secret::Registry("r".into())));
    }

    #[test]
    fn a_malformed_auth_field_is_an_error() {
        for bad in ["!!!", "dXNlcg==", "/w=="] {
            let auth = Auth {
                auth: bad.into(),
                ..Auth::default()
            };
            assert!(auth.credentials().is_err(), "{bad}");
        }
    }

    #[test]
    fn credentials_for_one_server_go_nowhere_else() {
        for (address, host, allowed) in [
            ("", "anything", true),
            ("https://index.docker.io/v1/", "registry-1.docker.io", true),
            ("docker.io", "registry-1.docker.io", true),
            ("http://127.0.0.1:5000", "127.0.0.1:5000", true),
            ("http://127.0.0.1:5000", "127.0.0.1:5001", false),
            ("ghcr.io", "ghcr.io.example.com", false),
        ] {
            let auth = Auth {
                username: "u".into(),
                server_address: address.into(),
                ..Auth::default()
            };
            let credentials = auth.credentials().unwrap().unwrap();
            assert_eq!(credentials.are_for(host), allowed, "{address} {host}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let auth = Auth {
            username: "u".into(),
            password: "hunter2".into(),
            auth: "hunter2".into(),
            identity_token: "hunter2".into(),
            registry_token: "hunter2".into(),
            ..Auth::default()
        };
        assert!(!format!("{auth:?}").contains("hunter2"));
    }
}
