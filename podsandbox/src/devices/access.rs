//! What a container may do with a device.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The permissions of a device's control group rule: one at least of reading,
/// writing, and making device files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Access {
    pub read: bool,
    pub write: bool,
    pub make: bool,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not made of the letters r, w and m")]
pub struct AccessError(String);

impl Access {
    pub const ALL: Self = Self {
        read: true,
        write: true,
        make: true,
    };
}

impl FromStr for Access {
    type Err = AccessError;

    fn from_str(text: &str) -> Result<Self, AccessError> {
        let is_fine = !text.is_empty() && text.chars().all(|letter| "rwm".contains(letter));
        if !is_fine {
            return Err(AccessError(text.to_owned()));
        }
        Ok(Self {
            read: text.contains('r'),
            write: text.contains('w'),
            make: text.contains('m'),
        })
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters = [(self.read, "r"), (self.write, "w"), (self.make, "m")];
        letters
            .iter()
            .filter(|(has, _)| *has)
            .try_for_each(|(_, letter)| f.write_str(letter))
    }
}

impl TryFrom<String> for Access {
    type Error = AccessError;

    fn try_from(text: String) -> Result<Self, AccessError> {
        text.parse()
    }
}

impl From<Access> for String {
    fn from(access: Access) -> Self {
        access.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_letters_in_any_order() {
        for (text, shown) in [("mrw", "rwm"), ("r", "r"), ("wr", "rw"), ("mm", "m")] {
            assert_eq!(text.parse::<Access>().unwrap().to_string(), shown);
        }
        for bad in ["", "rx", "RW", " r"] {
            assert!(bad.parse::<Access>().is_err(), "{bad:?}");
        }
    }
}
