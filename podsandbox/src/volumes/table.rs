//! The daemon's table of mounts, /proc/self/mountinfo.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::failed;
use crate::Result;

/// Mount points, those mounted last at the end.
pub(super) struct Table(Vec<PathBuf>);

impl Table {
    pub(super) fn read() -> Result<Self> {
        let path = Path::new("/proc/self/mountinfo");
        let text = fs::read(path).map_err(|source| failed(path, source))?;
        // proc_pid_mountinfo(5): the mount point is the fifth field.
        let points = text
            .split(|&b| b == b'\n')
            .filter_map(|line| line.split(|&b| b == b' ').nth(4));
        Ok(Self(points.map(unescape).collect()))
    }

    /// At and below `dir`.
    pub(super) fn at_and_below<'a>(&'a self, dir: &'a Path) -> impl Iterator<Item = &'a PathBuf> {
        self.0.iter().filter(move |path| path.starts_with(dir))
    }

    /// Of those at and below `dir` the ones that are on no other of them.
    pub(super) fn tops<'a>(&'a self, dir: &'a Path) -> Vec<&'a PathBuf> {
        let mut tops: Vec<&PathBuf> = Vec::new();
        let mut all: Vec<&PathBuf> = self.at_and_below(dir).collect();
        all.sort();
        for path in all {
            if !tops.iter().any(|top| path.starts_with(top)) {
                tops.push(path);
            }
        }
        tops
    }

    pub(super) fn has_below(&self, dir: &Path) -> bool {
        self.at_and_below(dir).any(|path| path != dir)
    }
}

/// Blanks and backslashes stand there as `\` and three octal digits.
pub(crate) fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| byte == b'\\');
        let code = octal.and_then(|o| u8::from_str_radix(std::str::from_utf8(o).ok()?, 8).ok());
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescape(br"/a\040b\134c"), Path::new(r"/a b\c"));
    }

    #[test]
    fn what_is_below_is_told_from_what_is_beside() {
        let table = Table(["/a", "/a/b", "/ab"].map(PathBuf::from).into());
        assert_eq!(table.at_and_below(Path::new("/a")).count(), 2);
        assert!(table.has_below(Path::new("/a")) && !table.has_below(Path::new("/a/b")));
        let table = Table(["/a/b/c", "/a/b", "/a/b", "/a/d"].map(PathBuf::from).into());
        assert_eq!(
            table.tops(Path::new("/a")),
            [Path::new("/a/b"), Path::new("/a/d")]
        );
    }
}
