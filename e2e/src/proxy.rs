//! A proxy in front of a registry that misbehaves as told: asks for bearer
//! tokens, cuts a connection after some bytes, stops sending, counts requests.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::http;
use crate::netns::NetNs;

/// A request's head is at most this long.
const MAX_HEAD: usize = 64 * 1024;

/// What [`Rule::Bearer`] wants and gives.
const TOKEN: &str = "e2e-token";

/// What happens to requests whose path contains `path`.
#[derive(Clone, Debug)]
pub struct Rule {
    pub path: String,
    pub action: Action,
    /// How many requests it applies to before it is spent.
    pub times: usize,
}

#[derive(Clone, Debug)]
pub enum Action {
    /// Send so many bytes of the answer's body, then close.
    CutAfter(usize),
    /// Send so many bytes of the answer's body, then nothing more.
    StallAfter(usize),
    /// Answer with this status instead.
    Fail(u16),
}

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Value of the Range header.
    pub range: Option<String>,
    pub authorization: Option<String>,
}

pub struct Proxy {
    pub address: String,
    shared: Arc<Shared>,
}

struct Shared {
    address: String,
    upstream: String,
    /// Basic credentials, base64, that the token endpoint wants.
    bearer_credentials: Option<String>,
    rules: Mutex<Vec<Rule>>,
    requests: Mutex<Vec<Request>>,
    stopped: AtomicBool,
}

impl Proxy {
    /// Listens at `address` in `netns` and forwards to `upstream`, both
    /// host:port. With `bearer_credentials`, requests need a token that the
    /// proxy's own `/token` gives to who shows them.
    pub fn start(
        netns: &Arc<NetNs>,
        address: &str,
        upstream: &str,
        bearer_credentials: Option<&str>,
    ) -> Result<Self> {
        let listener =
            netns.run(|| TcpListener::bind(address).with_context(|| address.to_owned()))?;
        let shared = Arc::new(Shared {
            address: address.to_owned(),
            upstream: upstream.to_owned(),
            bearer_credentials: bearer_credentials.map(str::to_owned),
            rules: Mutex::default(),
            requests: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let (accepting, netns) = (shared.clone(), netns.clone());
        thread::spawn(move || {
            // Ends when the listener fails, which is never while tests run.
            netns.run(|| {
                for client in listener.incoming() {
                    let client = client.context("accept")?;
                    if accepting.stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    let shared = accepting.clone();
                    thread::spawn(move || {
                        // A client that goes away is the client's business.
                        let _ = shared.serve(client);
                    });
                }
                Ok(())
            })
        });
        Ok(Self {
            address: address.to_owned(),
            shared,
        })
    }

    pub fn add_rule(&self, path: &str, action: Action, times: usize) {
        lock(&self.shared.rules).push(Rule {
            path: path.to_owned(),
            action,
            times,
        });
    }

    /// Requests since the start.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The accepting thread and its socket stay until the next connection;
        // the namespace they are in is the node's and goes with it.
        self.shared.stopped.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn serve(&self, mut client: TcpStream) -> Result<()> {
        let head = read_head(&mut client)?;
        let text = String::from_utf8_lossy(&head).into_owned();
        let mut words = text.split(' ');
        let request = Request {
            method: words.next().unwrap_or_default().to_owned(),
            path: words.next().unwrap_or_default().to_owned(),
            range: header(&text, "range"),
            authorization: header(&text, "authorization"),
        };
        lock(&self.requests).push(request.clone());

        if let Some(credentials) = &self.bearer_credentials {
            if request.path.starts_with("/token") {
                let given = request.authorization == Some(format!("Basic {credentials}"));
                return if given {
                    answer(
                        &mut client,
                        200,
                        "",
                        &format!(r#"{{"token":"{TOKEN}","expires_in":300}}"#),
                    )
                } else {
                    answer(
                        &mut client,
                        401,
                        "",
                        r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#,
                    )
                };
            }
            if request.authorization != Some(format!("Bearer {TOKEN}")) {
                let challenge = format!(
                    "WWW-Authenticate: Bearer realm=\"http://{}/token\",service=\"e2e\",scope=\"repository:any:pull\"\r\n",
                    self.address
                );
                return answer(
                    &mut client,
                    401,
                    &challenge,
                    r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#,
                );
            }
        }

        match self.action_for(&request.path) {
            Some(Action::Fail(status)) => answer(&mut client, status, "", "{}"),
            Some(Action::CutAfter(limit)) => {
                self.forward(&text, &mut client, Some(limit))?;
                Ok(client.shutdown(Shutdown::Both)?)
            }
            Some(Action::StallAfter(limit)) => {
                self.forward(&text, &mut client, Some(limit))?;
                // Holds the connection until the client gives up.
                client
                    .read_to_end(&mut Vec::new())
                    .map(drop)
                    .context("stalled client")
            }
            None => self.forward(&text, &mut client, None),
        }
    }

    fn action_for(&self, path: &str) -> Option<Action> {
        let mut rules = lock(&self.rules);
        let rule = rules
            .iter_mut()
            .find(|rule| rule.times > 0 && path.contains(&rule.path))?;
        rule.times -= 1;
        Some(rule.action.clone())
    }

    /// Sends the request on, without its credentials, and the answer back up
    /// to `limit` bytes of its body.
    fn forward(&self, head: &str, client: &mut TcpStream, limit: Option<usize>) -> Result<()> {
        let mut upstream = TcpStream::connect(&self.upstream).context("upstream")?;
        let mut lines = head.trim_end().split("\r\n");
        let mut forwarded = format!("{}\r\n", lines.next().unwrap_or_default());
        for line in lines {
            let name = line.split(':').next().unwrap_or_default();
            if !["authorization", "connection"]
                .iter()
                .any(|n| name.eq_ignore_ascii_case(n))
            {
                forwarded.push_str(&format!("{line}\r\n"));
            }
        }
        forwarded.push_str("Connection: close\r\n\r\n");
        upstream.write_all(forwarded.as_bytes())?;
        client.write_all(&read_head(&mut upstream)?)?;
        match limit {
            None => std::io::copy(&mut upstream, client),
            Some(limit) => std::io::copy(&mut upstream.take(limit as u64), client),
        }
        .context("forward the body")?;
        client.flush().context("forward the body")
    }
}

/// Reads up to and with the empty line, byte by byte: what follows is not ours.
fn read_head(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while http::find(&head[head.len().saturating_sub(4)..], b"\r\n\r\n").is_none() {
        if stream.read(&mut byte)? == 0 || head.len() >= MAX_HEAD {
            bail!("no whole head after {} bytes", head.len());
        }
        head.push(byte[0]);
    }
    Ok(head)
}

fn header(head: &str, name: &str) -> Option<String> {
    let mut fields = head.split("\r\n").filter_map(|line| line.split_once(':'));
    fields
        .find(|(n, _)| n.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim().to_owned())
}

fn answer(client: &mut TcpStream, status: u16, headers: &str, body: &str) -> Result<()> {
    let head = format!(
        "HTTP/1.1 {status} e2e\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n",
        body.len()
    );
    client.write_all(head.as_bytes())?;
    client.write_all(body.as_bytes()).context("answer")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
