//! What a client asks for: the address it comes to, the kind of connection it
//! wants, and the protocol that both speak on it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::HeaderMap;
use hyper::header::{CONNECTION, HeaderName, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use sha1::{Digest, Sha1};

use super::status::StatusFormat;

pub const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
pub const ACCEPTED_VERSIONS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");

/// Fixed by RFC 6455, 1.3.
const WEBSOCKET_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// A real token has 22 characters.
const MAX_TOKEN: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Exec,
    Attach,
    PortForward,
}

/// The kind of request and the token of a path.
pub fn parse_path(path: &str) -> Option<(Kind, &str)> {
    let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
    let kind = match kind {
        "exec" => Kind::Exec,
        "attach" => Kind::Attach,
        "portforward" => Kind::PortForward,
        _ => return None,
    };
    let known = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    let fits = (1..=MAX_TOKEN).contains(&token.len()) && token.bytes().all(known);
    fits.then_some((kind, token))
}

/// How exec and attach differ between versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    pub status: StatusFormat,
    /// The client has a stream for the terminal's size.
    pub resizes: bool,
    /// A message can end a channel; WebSocket only.
    pub close_signal: bool,
}

/// What is spoken once the connection is no HTTP any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    SpdyRemote(Remote),
    SpdyPortForward,
    WebSocketRemote(Remote),
    /// SPDY within WebSocket messages.
    WebSocketTunnel,
    /// Two channels for each port.
    WebSocketPorts,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    pub protocol: Protocol,
    /// To be told to the client; none if it named none.
    pub name: Option<&'static str>,
    /// The answer to a WebSocket's key.
    pub accept: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the request must upgrade to SPDY/3.1 or websocket")]
    NoUpgrade,
    #[error("the WebSocket request has no key, or is not of version 13")]
    WebSocket,
    #[error("the request names no stream protocol version")]
    NoProtocol,
    #[error("none of the stream protocols {offered:?} is supported; these are: {supported:?}")]
    Unsupported {
        offered: Vec<String>,
        supported: Vec<&'static str>,
    },
}

type Known = &'static [(&'static str, Protocol)];

const fn remote(status: StatusFormat, resizes: bool, close_signal: bool) -> Remote {
    Remote {
        status,
        resizes,
        close_signal,
    }
}

const SPDY_REMOTE: Known = &[
    (
        "v4.channel.k8s.io",
        Protocol::SpdyRemote(remote(StatusFormat::Json, true, false)),
    ),
    (
        "v3.channel.k8s.io",
        Protocol::SpdyRemote(remote(StatusFormat::Text, true, false)),
    ),
    (
        "v2.channel.k8s.io",
        Protocol::SpdyRemote(remote(StatusFormat::Text, false, false)),
    ),
    (
        "channel.k8s.io",
        Protocol::SpdyRemote(remote(StatusFormat::Text, false, false)),
    ),
];
const SPDY_PORT_FORWARD: Known = &[("portforward.k8s.io", Protocol::SpdyPortForward)];
const WEBSOCKET_REMOTE: Known = &[
    (
        "v5.channel.k8s.io",
        Protocol::WebSocketRemote(remote(StatusFormat::Json, true, true)),
    ),
    (
        "v4.channel.k8s.io",
        Protocol::WebSocketRemote(remote(StatusFormat::Json, true, false)),
    ),
    (
        "channel.k8s.io",
        Protocol::WebSocketRemote(remote(StatusFormat::Text, true, false)),
    ),
];
const WEBSOCKET_PORT_FORWARD: Known = &[
    ("SPDY/3.1+portforward.k8s.io", Protocol::WebSocketTunnel),
    ("v4.channel.k8s.io", Protocol::WebSocketPorts),
];

/// Of the client's protocols, in its order, the first that is known.
pub fn agree(kind: Kind, headers: &HeaderMap) -> Result<Agreed, Refusal> {
    if !words(headers, &CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade")) {
        return Err(Refusal::NoUpgrade);
    }
    let upgrades = |to: &str| words(headers, &UPGRADE).any(|word| word.eq_ignore_ascii_case(to));
    if upgrades("websocket") {
        let accept = Some(websocket_accept(headers).ok_or(Refusal::WebSocket)?);
        let known = match kind {
            Kind::Exec | Kind::Attach => WEBSOCKET_REMOTE,
            Kind::PortForward => WEBSOCKET_PORT_FORWARD,
        };
        if words(headers, &SEC_WEBSOCKET_PROTOCOL).next().is_none() {
            // A client that names none speaks the oldest.
            let protocol = known.last().ok_or(Refusal::NoProtocol)?.1;
            return Ok(Agreed {
                protocol,
                name: None,
                accept,
            });
        }
        let (name, protocol) = choose(known, headers, &SEC_WEBSOCKET_PROTOCOL)?;
        return Ok(Agreed {
            protocol,
            name: Some(name),
            accept,
        });
    }
    if !upgrades("SPDY/3.1") {
        return Err(Refusal::NoUpgrade);
    }
    let known = match kind {
        Kind::Exec | Kind::Attach => SPDY_REMOTE,
        Kind::PortForward => SPDY_PORT_FORWARD,
    };
    let (name, protocol) = choose(known, headers, &PROTOCOL_VERSION)?;
    Ok(Agreed {
        protocol,
        name: Some(name),
        accept: None,
    })
}

fn choose(
    known: Known,
    headers: &HeaderMap,
    header: &HeaderName,
) -> Result<(&'static str, Protocol), Refusal> {
    let offered: Vec<&str> = words(headers, header).collect();
    if offered.is_empty() {
        return Err(Refusal::NoProtocol);
    }
    let chosen = offered
        .iter()
        .find_map(|offer| known.iter().find(|(name, _)| name == offer));
    chosen.copied().ok_or_else(|| Refusal::Unsupported {
        offered: offered.into_iter().map(str::to_owned).collect(),
        supported: known.iter().map(|(name, _)| *name).collect(),
    })
}

fn websocket_accept(headers: &HeaderMap) -> Option<String> {
    let version = headers.get("sec-websocket-version")?;
    let key = headers.get(SEC_WEBSOCKET_KEY)?;
    let nonce = STANDARD.decode(key.as_bytes()).ok()?;
    if version != "13" || nonce.len() != 16 {
        return None;
    }
    let digest = Sha1::new()
        .chain_update(key.as_bytes())
        .chain_update(WEBSOCKET_GUID)
        .finalize();
    Some(STANDARD.encode(digest))
}

/// The words of a list, which may be in several headers.
fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    const SPDY: (&str, &str) = ("upgrade", "SPDY/3.1");
    const CONNECTION: (&str, &str) = ("connection", "Upgrade");

    #[test]
    fn paths_are_a_kind_and_a_token() {
        assert_eq!(parse_path("/exec/aB-_9"), Some((Kind::Exec, "aB-_9")));
        assert_eq!(parse_path("/attach/x"), Some((Kind::Attach, "x")));
        assert_eq!(parse_path("/portforward/x"), Some((Kind::PortForward, "x")));
        for path in [
            "",
            "/",
            "/exec",
            "/exec/",
            "/exec/a/b",
            "exec/a",
            "/Exec/a",
            "/exec/%41",
        ] {
            assert_eq!(parse_path(path), None, "{path}");
        }
    }

    #[test]
    fn the_clients_first_known_protocol_is_spoken() {
        let version = |v| ("x-stream-protocol-version", v);
        let agreed = |kind, pairs: &[_]| agree(kind, &headers(pairs));
        let named = |kind, pairs: &[_]| agreed(kind, pairs).unwrap().name;
        let many = [
            CONNECTION,
            SPDY,
            version("v9.channel.k8s.io, v3.channel.k8s.io"),
            version("v4.channel.k8s.io"),
        ];
        assert_eq!(named(Kind::Exec, &many), Some("v3.channel.k8s.io"));
        let forward = [CONNECTION, SPDY, version("portforward.k8s.io")];
        assert_eq!(
            agreed(Kind::PortForward, &forward).unwrap().protocol,
            Protocol::SpdyPortForward
        );
        assert!(matches!(
            agreed(Kind::Exec, &forward),
            Err(Refusal::Unsupported { .. })
        ));
        assert_eq!(
            agreed(Kind::Exec, &[CONNECTION, SPDY]),
            Err(Refusal::NoProtocol)
        );
        assert_eq!(agreed(Kind::Exec, &[SPDY]), Err(Refusal::NoUpgrade));
        assert_eq!(
            agreed(Kind::Exec, &[CONNECTION, ("upgrade", "h2c")]),
            Err(Refusal::NoUpgrade)
        );
    }

    #[test]
    fn the_rfcs_example_of_a_websocket_handshake() {
        let mut asked = headers(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ]);
        let agreed = agree(Kind::Exec, &asked).unwrap();
        assert_eq!(
            agreed.accept.as_deref(),
            Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        );
        assert_eq!(agreed.name, None);
        asked.insert(
            "sec-websocket-protocol",
            HeaderValue::from_static("v5.channel.k8s.io"),
        );
        let agreed = agree(Kind::Attach, &asked).unwrap();
        assert_eq!(agreed.name, Some("v5.channel.k8s.io"));
        assert!(matches!(agreed.protocol, Protocol::WebSocketRemote(r) if r.close_signal));
        asked.insert("sec-websocket-key", HeaderValue::from_static("short"));
        assert_eq!(agree(Kind::Exec, &asked), Err(Refusal::WebSocket));
    }
}
