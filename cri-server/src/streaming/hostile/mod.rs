//! Clients that break every rule, for tests and fuzzers.
//!
//! A *script*, any bytes, is read as what a client sends: frames that are in
//! order, frames that are not, and bytes that are none at all. Whatever it
//! says, the server takes it or cuts it off, in the time it gives any client,
//! and nothing of the session is left. Time is tokio's and stands still while
//! there is work, so that waiting costs none.
//!
//! `cargo test` plays scripts of a fixed random generator and the files below
//! `fuzz/corpus`, `make fuzz` looks for new ones.

mod pods;
mod script;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

pub use pods::Pods;

use super::server::{Served, converse};
use super::token::Tokens;
use script::Script;

/// A client that does nothing is cut off after this time.
const IDLE: Duration = Duration::from_secs(60);
/// Far more than all the time that the server gives a client.
const LONGEST: Duration = Duration::from_secs(600);

/// What the server did with a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The client was granted what it asked for.
    pub upgraded: bool,
    /// It was cut off before it had said all.
    pub cut_off: bool,
}

/// A request, and anything after it.
pub fn request(bytes: &[u8]) -> Result<Outcome, String> {
    play(bytes, |script, tokens| script.request(tokens))
}

/// SPDY frames after a request that is in order.
pub fn spdy(bytes: &[u8]) -> Result<Outcome, String> {
    play(bytes, |script, tokens| script.spdy(tokens))
}

/// WebSocket messages, of channels or with SPDY frames in them, after a request
/// that is in order.
pub fn websocket(bytes: &[u8]) -> Result<Outcome, String> {
    play(bytes, |script, tokens| script.websocket(tokens))
}

/// Plays what `read` makes of the script. An error is a fault of the server's.
fn play(
    bytes: &[u8],
    read: impl FnOnce(Script<'_>, &Tokens) -> Vec<Vec<u8>>,
) -> Result<Outcome, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let pods = Pods::default();
        let mut live = pods.live.subscribe();
        let served = Arc::new(Served {
            tokens: Arc::default(),
            backend: Arc::new(pods),
            idle: IDLE,
        });
        let pieces = read(Script::new(bytes), &served.tokens);
        let (client, server) = duplex(64 << 10);
        let serving = tokio::spawn(converse(server, served));
        let (mut from, mut to) = tokio::io::split(client);
        let (tell, answered) = oneshot::channel();
        let answers = tokio::spawn(async move {
            let mut tell = Some(tell);
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = from.read(&mut buffer).await {
                if let Some(tell) = tell.take() {
                    // Nobody waits for it if the request was all.
                    let _heard = tell.send(buffer[..len].starts_with(b"HTTP/1.1 101 "));
                }
            }
        });
        let mut answered = Some(answered);
        let mut upgraded = false;
        let mut cut_off = false;
        for piece in pieces {
            let sent = timeout(LONGEST, to.write_all(&piece)).await;
            cut_off = sent
                .map_err(|_| "the server neither reads nor hangs up")?
                .is_err();
            if cut_off {
                break;
            }
            // Passes when the server has done all it can with the piece.
            sleep(IDLE / 1000).await;
            // As clients do: what comes at once counts as part of the request.
            if let Some(answered) = answered.take() {
                upgraded = answered.await.unwrap_or(false);
            }
        }
        // One that was cut off has nothing to hang up.
        let _hung_up = to.shutdown().await;
        timeout(LONGEST, serving)
            .await
            .map_err(|_| "the connection does not end")?
            .map_err(|error| error.to_string())?;
        timeout(LONGEST, answers)
            .await
            .map_err(|_| "the server keeps the connection")?
            .map_err(|error| error.to_string())?;
        timeout(LONGEST, live.wait_for(|live| *live == 0))
            .await
            .map_err(|_| "a session outlives its client")?
            .map_err(|error| error.to_string())?;
        Ok(Outcome { upgraded, cut_off })
    })
}
