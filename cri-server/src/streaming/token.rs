//! Tokens: each stands for one request, is good for one use within a minute,
//! and cannot be guessed. The kubelet's own server keeps the same bounds.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::time::Instant;

use super::session::{AttachRequest, ExecRequest, PortForwardRequest};

const LIFETIME: Duration = Duration::from_secs(60);
/// Requests that wait for their client.
const MAX_OUTSTANDING: usize = 1000;

#[derive(Clone, Debug, PartialEq)]
pub enum Ticket {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

#[derive(Debug, thiserror::Error)]
#[error("{MAX_OUTSTANDING} streaming requests wait for their clients already")]
pub struct TooManyTokens;

#[derive(Default)]
pub struct Tokens {
    waiting: Mutex<HashMap<String, (Ticket, Instant)>>,
}

impl Tokens {
    pub fn insert(&self, ticket: Ticket) -> Result<String, TooManyTokens> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        waiting.retain(|_, (_, expires)| *expires > now);
        if waiting.len() >= MAX_OUTSTANDING {
            return Err(TooManyTokens);
        }
        // 128 bits of the thread's cryptographic generator: no collision, no
        // guess.
        let token = URL_SAFE_NO_PAD.encode(rand::random::<[u8; 16]>());
        waiting.insert(token.clone(), (ticket, now + LIFETIME));
        Ok(token)
    }

    /// The request of a token that was not used and is not too old.
    pub fn take(&self, token: &str) -> Option<Ticket> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (ticket, expires) = waiting.remove(token)?;
        (expires > Instant::now()).then_some(ticket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(pod_id: &str) -> Ticket {
        Ticket::PortForward(PortForwardRequest {
            pod_id: pod_id.to_owned(),
            ports: Vec::new(),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_once_and_for_a_minute() {
        let tokens = Tokens::default();
        let [a, b] = ["a", "b"].map(|id| tokens.insert(ticket(id)).unwrap());
        assert_ne!(a, b);
        assert!(
            a.len() >= 16
                && a.chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
        );
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(tokens.take(&a), Some(ticket("a")));
        assert_eq!(tokens.take(&a), None);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(tokens.take(&b), None);
        assert_eq!(tokens.take("no such token"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn outstanding_tokens_are_bounded_and_old_ones_make_room() {
        let tokens = Tokens::default();
        for _ in 0..MAX_OUTSTANDING {
            tokens.insert(ticket("x")).unwrap();
        }
        assert!(tokens.insert(ticket("x")).is_err());
        tokio::time::advance(LIFETIME).await;
        tokens.insert(ticket("x")).unwrap();
        assert_eq!(tokens.waiting.lock().unwrap().len(), 1);
    }
}
