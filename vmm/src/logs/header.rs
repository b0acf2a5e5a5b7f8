//! The line by which a stream says whose it is.

use vmm_client::LogToken;

use super::framing::StreamKind;
use super::valid_container;

/// A whole line, with room.
pub(super) const MAX_HEADER: usize = 256;

/// `container stream token`; without the token where the log has none.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header<'a> {
    pub(super) container: &'a str,
    pub(super) kind: StreamKind,
    pub(super) token: Option<LogToken>,
}

/// Reads the line without its end.
pub(super) fn parse(line: &[u8]) -> Option<Header<'_>> {
    let mut words = line.split(|&b| b == b' ');
    let container = words.next().filter(|name| valid_container(name))?;
    let kind = StreamKind::parse(words.next()?)?;
    let token = match words.next() {
        Some(word) => Some(LogToken::parse(std::str::from_utf8(word).ok()?).ok()?),
        None => None,
    };
    if words.next().is_some() {
        return None;
    }
    Some(Header {
        container: std::str::from_utf8(container).ok()?,
        kind,
        token,
    })
}
