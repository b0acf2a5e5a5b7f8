//! drupe's programs as a node of its own has them: copies that can be replaced
//! while they run, as an upgrade does.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Node;
use crate::artifacts;

type Built = fn() -> Result<PathBuf>;

const PROGRAMS: &[(&str, Built)] = &[
    ("drupe", artifacts::daemon),
    ("drupe-vmm", artifacts::vmm),
    ("drupe-shim", artifacts::shim),
    ("drupe-unpacker", artifacts::unpacker),
];

impl Node {
    /// Where the node's configuration finds the program `name`.
    pub(super) fn program(&self, name: &str, built: Built) -> Result<PathBuf> {
        match &self.programs {
            Some(dir) => Ok(dir.join(name)),
            None => built(),
        }
    }

    /// Puts other files, of the same content, in the place of the programs, as
    /// a package manager does. What runs goes on with the old ones. Nothing for
    /// a node without programs of its own.
    pub fn install_programs(&self) -> Result<()> {
        let Some(dir) = &self.programs else {
            return Ok(());
        };
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        PROGRAMS.iter().try_for_each(|(name, built)| {
            let path = dir.join(name);
            replace(&path, &built()?).with_context(|| path.display().to_string())
        })
    }
}

/// A program that runs cannot be written, but its name can be another's.
fn replace(path: &Path, by: &Path) -> Result<()> {
    let new = path.with_extension("new");
    fs::copy(by, &new)?;
    fs::rename(&new, path)?;
    Ok(())
}
