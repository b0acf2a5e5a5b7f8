//! Names of CDI devices: `vendor/class=name`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Before the rest of an annotation's key whose value is a list of names.
pub const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";
/// Of one container.
const MAX_DEVICES: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// `vendor/class`
    pub kind: String,
    pub device: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("{text:?} is no CDI device name such as vendor.com/class=name: {why}")]
    Invalid { text: String, why: &'static str },
    #[error("the container has more than {MAX_DEVICES} CDI devices")]
    TooMany,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.kind, self.device)
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let invalid = |why| NameError::Invalid {
            text: text.to_owned(),
            why,
        };
        let (kind, device) = text.split_once('=').ok_or(invalid("it has no '='"))?;
        check_kind(kind).map_err(invalid)?;
        check_device(device).map_err(invalid)?;
        Ok(Self {
            kind: kind.to_owned(),
            device: device.to_owned(),
        })
    }
}

/// Vendor and class: each begins with a letter.
pub(super) fn check_kind(kind: &str) -> Result<(), &'static str> {
    let (vendor, class) = kind.split_once('/').ok_or("its kind has no '/'")?;
    let starts = |c: u8| c.is_ascii_alphabetic();
    for (part, why) in [
        (
            vendor,
            "its vendor is not of letters, digits, '-', '_' and '.'",
        ),
        (
            class,
            "its class is not of letters, digits, '-', '_' and '.'",
        ),
    ] {
        if !is_word(part, starts, b"-_.") {
            return Err(why);
        }
    }
    Ok(())
}

pub(super) fn check_device(device: &str) -> Result<(), &'static str> {
    if is_word(device, |c| c.is_ascii_alphanumeric(), b"-_.:") {
        Ok(())
    } else {
        Err("its name is not of letters, digits, '-', '_', '.' and ':'")
    }
}

fn is_word(text: &str, starts: impl Fn(u8) -> bool, between: &[u8]) -> bool {
    let bytes = text.as_bytes();
    let (Some(&first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    let inside = |c: &u8| c.is_ascii_alphanumeric() || between.contains(c);
    starts(first) && last.is_ascii_alphanumeric() && bytes.iter().all(inside)
}

/// The devices that a container asks for, by CRI's field and by annotations,
/// each once.
pub fn requested<'a>(
    field: impl IntoIterator<Item = &'a str>,
    annotations: &'a BTreeMap<String, String>,
) -> Result<Vec<Name>, NameError> {
    let annotated = annotations
        .iter()
        .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX))
        .flat_map(|(_, value)| value.split(','));
    let mut names: Vec<Name> = Vec::new();
    for text in field.into_iter().chain(annotated) {
        let name: Name = text.parse()?;
        if !names.contains(&name) {
            names.push(name);
        }
        if names.len() > MAX_DEVICES {
            return Err(NameError::TooMany);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_as_the_specification_has_them() {
        for good in [
            "vendor.com/class=name",
            "v/c=0",
            "nvidia.com/gpu=GPU-1:0.x_y",
            "a-b_c.d/e.f=all",
        ] {
            assert_eq!(good.parse::<Name>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "vendor.com/class",
            "class=name",
            "/class=name",
            "vendor/=name",
            "vendor/class=",
            "1vendor/class=x",
            "vendor/1class=x",
            "vendor./class=x",
            "vendor/class=-x",
            "vendor/class=x-",
            "vendor/class=x y",
            "vendor/cla:ss=x",
            "vendor/a/b=x",
            " vendor/class=x",
            "vendor/class=a=b",
            "vendör/class=x",
        ] {
            let error = bad.parse::<Name>().unwrap_err();
            assert!(error.to_string().contains("vendor.com/class=name"), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_name_is_what_it_is_written_as(
            vendor in "[A-Za-z]([A-Za-z0-9_.-]{0,8}[A-Za-z0-9])?",
            class in "[A-Za-z]([A-Za-z0-9_.-]{0,8}[A-Za-z0-9])?",
            device in "[A-Za-z0-9]([A-Za-z0-9_.:-]{0,8}[A-Za-z0-9])?",
        ) {
            let text = format!("{vendor}/{class}={device}");
            let name: Name = text.parse().unwrap();
            prop_assert_eq!(&name.kind, &format!("{vendor}/{class}"));
            prop_assert_eq!(&name.device, &device);
            prop_assert_eq!(name.to_string(), text);
        }

        #[test]
        fn any_text_is_a_name_that_it_prints_as_or_refused(text in "\\PC{0,40}|[a-c/=.:_-]{0,12}") {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }

    #[test]
    fn a_device_asked_for_twice_is_one() {
        let annotations = BTreeMap::from([
            ("cdi.k8s.io/plugin_1".to_owned(), "v/c=a,v/c=b".to_owned()),
            ("other".to_owned(), "no name".to_owned()),
        ]);
        let names = requested(["v/c=b"], &annotations).unwrap();
        let shown: Vec<String> = names.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["v/c=b", "v/c=a"]);
        let bad = BTreeMap::from([("cdi.k8s.io/x".to_owned(), "v/c=a, v/c=b".to_owned())]);
        assert!(requested([], &bad).is_err());
    }
}
