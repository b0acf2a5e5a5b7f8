//! The transfer of one blob, from any byte on, over as many connections as it
//! takes.

use bytes::Bytes;
use reqwest::{
    Method, StatusCode,
    header::{CONTENT_RANGE, HeaderMap},
};
use tokio::sync::mpsc;

use super::{
    RegistryError, cause,
    host::{Ask, Host, TRIES, backoff},
};
use crate::digest::Digest;

/// How the delivery of a blob ended without an error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    Whole,
    /// The receiver has gone and knows why.
    Refused,
}

impl Host {
    /// Sends the blob's bytes from `offset`, which moves along, to `sink`.
    /// After a cut it goes on where it was.
    pub(super) async fn deliver(
        &self,
        digest: &Digest,
        size: u64,
        offset: &mut u64,
        sink: &mpsc::Sender<Bytes>,
    ) -> Result<Delivery, RegistryError> {
        let mut tries = 1;
        loop {
            match self.deliver_once(digest, size, offset, sink).await {
                Err(error @ RegistryError::Cut { .. }) if tries < TRIES => {
                    tracing::debug!(%error, "going on after a cut");
                    tokio::time::sleep(backoff(tries)).await;
                    tries += 1;
                }
                other => return other,
            }
        }
    }

    async fn deliver_once(
        &self,
        digest: &Digest,
        size: u64,
        offset: &mut u64,
        sink: &mpsc::Sender<Bytes>,
    ) -> Result<Delivery, RegistryError> {
        if *offset == size {
            return Ok(Delivery::Whole);
        }
        let what = format!("blob {digest}");
        let ask = Ask {
            method: Method::GET,
            path: &format!("blobs/{digest}"),
            what: &what,
            accept: None,
            offset: *offset,
        };
        let mut response = self.send(&ask).await?;
        let corrupt = |reason: String| RegistryError::Corrupt {
            host: self.host(),
            what: what.clone(),
            reason,
        };
        let mut position = match response.status() {
            StatusCode::PARTIAL_CONTENT => content_range_start(response.headers())
                .ok_or_else(|| corrupt("a part without a readable Content-Range".into()))?,
            // The registry knows no ranges: what is there already is skipped.
            _ => 0,
        };
        if position > *offset {
            return Err(corrupt(format!(
                "it starts at byte {position}, not {offset}"
            )));
        }
        while *offset < size {
            let chunk = tokio::time::timeout(self.no_progress, response.chunk())
                .await
                .map_err(|_| RegistryError::NoProgress {
                    host: self.host(),
                    what: what.clone(),
                    bytes: *offset,
                    seconds: self.no_progress.as_secs(),
                })?;
            let cut = |reason| RegistryError::Cut {
                host: self.host(),
                what: what.clone(),
                bytes: *offset,
                reason,
            };
            let Some(mut chunk) = chunk.map_err(|e| cut(cause(&e)))? else {
                return Err(cut("the answer ended early".into()));
            };
            let known = (*offset - position).min(chunk.len() as u64);
            position += chunk.len() as u64;
            // At most the chunk's length, which is a usize.
            let chunk = chunk.split_off(usize::try_from(known).unwrap_or(usize::MAX));
            if chunk.is_empty() {
                continue;
            }
            if position > size {
                return Err(corrupt(format!(
                    "it is longer than the {size} bytes announced"
                )));
            }
            *offset += chunk.len() as u64;
            if sink.send(chunk).await.is_err() {
                return Ok(Delivery::Refused);
            }
        }
        Ok(Delivery::Whole)
    }
}

/// `bytes 10-99/100` is 10.
fn content_range_start(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (start, _) = value.strip_prefix("bytes ")?.split_once('-')?;
    start.trim().parse().ok()
}
