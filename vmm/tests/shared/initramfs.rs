//! An initramfs whose init is a busybox script.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

const BUSYBOX: &str = "/bin/busybox";

/// What init does before the script.
const HEAD: &str = "#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb --install -s /bin
export PATH=/bin
";

/// Writes an initramfs to `to` that runs `script`. `programs` are copied into
/// it, each from its second path to its first one, which is relative.
pub fn make(to: &Path, programs: &[(PathBuf, PathBuf)], script: &str) -> Result<()> {
    let tree = tempfile::tempdir()?;
    let root = tree.path();
    for dir in ["bin", "dev", "proc", "sys", "mnt", "tmp"] {
        fs::create_dir(root.join(dir))?;
    }
    copy(Path::new(BUSYBOX), &root.join("bin/busybox"))?;
    for (place, program) in programs {
        copy(program, &root.join(place))?;
    }
    let init = root.join("init");
    fs::write(&init, format!("{HEAD}{script}\n"))?;
    fs::set_permissions(&init, Permissions::from_mode(0o755))?;
    let packed = Command::new("sh")
        .arg("-c")
        .arg("find . | busybox cpio -o -H newc")
        .current_dir(root)
        .stdout(File::create(to)?)
        .stderr(Stdio::null())
        .status()?;
    ensure!(packed.success(), "cannot pack an initramfs: {packed}");
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a program's directory")?)?;
    fs::copy(from, to).with_context(|| from.display().to_string())?;
    fs::set_permissions(to, Permissions::from_mode(0o755))?;
    Ok(())
}
