//! What a stream of output proves by that it is its container's.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number that only the daemon, the monitor and the guest's agent know:
/// whoever else in the guest reaches the log port cannot write another
/// container's log. As text it is 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogToken(u128);

/// The text is no token.
#[derive(Debug, thiserror::Error)]
#[error("a log's token has {DIGITS} hexadecimal digits")]
pub struct NoToken;

const DIGITS: usize = 32;

impl LogToken {
    /// Of random bytes.
    #[must_use]
    pub fn new(random: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(random))
    }

    #[must_use]
    pub fn bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// Reads the text; fails for any other.
    pub fn parse(text: &str) -> Result<Self, NoToken> {
        if text.len() != DIGITS || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(NoToken);
        }
        u128::from_str_radix(text, 16)
            .map(Self)
            .map_err(|_| NoToken)
    }
}

impl fmt::Display for LogToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Not the number: requests find their way into logs.
impl fmt::Debug for LogToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogToken(..)")
    }
}

impl TryFrom<String> for LogToken {
    type Error = NoToken;

    fn try_from(text: String) -> Result<Self, NoToken> {
        Self::parse(&text)
    }
}

impl From<LogToken> for String {
    fn from(token: LogToken) -> Self {
        token.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_its_text_and_nothing_else_is() {
        let mut bytes = [0; 16];
        bytes[15] = 0xab;
        let token = LogToken::new(bytes);
        let text = format!("{}ab", "0".repeat(30));
        assert_eq!(token.to_string(), text);
        assert_eq!(LogToken::parse(&text).unwrap(), token);
        assert_eq!(token.bytes(), bytes);
        let signed = format!("+{}", "0".repeat(31));
        for bad in ["", "ab", &signed, &format!("{text}0"), &"g".repeat(32)] {
            assert!(LogToken::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(format!("{token:?}"), "LogToken(..)");
    }
}
