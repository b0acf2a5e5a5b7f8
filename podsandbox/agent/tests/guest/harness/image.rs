//! Images of the tests, made of directory trees.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use agent_api::Layer;
use tempfile::TempDir;

/// An image: EROFS layers and where each begins on the disk they make up.
pub struct Image {
    pub files: Vec<File>,
    pub layers: Vec<Layer>,
    _dir: TempDir,
}

impl Image {
    /// One layer for each directory tree, lowest first.
    pub fn from_trees(trees: &[&Path]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut image = Self {
            files: Vec::new(),
            layers: Vec::new(),
            _dir: dir,
        };
        let mut offset = 0;
        for (number, tree) in trees.iter().enumerate() {
            let path = image._dir.path().join(number.to_string());
            let status = Command::new("mkfs.erofs")
                .args(["--quiet", "-T0", "-x1"])
                .arg(&path)
                .arg(tree)
                .output()
                .unwrap();
            assert!(
                status.status.success(),
                "{}",
                String::from_utf8_lossy(&status.stderr)
            );
            let file = File::open(&path).unwrap();
            let length = file.metadata().unwrap().len().next_multiple_of(4096);
            image.files.push(file);
            image.layers.push(Layer { offset, length });
            offset += length;
        }
        image
    }

    /// One layer with a busybox and an /etc.
    pub fn busybox() -> Self {
        let tree = busybox_tree();
        Self::from_trees(&[tree.path()])
    }
}

pub fn busybox_tree() -> TempDir {
    let tree = tempfile::tempdir().unwrap();
    let at = |name: &str| tree.path().join(name);
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for dir in ["bin", "etc", "tmp", "proc"] {
        fs::create_dir(at(dir)).unwrap();
    }
    fs::copy("/bin/busybox", at("bin/busybox")).unwrap();
    let list = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for name in String::from_utf8(list.stdout).unwrap().lines() {
        if name != "busybox" {
            std::os::unix::fs::symlink("busybox", at("bin").join(name)).unwrap();
        }
    }
    fs::write(
        at("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n",
    )
    .unwrap();
    fs::write(at("etc/group"), "root:x:0:\nwww:x:34:\nlog:x:44:web\n").unwrap();
    fs::write(at("bin/notaprogram"), "hello").unwrap();
    fs::write(at("bin/lostscript"), "#!/bin/nothing\n").unwrap();
    fs::set_permissions(at("bin/lostscript"), fs::Permissions::from_mode(0o755)).unwrap();
    tree
}
