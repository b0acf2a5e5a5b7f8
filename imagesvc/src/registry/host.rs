//! One host that serves the distribution API: requests with authentication,
//! retries and the no-progress time-out.

use std::time::Duration;

use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, RANGE, RETRY_AFTER},
    redirect,
};
use tokio::sync::Mutex;

use super::{
    RegistryError, body, cause,
    endpoint::Endpoint,
    tls,
    token::{self, Challenge},
};
use crate::auth::{Credentials, Secret};

/// Tries of a request that the registry is too busy or too broken for (429,
/// 5xx, a connection that ends before the answer). The kubelet tries again
/// after that, with its own back-off.
pub(super) const TRIES: u32 = 4;
/// Doubled with each try.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// A registry that asks for more patience than this gets none.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(20);
/// Connecting, with DNS and TLS; also bounded by the no-progress time-out.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// As browsers and Go's client have it.
const MAX_REDIRECTS: usize = 10;

pub(super) struct Host {
    pub(super) endpoint: Endpoint,
    client: Client,
    /// Follows no redirect.
    token_client: Client,
    secret: Option<Secret>,
    repository: String,
    pub(super) no_progress: Duration,
    /// What the registry accepted last, shared by the pull's requests.
    authorization: Mutex<Option<HeaderValue>>,
}

/// One request of the API.
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    /// After the repository, such as `manifests/latest`.
    pub(super) path: &'a str,
    /// For messages: `manifest latest`.
    pub(super) what: &'a str,
    pub(super) accept: Option<&'a str>,
    /// First byte wanted.
    pub(super) offset: u64,
}

/// A failed try, and whether another may succeed.
enum Failure {
    Final(RegistryError),
    Transient(RegistryError, Option<Duration>),
}

impl Host {
    pub(super) fn new(
        endpoint: Endpoint,
        credentials: Option<&Credentials>,
        repository: &str,
        no_progress: Duration,
    ) -> Result<Self, RegistryError> {
        let tls = tls::client_config(endpoint.ca_file.as_deref())?;
        let client = |policy| {
            Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .connect_timeout(CONNECT_TIMEOUT.min(no_progress))
                .redirect(policy)
                .referer(false)
                .user_agent(concat!("drupe/", env!("CARGO_PKG_VERSION")))
                .build()
                .map_err(|e| RegistryError::Tls { reason: cause(&e) })
        };
        let secret = credentials
            .filter(|credentials| endpoint.may_have(credentials))
            .map(|credentials| credentials.secret.clone());
        // Sent without being asked for it: no challenge leads to it.
        let authorization = match &secret {
            Some(Secret::Registry(token)) => Some(bearer(token, &endpoint.host)?),
            _ => None,
        };
        Ok(Self {
            client: client(redirect_policy())?,
            token_client: client(redirect::Policy::none())?,
            endpoint,
            secret,
            repository: repository.to_owned(),
            no_progress,
            authorization: Mutex::new(authorization),
        })
    }

    pub(super) fn host(&self) -> String {
        self.endpoint.host.clone()
    }

    fn url(&self, path: &str) -> Result<Url, RegistryError> {
        let text = format!("{}{}/{path}", self.endpoint.api, self.repository);
        let mut url = Url::parse(&text).map_err(|e| RegistryError::Url {
            url: text,
            reason: e.to_string(),
        })?;
        if let Some(namespace) = &self.endpoint.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    /// Sends a request until it is answered with success or a final error.
    pub(super) async fn send(&self, ask: &Ask<'_>) -> Result<Response, RegistryError> {
        let mut tries = 1;
        loop {
            match self.send_authorized(ask).await {
                Ok(response) => return Ok(response),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Transient(error, wait)) => {
                    let wait = wait.unwrap_or(backoff(tries));
                    if tries == TRIES || wait > MAX_RETRY_AFTER {
                        return Err(error);
                    }
                    tracing::debug!(%error, ?wait, "trying again");
                    tokio::time::sleep(wait).await;
                    tries += 1;
                }
            }
        }
    }

    /// One try; a 401 is met once with what the registry asks for.
    async fn send_authorized(&self, ask: &Ask<'_>) -> Result<Response, Failure> {
        let used = self.authorization.lock().await.clone();
        let response = self.send_once(ask, used.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return self.sort(ask, response).await;
        }
        let challenge = Challenge::from_headers(response.headers());
        let words = body::error_words(response).await;
        let renewed =
            self.authorize(ask, used, challenge, words)
                .await
                .map_err(|error| match error {
                    RegistryError::Unreachable { .. } => Failure::Transient(error, None),
                    error => Failure::Final(error),
                })?;
        let response = self.send_once(ask, Some(&renewed)).await?;
        self.sort(ask, response).await
    }

    async fn send_once(
        &self,
        ask: &Ask<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failure> {
        let url = self.url(ask.path).map_err(Failure::Final)?;
        let mut headers = HeaderMap::new();
        if let Some(accept) = ask.accept {
            let accept = HeaderValue::from_str(accept).unwrap_or(HeaderValue::from_static("*/*"));
            headers.insert(ACCEPT, accept);
        }
        if let Some(authorization) = authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        if ask.offset > 0 {
            headers.insert(RANGE, range(ask.offset));
        }
        let request = self
            .client
            .request(ask.method.clone(), url)
            .headers(headers);
        match tokio::time::timeout(self.no_progress, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                let fresh = error.is_connect() || error.is_redirect() || error.is_builder();
                let unreachable = RegistryError::Unreachable {
                    host: self.host(),
                    reason: cause(&error),
                };
                // Nobody is there, or a policy says no: asking again soon
                // would only delay the answer.
                Err(if fresh {
                    Failure::Final(unreachable)
                } else {
                    Failure::Transient(unreachable, None)
                })
            }
            Err(_) => Err(Failure::Final(RegistryError::NoProgress {
                host: self.host(),
                what: ask.what.to_owned(),
                bytes: ask.offset,
                seconds: self.no_progress.as_secs(),
            })),
        }
    }

    async fn sort(&self, ask: &Ask<'_>, response: Response) -> Result<Response, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.trim().parse().ok())
            .map(Duration::from_secs);
        let words = body::error_words(response).await;
        let (host, what) = (self.host(), ask.what.to_owned());
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let given = match (&self.secret, status) {
                    (None, _) => "it needs credentials and none were given for this registry",
                    (Some(_), StatusCode::FORBIDDEN) => "the credentials given do not allow it",
                    (Some(_), _) => "it does not accept the credentials given",
                };
                Failure::Final(RegistryError::Unauthorized {
                    host,
                    what,
                    reason: format!("{given}{words}"),
                })
            }
            StatusCode::NOT_FOUND => Failure::Final(RegistryError::NotFound {
                host,
                what,
                reason: words,
            }),
            status => {
                let error = RegistryError::Status {
                    host,
                    what,
                    status: status.as_u16(),
                    reason: words,
                };
                if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                    Failure::Transient(error, retry_after)
                } else {
                    Failure::Final(error)
                }
            }
        })
    }

    /// Gets the header that a challenge asks for. Requests of one pull that
    /// are refused at the same time share one new token.
    async fn authorize(
        &self,
        ask: &Ask<'_>,
        used: Option<HeaderValue>,
        challenge: Option<Challenge>,
        words: String,
    ) -> Result<HeaderValue, RegistryError> {
        let denied = |reason: &str| RegistryError::Unauthorized {
            host: self.host(),
            what: ask.what.to_owned(),
            reason: format!("{reason}{words}"),
        };
        let mut current = self.authorization.lock().await;
        if let Some(newer) = current.as_ref()
            && Some(newer) != used.as_ref()
        {
            return Ok(newer.clone());
        }
        let header = match (challenge, &self.secret) {
            (_, Some(Secret::Registry(_))) => {
                return Err(denied("it does not accept the registry token given"));
            }
            (None, _) => return Err(denied("it refuses without saying how to authenticate")),
            (Some(Challenge::Basic), Some(Secret::Basic { .. })) if used.is_some() => {
                return Err(denied("it does not accept the credentials given"));
            }
            (Some(Challenge::Basic), Some(Secret::Basic { username, password })) => {
                basic(username, password).ok_or_else(|| denied("the credentials are malformed"))?
            }
            (Some(Challenge::Basic), Some(Secret::Identity(_))) => {
                return Err(denied(
                    "it takes a username and password, not an identity token",
                ));
            }
            (Some(Challenge::Basic), None) => {
                return Err(denied(
                    "it needs credentials and none were given for this registry",
                ));
            }
            (
                Some(Challenge::Bearer {
                    realm,
                    service,
                    scope,
                }),
                secret,
            ) => {
                let own_scope = format!("repository:{}:pull", self.repository);
                let token = token::fetch(&token::TokenRequest {
                    client: &self.token_client,
                    host: &self.endpoint.host,
                    registry_is_tls: self.endpoint.api.scheme() == "https",
                    realm: &realm,
                    service: service.as_deref(),
                    scope: scope.as_deref().unwrap_or(&own_scope),
                    secret: secret.as_ref(),
                    no_progress: self.no_progress,
                })
                .await?;
                bearer(&token, &self.endpoint.host)?
            }
        };
        *current = Some(header.clone());
        Ok(header)
    }

    /// The whole body of a small answer.
    pub(super) async fn read(
        &self,
        response: Response,
        what: &str,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let read = body::read(response, &self.endpoint.host, what, limit);
        tokio::time::timeout(self.no_progress, read)
            .await
            .map_err(|_| RegistryError::NoProgress {
                host: self.host(),
                what: what.to_owned(),
                bytes: 0,
                seconds: self.no_progress.as_secs(),
            })?
    }
}

pub(super) fn backoff(tries: u32) -> Duration {
    FIRST_BACKOFF * 2u32.saturating_pow(tries - 1)
}

fn bearer(token: &str, host: &str) -> Result<HeaderValue, RegistryError> {
    sensitive(format!("Bearer {token}")).ok_or_else(|| RegistryError::Unauthorized {
        host: host.to_owned(),
        what: "access".into(),
        reason: "the token is malformed".into(),
    })
}

fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    use base64::Engine as _;
    let engine = base64::engine::general_purpose::STANDARD;
    sensitive(format!(
        "Basic {}",
        engine.encode(format!("{username}:{password}"))
    ))
}

fn sensitive(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(&text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn range(offset: u64) -> HeaderValue {
    HeaderValue::from_str(&format!("bytes={offset}-"))
        .unwrap_or(HeaderValue::from_static("bytes=0-"))
}

/// The client drops credentials when a redirect leads to another host, port
/// or scheme. Falling from HTTPS to HTTP is refused altogether.
fn redirect_policy() -> redirect::Policy {
    redirect::Policy::custom(|attempt| {
        if attempt.previous().len() >= MAX_REDIRECTS {
            return attempt.error("too many redirects");
        }
        let was_tls = attempt
            .previous()
            .last()
            .is_some_and(|u| u.scheme() == "https");
        if was_tls && attempt.url().scheme() != "https" {
            return attempt.error("it redirects from HTTPS to plain HTTP");
        }
        attempt.follow()
    })
}
