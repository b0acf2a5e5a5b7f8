//! Names of archive members.

use crate::erofs::MAX_NAME_LEN;

/// Longest path of a member: PATH_MAX.
const MAX_PATH_LEN: usize = 4096;

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("points outside the root")]
    OutsideRoot,
    #[error("has a component of {0} bytes, more than {MAX_NAME_LEN}")]
    ComponentTooLong(usize),
    #[error("is {0} bytes long, more than {MAX_PATH_LEN}")]
    TooLong(usize),
    #[error("is empty or has a NUL in it")]
    Malformed,
    #[error("has a whiteout for a directory")]
    BelowWhiteout,
}

/// A path below the root: its components, none of them empty, `.` or `..`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EntryPath<'a>(Vec<&'a [u8]>);

/// What a member's name means in a layer (OCI image spec, "Whiteouts").
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    /// The name itself.
    Name,
    /// Lower layers' `name` in the directory is hidden.
    Whiteout(&'a [u8]),
    /// All that lower layers have in the directory is hidden.
    Opaque,
    /// Bookkeeping of aufs, of no meaning here.
    Ignored,
}

impl<'a> EntryPath<'a> {
    pub(super) fn parse(path: &'a [u8]) -> Result<Self, PathError> {
        if path.is_empty() || path.contains(&0) {
            return Err(PathError::Malformed);
        }
        if path.len() > MAX_PATH_LEN {
            return Err(PathError::TooLong(path.len()));
        }
        let mut components = Vec::new();
        for component in path.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => return Err(PathError::OutsideRoot),
                _ if component.len() > MAX_NAME_LEN => {
                    return Err(PathError::ComponentTooLong(component.len()));
                }
                _ => components.push(component),
            }
        }
        Ok(Self(components))
    }

    /// Parent and name; None for the root.
    pub(super) fn split(&self) -> Option<(&[&'a [u8]], &'a [u8])> {
        let (name, parent) = self.0.split_last()?;
        Some((parent, name))
    }

    pub(super) fn meaning(&self) -> Result<Meaning<'a>, PathError> {
        let Some((parent, name)) = self.split() else {
            return Ok(Meaning::Name);
        };
        if parent.iter().any(|part| part.starts_with(WHITEOUT_META)) {
            return Ok(Meaning::Ignored);
        }
        if parent.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(PathError::BelowWhiteout);
        }
        if name == OPAQUE {
            return Ok(Meaning::Opaque);
        }
        if name.starts_with(WHITEOUT_META) {
            return Ok(Meaning::Ignored);
        }
        match name.strip_prefix(WHITEOUT) {
            None => Ok(Meaning::Name),
            Some(b"" | b".") => Err(PathError::Malformed),
            Some(b"..") => Err(PathError::OutsideRoot),
            Some(hidden) => Ok(Meaning::Whiteout(hidden)),
        }
    }
}

/// For messages: readable, on one line, not too long.
pub(super) fn show(path: &[u8]) -> String {
    const MAX_SHOWN: usize = 300;
    let shown = String::from_utf8_lossy(&path[..path.len().min(MAX_SHOWN)]);
    let dots = if path.len() > MAX_SHOWN { "..." } else { "" };
    format!("{}{dots}", shown.escape_debug())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn components(path: &str) -> Result<Vec<String>, PathError> {
        let path = EntryPath::parse(path.as_bytes())?;
        Ok(path
            .0
            .iter()
            .map(|part| String::from_utf8_lossy(part).into())
            .collect())
    }

    #[test]
    fn leading_slashes_and_dots_are_stripped() {
        assert_eq!(components("/a//./b/").unwrap(), ["a", "b"]);
        assert_eq!(components("././a").unwrap(), ["a"]);
        assert!(components("./").unwrap().is_empty());
        assert_eq!(components("...").unwrap(), ["..."]);
    }

    #[test]
    fn the_way_out_and_long_names_are_refused() {
        for path in ["..", "../a", "a/../b", "/..", "a/.."] {
            assert_eq!(components(path), Err(PathError::OutsideRoot));
        }
        assert!(components(&"a".repeat(255)).is_ok());
        let long = "a".repeat(256);
        assert_eq!(components(&long), Err(PathError::ComponentTooLong(256)));
        let deep = "a/".repeat(2049);
        assert_eq!(components(&deep), Err(PathError::TooLong(4098)));
        assert_eq!(components(""), Err(PathError::Malformed));
        assert_eq!(components("a\0"), Err(PathError::Malformed));
    }

    #[test]
    fn whiteouts() {
        let meaning = |path: &'static str| EntryPath::parse(path.as_bytes()).unwrap().meaning();
        assert_eq!(meaning("a/.wh.b"), Ok(Meaning::Whiteout(b"b")));
        assert_eq!(meaning("a/.wh..wh..opq"), Ok(Meaning::Opaque));
        assert_eq!(meaning(".wh..wh..opq"), Ok(Meaning::Opaque));
        assert_eq!(meaning(".wh..wh.plnk/1.2"), Ok(Meaning::Ignored));
        assert_eq!(meaning("a/.wh..wh.aufs"), Ok(Meaning::Ignored));
        assert_eq!(meaning("a/.whx"), Ok(Meaning::Name));
        assert_eq!(meaning("/"), Ok(Meaning::Name));
        assert_eq!(meaning("a/.wh."), Err(PathError::Malformed));
        assert_eq!(meaning("a/.wh..."), Err(PathError::OutsideRoot));
        assert_eq!(meaning(".wh.a/b"), Err(PathError::BelowWhiteout));
    }

    proptest! {
        #[test]
        fn no_component_leads_elsewhere(path in "[a./]{0,40}") {
            if let Ok(parsed) = EntryPath::parse(path.as_bytes()) {
                for part in &parsed.0 {
                    prop_assert!(!part.is_empty() && *part != b"." && *part != b"..");
                }
            }
        }
    }
}
