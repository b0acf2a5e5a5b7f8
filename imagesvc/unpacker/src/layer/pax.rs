//! PAX extended headers: records `LENGTH KEY=VALUE\n` (POSIX pax, "extended
//! header"). Values may hold any byte, newlines too.

use super::header::decimal;
use crate::erofs::Timestamp;

const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PaxError {
    #[error("a record does not have the length it gives")]
    Record,
    #[error("{0} is not a number")]
    Number(&'static str),
    #[error("{0} has a NUL in it")]
    Nul(&'static str),
}

/// What the records of one header say. Later records replace earlier ones;
/// an empty value takes the key back.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) linkpath: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// The GNU.sparse.* records (GNU tar manual, "Storing Sparse Files").
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PaxSparse {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Offsets and lengths in turn: `GNU.sparse.map` of version 0.1, or the
    /// offset and numbytes records of 0.0.
    pub(super) map: Option<Vec<u64>>,
}

impl Pax {
    pub(super) fn parse(mut records: &[u8]) -> Result<Self, PaxError> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let (key, value, rest) = split_record(records).ok_or(PaxError::Record)?;
            pax.set(key, value)?;
            records = rest;
        }
        // Last of each name, in the order of names.
        pax.xattrs.reverse();
        pax.xattrs.sort_by(|a, b| a.0.cmp(&b.0));
        pax.xattrs.dedup_by(|later, kept| later.0 == kept.0);
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
        match key {
            b"path" => self.path = text("path", value)?,
            b"linkpath" => self.linkpath = text("linkpath", value)?,
            b"size" => self.size = whole("size", value)?,
            b"uid" => self.uid = whole("uid", value)?,
            b"gid" => self.gid = whole("gid", value)?,
            b"mtime" => self.mtime = time(value)?,
            b"GNU.sparse.major" => self.sparse.major = whole("GNU.sparse.major", value)?,
            b"GNU.sparse.minor" => self.sparse.minor = whole("GNU.sparse.minor", value)?,
            b"GNU.sparse.name" => self.sparse.name = text("GNU.sparse.name", value)?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.real_size = whole("GNU.sparse.realsize", value)?;
            }
            b"GNU.sparse.map" => {
                let numbers = value.split(|byte| *byte == b',').map(decimal);
                let map: Option<Vec<u64>> = numbers.collect();
                self.sparse.map = Some(match (map, value.is_empty()) {
                    (Some(map), _) => map,
                    (None, true) => Vec::new(),
                    (None, false) => return Err(PaxError::Number("GNU.sparse.map")),
                });
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let number = decimal(value).ok_or(PaxError::Number("GNU.sparse.offset"))?;
                let map = self.sparse.map.get_or_insert_default();
                // They come in pairs, offset first.
                if map.len().is_multiple_of(2) != key.ends_with(b"offset") {
                    return Err(PaxError::Record);
                }
                map.push(number);
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

/// Key, value and what follows.
fn split_record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().take(20).position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&records[..space])?).ok()?;
    if len > records.len() {
        return None;
    }
    let body = records.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then_some((&body[..equals], &body[equals + 1..], &records[len..]))
}

fn text(key: &'static str, value: &[u8]) -> Result<Option<Vec<u8>>, PaxError> {
    match value {
        [] => Ok(None),
        _ if value.contains(&0) => Err(PaxError::Nul(key)),
        _ => Ok(Some(value.to_vec())),
    }
}

fn whole(key: &'static str, value: &[u8]) -> Result<Option<u64>, PaxError> {
    match value {
        [] => Ok(None),
        _ => decimal(value).map(Some).ok_or(PaxError::Number(key)),
    }
}

/// Seconds with an optional fraction, which is cut to nanoseconds.
fn time(value: &[u8]) -> Result<Option<Timestamp>, PaxError> {
    if value.is_empty() {
        return Ok(None);
    }
    parse_time(value).map(Some).ok_or(PaxError::Number("mtime"))
}

fn parse_time(value: &[u8]) -> Option<Timestamp> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let (whole, fraction) = match digits.iter().position(|byte| *byte == b'.') {
        Some(point) => (&digits[..point], &digits[point + 1..]),
        None => (digits, &[][..]),
    };
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let nanos = fraction
        .iter()
        .enumerate()
        .try_fold(0u32, |nanos, (place, digit)| {
            let scale = 10u32.checked_pow(8u32.checked_sub(place as u32).unwrap_or(u32::MAX));
            match digit {
                b'0'..=b'9' => Some(nanos + u32::from(digit - b'0') * scale.unwrap_or(0)),
                _ => None,
            }
        })?;
    Some(match (negative, nanos) {
        (false, _) => Timestamp { seconds, nanos },
        (true, 0) => Timestamp {
            seconds: -seconds,
            nanos,
        },
        (true, _) => Timestamp {
            seconds: -seconds - 1,
            nanos: 1_000_000_000 - nanos,
        },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut len = body + 1;
        while len.to_string().len() + body != len {
            len += 1;
        }
        let mut record = format!("{len} ").into_bytes();
        record.extend(key);
        record.push(b'=');
        record.extend(value);
        record.push(b'\n');
        record
    }

    #[test]
    fn values_hold_newlines_and_the_last_record_counts() {
        let mut records = record(b"path", b"a\nb=c");
        records.extend(record(b"SCHILY.xattr.user.x", b"\n\0="));
        records.extend(record(b"SCHILY.xattr.user.a", b"1"));
        records.extend(record(b"SCHILY.xattr.user.x", b"2\n"));
        records.extend(record(b"uid", b"7"));
        records.extend(record(b"uid", b""));
        records.extend(record(b"comment", b"whatever"));
        let pax = Pax::parse(&records).unwrap();
        assert_eq!(pax.path.unwrap(), b"a\nb=c");
        assert_eq!(pax.uid, None);
        assert_eq!(
            pax.xattrs,
            [
                (b"user.a".to_vec(), b"1".to_vec()),
                (b"user.x".to_vec(), b"2\n".to_vec())
            ]
        );
    }

    #[test]
    fn wrong_lengths_are_refused() {
        for records in [
            &b"5 a=b\n"[..],
            b"7 a=b\n",
            b"0 a=b\n",
            b"6 a=b",
            b"5 =b\n",
            b"x",
            b"99999999999999999999 a=b\n",
            b"2 ",
            b"1 ",
        ] {
            assert_eq!(Pax::parse(records), Err(PaxError::Record), "{records:?}");
        }
    }

    #[test]
    fn times() {
        let time = |seconds, nanos| Some(Timestamp { seconds, nanos });
        assert_eq!(parse_time(b"12"), time(12, 0));
        assert_eq!(parse_time(b"12.5"), time(12, 500_000_000));
        assert_eq!(parse_time(b"12.0123456789"), time(12, 12_345_678));
        assert_eq!(parse_time(b"-1.25"), time(-2, 750_000_000));
        assert_eq!(parse_time(b"-1"), time(-1, 0));
        assert_eq!(parse_time(b"."), None);
        assert_eq!(parse_time(b"1.x"), None);
        assert_eq!(parse_time(b"--1"), None);
    }

    proptest! {
        #[test]
        fn anything_parses_or_fails_quietly(records in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pax::parse(&records);
        }

        #[test]
        fn what_is_written_is_read(value in proptest::collection::vec(any::<u8>(), 1..200)) {
            let pax = Pax::parse(&record(b"SCHILY.xattr.user.v", &value)).unwrap();
            prop_assert_eq!(&pax.xattrs[0].1, &value);
        }
    }
}
