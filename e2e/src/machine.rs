//! What pods run on while the tests run, and how slow that is. The scenarios
//! are the same on every machine.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Result, bail};

/// The daemon's `machine` that tests configure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    Uml,
    Kvm,
}

impl Machine {
    /// What `E2E_MACHINE` names; `uml`, which runs everywhere, without it.
    pub fn under_test() -> Result<Self> {
        match std::env::var("E2E_MACHINE").as_deref() {
            Err(_) | Ok("uml") => Ok(Self::Uml),
            Ok("kvm") => Ok(Self::Kvm),
            Ok(other) => bail!("E2E_MACHINE is {other:?}, neither uml nor kvm"),
        }
    }

    /// As the configuration and the guest kernel's file spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Uml => "uml",
            Self::Kvm => "kvm",
        }
    }
}

/// How many times slower than a usual machine the tests' machine is:
/// `E2E_PATIENCE`, 1 without it.
///
/// # Panics
///
/// When it is no number from 1 to 100.
#[must_use]
pub fn slowness() -> u32 {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    *FACTOR.get_or_init(|| {
        let Ok(text) = std::env::var("E2E_PATIENCE") else {
            return 1;
        };
        match text.parse() {
            Ok(factor @ 1..=100) => factor,
            _ => panic!("E2E_PATIENCE is {text:?}, not a number from 1 to 100"),
        }
    })
}

/// `limit` of a usual machine, on the one that the tests run on.
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    limit * slowness()
}
