//! A guest's initramfs with programs of this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::shared::initramfs;

/// Writes `dir/name`, with `programs` and what they link in place.
pub fn make(dir: &Path, name: &str, programs: &[&Path], script: &str) -> Result<PathBuf> {
    let mut files = Vec::new();
    for &program in programs {
        let name = program.file_name().context("a program's name")?;
        files.push((Path::new("bin").join(name), program.to_owned()));
        for library in libraries(program)? {
            files.push((library.strip_prefix("/")?.to_owned(), library));
        }
    }
    let path = dir.join(name);
    initramfs::make(&path, &files, &format!("{script}\necho OVER\nsleep 1000"))?;
    Ok(path)
}

/// What the dynamic linker loads for a program; nothing for a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let words = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| word.starts_with('/')).map(PathBuf::from)
    });
    Ok(words.collect())
}
