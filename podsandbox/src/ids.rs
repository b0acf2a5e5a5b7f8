//! Ids of pods and containers: 64 hexadecimal digits, as the field's tools
//! expect, of which any unambiguous prefix finds the object.

use crate::{Error, Result};

#[must_use]
pub fn new_id() -> String {
    let bytes: [u8; 32] = rand::random();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Finds the one id that is `wanted` or begins with it.
pub fn resolve<'a>(
    kind: &'static str,
    wanted: &str,
    ids: impl Iterator<Item = &'a str>,
) -> Result<Option<&'a str>> {
    if wanted.is_empty() {
        return Err(Error::Invalid {
            field: format!("{kind} id"),
            why: "is empty".to_owned(),
        });
    }
    let candidates: Vec<&str> = ids.filter(|id| id.starts_with(wanted)).collect();
    if let Some(exact) = candidates.iter().find(|id| **id == wanted) {
        return Ok(Some(exact));
    }
    match candidates.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        _ => Err(Error::Ambiguous {
            kind,
            id: wanted.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_finds_its_object_unless_two_share_it() {
        let ids = ["abc1", "abd2", "ab"];
        let find = |wanted| resolve("container", wanted, ids.iter().copied());
        assert_eq!(find("abc").unwrap(), Some("abc1"));
        assert_eq!(find("ab").unwrap(), Some("ab"), "an exact id wins");
        assert_eq!(find("x").unwrap(), None);
        assert!(matches!(find("a"), Err(Error::Ambiguous { .. })));
        assert!(matches!(find(""), Err(Error::Invalid { .. })));
    }

    #[test]
    fn ids_have_64_digits() {
        let id = new_id();
        assert_eq!(id.len(), 64);
        assert!(id.bytes().all(|b| b.is_ascii_hexdigit()));
    }
}
