//! Content digests as the OCI image spec writes them (`sha256:<hex>`).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

/// A registered digest: `sha256:` and 64 or `sha512:` and 128 lower-case
/// hexadecimal digits. Safe as a path component once split by [`Digest::hex`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

#[derive(Clone, Debug, thiserror::Error)]
#[error("{0:?} is not a sha256 or sha512 digest")]
pub struct InvalidDigest(String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Sha256,
    Sha512,
}

impl Digest {
    /// The sha256 digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        hasher.finish()
    }

    /// The ChainID of the layers with these DiffIDs, lowest first (OCI image
    /// spec, "Layer ChainID"). None: there are none.
    pub(crate) fn chain<'a>(diff_ids: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let mut diff_ids = diff_ids.into_iter();
        let lowest = diff_ids.next()?.clone();
        Some(diff_ids.fold(lowest, |below, diff_id| {
            Self::of(format!("{below} {diff_id}").as_bytes())
        }))
    }

    pub(crate) fn from_sha256(bytes: &[u8; 32]) -> Self {
        written("sha256:", bytes)
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        if self.0.starts_with("sha256:") {
            Algorithm::Sha256
        } else {
            Algorithm::Sha512
        }
    }

    /// The digits without the algorithm.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// Whether `bytes` are what this digest names.
    #[must_use]
    pub fn matches(&self, bytes: &[u8]) -> bool {
        let mut hasher = Hasher::new(self.algorithm());
        hasher.update(bytes);
        hasher.finish() == *self
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let digits = match text.split_once(':') {
            Some(("sha256", hex)) if hex.len() == 64 => hex,
            Some(("sha512", hex)) if hex.len() == 128 => hex,
            _ => return Err(InvalidDigest(shorten(text))),
        };
        if !digits
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        {
            return Err(InvalidDigest(shorten(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

/// What a stranger sent ends in an error message: at most a line of it.
fn shorten(text: &str) -> String {
    text.chars().take(140).collect()
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Computes a [`Digest`] of a stream.
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Box<Sha512>),
}

impl Hasher {
    pub(crate) fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(Box::new(Sha512::new())),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            Self::Sha256(hasher) => written("sha256:", &hasher.finalize()),
            Self::Sha512(hasher) => written("sha512:", &hasher.finalize()),
        }
    }
}

fn written(prefix: &str, bytes: &[u8]) -> Digest {
    let mut text = String::from(prefix);
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
        }
    }
    Digest(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_of_one_layer_is_the_layer() {
        let layers: Vec<Digest> = (b"abc").iter().map(|b| Digest::of(&[*b])).collect();
        assert_eq!(Digest::chain(&layers[..0]), None);
        assert_eq!(Digest::chain(&layers[..1]), Some(layers[0].clone()));
        let two = Digest::of(format!("{} {}", layers[0], layers[1]).as_bytes());
        assert_eq!(Digest::chain(&layers[..2]), Some(two.clone()));
        let three = Digest::of(format!("{two} {}", layers[2]).as_bytes());
        assert_eq!(Digest::chain(&layers), Some(three));
    }

    #[test]
    fn digests_of_known_content() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").as_str(), empty);
        let digest: Digest = empty.parse().unwrap();
        assert!(digest.matches(b""));
        assert!(!digest.matches(b"x"));
        assert_eq!(digest.hex().len(), 64);

        let long = format!("sha512:{}", "0".repeat(128));
        let digest: Digest = long.parse().unwrap();
        assert_eq!(digest.hex(), "0".repeat(128));
        assert!(!digest.matches(b""));
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            "sha256:",
            "sha256:../../../../etc/passwd",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
