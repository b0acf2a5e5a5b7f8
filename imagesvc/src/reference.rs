//! Image references, normalised as Docker and containerd do.
//!
//! `busybox` is `docker.io/library/busybox:latest`. The grammar is that of the
//! distribution project's `reference` package.

use std::{fmt, str::FromStr};

use crate::digest::Digest;

/// The registry of names that give none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// The repository prefix of single-word names in [`DEFAULT_REGISTRY`].
const OFFICIAL_REPOSITORY: &str = "library";
const DEFAULT_TAG: &str = "latest";

const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A valid, normalised reference. A tag beside a digest was dropped: the
/// digest says it all.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    selector: Selector,
}

/// Which manifest of the repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Selector {
    Tag(String),
    Digest(Digest),
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("invalid image reference {reference:?}: {reason}")]
pub struct InvalidReference {
    pub reference: String,
    pub reason: &'static str,
}

impl Reference {
    /// Host and optional port, as named: `docker.io`, not the host behind it.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    #[must_use]
    pub fn selector(&self) -> &Selector {
        &self.selector
    }

    /// Registry and repository without tag or digest.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match &self.selector {
            Selector::Tag(tag) => write!(f, ":{tag}"),
            Selector::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => fmt::Display::fmt(digest, f),
        }
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        parse(text).map_err(|reason| InvalidReference {
            reference: text.chars().take(MAX_NAME).collect(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if is_hex(text) && text.len() == 64 {
        return Err("64 hexadecimal digits are an image id, not a name");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            let digest = digest
                .parse::<Digest>()
                .map_err(|_| "what follows @ is not a sha256 or sha512 digest")?;
            (rest, Some(digest))
        }
        None => (text, None),
    };
    // A colon before the last slash belongs to a port.
    let last_slash = rest.rfind('/').map_or(0, |i| i + 1);
    let (name, tag) = match rest[last_slash..].find(':') {
        Some(colon) => {
            let colon = last_slash + colon;
            (&rest[..colon], Some(&rest[colon + 1..]))
        }
        None => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, repository) = split_registry(name);
    check_registry(&registry)?;
    check_repository(&repository)?;
    if registry.len() + 1 + repository.len() > MAX_NAME {
        return Err("the name is longer than 255 characters");
    }
    let selector = match (digest, tag) {
        (Some(digest), _) => Selector::Digest(digest),
        (None, Some(tag)) => Selector::Tag(tag.to_owned()),
        (None, None) => Selector::Tag(DEFAULT_TAG.to_owned()),
    };
    Ok(Reference {
        registry,
        repository,
        selector,
    })
}

/// The first component names a registry if it could not be a repository's:
/// with a dot, a port or an upper-case letter, or `localhost`.
fn split_registry(name: &str) -> (String, String) {
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_REGISTRY, name),
    };
    let registry = canonical_registry(registry);
    if registry == DEFAULT_REGISTRY && !repository.contains('/') {
        let repository = format!("{OFFICIAL_REPOSITORY}/{repository}");
        return (registry.to_owned(), repository);
    }
    (registry.to_owned(), repository.to_owned())
}

/// Other names by which Docker Hub goes, in references and in credentials.
pub(crate) fn canonical_registry(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY,
        other => other,
    }
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    const BAD: &str = "the registry is not a valid host name";
    let (host, port) = if let Some(rest) = registry.strip_prefix('[') {
        let (address, rest) = rest.split_once(']').ok_or(BAD)?;
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return Err(BAD);
        }
        match rest {
            "" => return Ok(()),
            port => (None, Some(port.strip_prefix(':').ok_or(BAD)?)),
        }
    } else {
        match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        }
    };
    if let Some(port) = port
        && port.parse::<u16>().is_err()
    {
        return Err("the registry's port is not a number up to 65535");
    }
    let Some(host) = host else { return Ok(()) };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if host.split('.').all(label) {
        Ok(())
    } else {
        Err(BAD)
    }
}

/// `[a-z0-9]+` joined by one `.`, one or two `_`, or any number of `-`.
fn check_repository(repository: &str) -> Result<(), &'static str> {
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository must be lower case");
    }
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    for component in repository.split('/') {
        let bytes = component.as_bytes();
        let ends_in_words =
            bytes.first().is_some_and(|&b| word(b)) && bytes.last().is_some_and(|&b| word(b));
        let separated = component
            .split(|c: char| c.is_ascii() && word(c as u8))
            .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.bytes().all(|b| b == b'-'));
        if !ends_in_words || !separated {
            return Err(
                "each part of the repository is made of a-z and 0-9, joined by '.', '_', '__' or '-'",
            );
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let valid = tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if valid {
        Ok(())
    } else {
        Err("the tag is 1 to 128 letters, digits, '_', '.' or '-', not starting with '.' or '-'")
    }
}

pub(crate) fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_names_are_completed_as_docker_does() {
        let hex = "0".repeat(64);
        let digest = format!("sha256:{hex}");
        for (given, normal) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("grafana/loki", "docker.io/grafana/loki:latest"),
            (
                "index.docker.io/busybox",
                "docker.io/library/busybox:latest",
            ),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b:x", "localhost:5000/a/b:x"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
            ("ghcr.io/a__b/c-_d", ""),
            ("ghcr.io/a__b/c--d.e_f", "ghcr.io/a__b/c--d.e_f:latest"),
            ("Upper/a", "Upper/a:latest"),
            (
                &format!("a@{digest}"),
                &format!("docker.io/library/a@{digest}"),
            ),
            (
                &format!("a:t@{digest}"),
                &format!("docker.io/library/a@{digest}"),
            ),
            (&format!("h:1/a:t@{digest}"), &format!("h:1/a@{digest}")),
        ] {
            match given.parse::<Reference>() {
                Ok(reference) => assert_eq!(reference.to_string(), normal),
                Err(e) => assert!(normal.is_empty(), "{e}"),
            }
        }
    }

    #[test]
    fn malformed_names_are_refused_with_the_reason() {
        let hex = "0".repeat(64);
        for bad in [
            "",
            ":tag",
            "a:",
            "a:b:c",
            "a b",
            "busyBox",
            "a/",
            "/a",
            "a//b",
            "a/../b",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a@sha256:12",
            "a@md5:00",
            "a:tag@",
            "http://a.io/b",
            "a.io:99999/b",
            "-a.io/b",
            "a.io:/b",
            "[::g]:5/b",
            "a:.x",
            "é",
            &hex,
            &"a".repeat(300),
            &format!("a:{}", "t".repeat(129)),
        ] {
            let error = bad.parse::<Reference>().unwrap_err();
            assert!(
                error.to_string().contains("invalid image reference"),
                "{bad}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic_and_what_parses_is_stable(text in ".{0,80}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let again: Reference = reference.to_string().parse().unwrap();
                prop_assert_eq!(reference, again);
            }
        }

        #[test]
        fn a_valid_name_round_trips(
            host in "[a-z]{1,8}\\.[a-z]{2,3}(:[1-9][0-9]{0,3})?",
            path in "[a-z0-9]{1,6}((\\.|_|__|-{1,3})[a-z0-9]{1,6}){0,2}(/[a-z0-9]{1,6}){1,2}",
            tag in "[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}",
        ) {
            let text = format!("{host}/{path}:{tag}");
            let reference: Reference = text.parse().unwrap();
            prop_assert_eq!(reference.to_string(), text);
        }
    }
}
