//! Which of an index's images is this node's.

use std::fmt;

use serde::Deserialize;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) architecture: String,
    pub(crate) variant: Option<String>,
}

impl Platform {
    /// Guests run Linux on the node's own architecture.
    pub(crate) fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: None,
        }
    }

    fn variant(&self) -> &str {
        self.variant.as_deref().unwrap_or_default()
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant() {
            "" => Ok(()),
            variant => write!(f, "/{variant}"),
        }
    }
}

/// How well an image for `offered` fits `host`: smaller is better, `None` not
/// at all. The baseline is preferred to variants for newer processors: it runs
/// in every guest, whatever CPU features its machine passes on.
pub(crate) fn preference(host: &Platform, offered: &Platform) -> Option<u32> {
    if offered.os != host.os || offered.architecture != host.architecture {
        return None;
    }
    match (offered.architecture.as_str(), offered.variant()) {
        (_, "") | ("amd64", "v1") | ("arm64", "v8") => Some(0),
        // x86-64-v2 is what every processor with virtualisation has.
        ("amd64", "v2") => Some(2),
        ("amd64", "v3") => Some(3),
        ("amd64", "v4") => Some(4),
        ("arm64", "v8.1" | "v8.2") => Some(1),
        ("arm64", "v9") => Some(9),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(os: &str, architecture: &str, variant: &str) -> Platform {
        Platform {
            os: os.into(),
            architecture: architecture.into(),
            variant: (!variant.is_empty()).then(|| variant.into()),
        }
    }

    #[test]
    fn the_baseline_comes_before_newer_variants() {
        let host = platform("linux", "amd64", "");
        let of = |variant| preference(&host, &platform("linux", "amd64", variant));
        assert_eq!(of(""), of("v1"));
        assert!(of("v1") < of("v2"));
        assert!(of("v2") < of("v3"));
        assert_eq!(of("v77"), None);
    }

    #[test]
    fn other_systems_do_not_fit() {
        let host = platform("linux", "amd64", "");
        for (os, architecture) in [
            ("windows", "amd64"),
            ("linux", "arm64"),
            ("unknown", "unknown"),
        ] {
            assert_eq!(preference(&host, &platform(os, architecture, "")), None);
        }
    }
}
