//! The distribution token flow: a `WWW-Authenticate` challenge becomes a
//! bearer token.

use std::time::Duration;

use reqwest::{Client, Url, header::HeaderMap};
use serde::Deserialize;

use super::{RegistryError, body};
use crate::auth::Secret;

/// Tokens are a few KiB.
const MAX_TOKEN_RESPONSE: u64 = 256 * 1024;
/// What this client calls itself to token servers, which log it.
const CLIENT_ID: &str = "drupe";

/// What a registry asks for with its 401.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// The first challenge that this client can meet, bearer preferred.
    pub(super) fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut basic = None;
        for header in headers.get_all(reqwest::header::WWW_AUTHENTICATE) {
            let Ok(text) = header.to_str() else { continue };
            let Ok(challenges) = http_auth::parse_challenges(text) else {
                continue;
            };
            for challenge in challenges {
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                }
                if !challenge.scheme.eq_ignore_ascii_case("bearer") {
                    continue;
                }
                let param = |name: &str| {
                    let mut params = challenge.params.iter();
                    params
                        .find(|(key, _)| key.eq_ignore_ascii_case(name))
                        .map(|(_, value)| value.to_unescaped())
                        .filter(|value| !value.is_empty())
                };
                if let Some(realm) = param("realm") {
                    return Some(Self::Bearer {
                        realm,
                        service: param("service"),
                        scope: param("scope"),
                    });
                }
            }
        }
        basic
    }
}

#[derive(Deserialize)]
struct TokenResponse {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

/// What a token is asked for, and from where.
pub(super) struct TokenRequest<'a> {
    /// Follows no redirect: what is sent here is secret.
    pub(super) client: &'a Client,
    pub(super) host: &'a str,
    /// Whether the registry itself is spoken to over TLS.
    pub(super) registry_is_tls: bool,
    pub(super) realm: &'a str,
    pub(super) service: Option<&'a str>,
    pub(super) scope: &'a str,
    pub(super) secret: Option<&'a Secret>,
    pub(super) no_progress: Duration,
}

/// Asks the token server of a challenge: with a refresh token as OAuth 2
/// (POST), with a password or anonymously as the distribution spec has it
/// (GET).
pub(super) async fn fetch(request: &TokenRequest<'_>) -> Result<String, RegistryError> {
    let denied = |reason: String| RegistryError::Unauthorized {
        host: request.host.to_owned(),
        what: request.scope.to_owned(),
        reason,
    };
    let mut url = Url::parse(request.realm)
        .map_err(|e| denied(format!("its token server's address is malformed: {e}")))?;
    let plain = url.scheme() == "http" && !request.registry_is_tls;
    if url.scheme() != "https" && !plain {
        return Err(denied(format!(
            "its token server {:?} is not an https address",
            request.realm
        )));
    }
    let http = match request.secret {
        Some(Secret::Identity(token)) => {
            let mut form = vec![
                ("grant_type", "refresh_token"),
                ("client_id", CLIENT_ID),
                ("scope", request.scope),
                ("refresh_token", token),
            ];
            form.extend(request.service.map(|service| ("service", service)));
            request.client.post(url.clone()).form(&form)
        }
        other => {
            {
                let mut query = url.query_pairs_mut();
                query.append_pair("scope", request.scope);
                if let Some(service) = request.service {
                    query.append_pair("service", service);
                }
                if let Some(Secret::Basic { username, .. }) = other {
                    query.append_pair("account", username);
                }
            }
            let get = request.client.get(url.clone());
            match other {
                Some(Secret::Basic { username, password }) => {
                    get.basic_auth(username, Some(password))
                }
                _ => get,
            }
        }
    };
    let server = url.host_str().unwrap_or_default().to_owned();
    let what = format!("a token for {}", request.scope);
    let answer = async {
        let response = http.send().await.map_err(|e| RegistryError::Unreachable {
            host: request.host.to_owned(),
            reason: format!("its token server {server}: {}", super::cause(&e)),
        })?;
        let status = response.status();
        if !status.is_success() {
            let words = body::error_words(response).await;
            let reason = format!(
                "its token server {server} answered {}{words}",
                status.as_u16()
            );
            return Err(if status.is_server_error() || status.as_u16() == 429 {
                RegistryError::Unreachable {
                    host: request.host.to_owned(),
                    reason,
                }
            } else {
                denied(reason)
            });
        }
        body::read(response, request.host, &what, MAX_TOKEN_RESPONSE).await
    };
    let bytes = tokio::time::timeout(request.no_progress, answer)
        .await
        .map_err(|_| RegistryError::NoProgress {
            host: server.clone(),
            what: what.clone(),
            bytes: 0,
            seconds: request.no_progress.as_secs(),
        })??;
    let response: TokenResponse = serde_json::from_slice(&bytes)
        .map_err(|e| denied(format!("its token server {server} sent no token: {e}")))?;
    let token = if response.token.is_empty() {
        response.access_token
    } else {
        response.token
    };
    if token.is_empty() {
        return Err(denied(format!("its token server {server} sent no token")));
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderValue, WWW_AUTHENTICATE};

    use super::*;

    fn challenge(lines: &[&'static str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(line));
        }
        Challenge::from_headers(&headers)
    }

    #[test]
    fn challenges_are_read_in_any_spelling() {
        assert_eq!(challenge(&[]), None);
        assert_eq!(challenge(&["Negotiate"]), None);
        assert_eq!(challenge(&["basic realm=\"x\""]), Some(Challenge::Basic));
        assert_eq!(challenge(&["Bearer service=\"no realm\""]), None);
        let bearer = Challenge::Bearer {
            realm: "https://auth.example/token".into(),
            service: Some("registry.example".into()),
            scope: Some("repository:a/b:pull".into()),
        };
        let line = "bearer Realm=\"https://auth.example/token\",service=\"registry.example\",\
                    scope=\"repository:a/b:pull\"";
        assert_eq!(challenge(&["Basic realm=\"x\"", line]), Some(bearer));
    }
}
