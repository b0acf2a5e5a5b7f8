//! Response bodies of bounded size.

use reqwest::Response;
use serde::Deserialize;

use super::{RegistryError, cause};

/// Of an error response, more is not read.
const MAX_ERROR_BODY: u64 = 16 * 1024;
/// Of a registry's words, more is not repeated.
const MAX_WORDS: usize = 200;

/// The whole body, at most `limit` bytes.
pub(super) async fn read(
    mut response: Response,
    host: &str,
    what: &str,
    limit: u64,
) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    loop {
        let chunk = response.chunk().await.map_err(|e| RegistryError::Cut {
            host: host.to_owned(),
            what: what.to_owned(),
            bytes: bytes.len() as u64,
            reason: cause(&e),
        })?;
        let Some(chunk) = chunk else { return Ok(bytes) };
        if bytes.len() as u64 + chunk.len() as u64 > limit {
            return Err(RegistryError::TooLarge {
                host: host.to_owned(),
                what: what.to_owned(),
                limit,
            });
        }
        bytes.extend_from_slice(&chunk);
    }
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    errors: Vec<ErrorEntry>,
    #[serde(default)]
    details: String,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// `: ` and what the registry says about an error, or nothing.
pub(super) async fn error_words(response: Response) -> String {
    let Ok(bytes) = read(response, "", "", MAX_ERROR_BODY).await else {
        return String::new();
    };
    words(&bytes)
}

fn words(bytes: &[u8]) -> String {
    let Ok(body) = serde_json::from_slice::<ErrorBody>(bytes) else {
        return String::new();
    };
    let text = match body.errors.first() {
        Some(entry) if entry.message.is_empty() => entry.code.clone(),
        Some(entry) => entry.message.clone(),
        None => body.details,
    };
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_WORDS)
        .collect();
    match text.trim() {
        "" => String::new(),
        text => format!(": {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn a_registrys_words_are_repeated_but_not_trusted() {
        let json = br#"{"errors":[{"code":"DENIED","message":"access\nto it \u001b[2J denied"}]}"#;
        assert_eq!(words(json), ": access to it  [2J denied");
        assert_eq!(words(br#"{"errors":[{"code":"DENIED"}]}"#), ": DENIED");
        assert_eq!(words(b"<html>"), "");
        assert_eq!(words(b"{}"), "");
        let long = format!(r#"{{"details":"{}"}}"#, "x".repeat(5000));
        assert_eq!(words(long.as_bytes()).len(), 202);
    }
}
