//! The files of a Debian package as a tar stream, without installing it.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

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

/// The file at `path`, which is relative, of the package file `deb`.
pub fn file(deb: &Path, path: &str) -> Result<Vec<u8>> {
    let contents = contents(deb)?;
    let mut archive = tar::Archive::new(contents.as_slice());
    for entry in archive.entries().context("package contents")? {
        let mut entry = entry.context("package entry")?;
        let name = entry.path().context("package entry's path")?;
        if name.strip_prefix("./").unwrap_or(&name) == Path::new(path) {
            let mut data = Vec::new();
            entry
                .read_to_end(&mut data)
                .with_context(|| path.to_owned())?;
            return Ok(data);
        }
    }
    bail!("{} has no {path}", deb.display())
}
