//! The files of a Debian package as a tar stream, without installing it.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The whole file system tree of the package file `deb`, as tar.
pub fn contents(deb: &Path) -> Result<Vec<u8>> {
    let mut child = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb")?;
    let mut tar = Vec::new();
    let mut stdout = child.stdout.take().context("dpkg-deb's output")?;
    stdout
        .read_to_end(&mut tar)
        .context("read dpkg-deb's output")?;
    let status = child.wait().context("dpkg-deb")?;
    ensure!(status.success(), "dpkg-deb {}: {status}", deb.display());
    Ok(tar)
}
