//! An initramfs whose init is a busybox script.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

const BUSYBOX: &str = "/bin/busybox";

/// Writes `dir/name`, with `programs` and what they link in place.
pub fn make(dir: &Path, name: &str, programs: &[&Path], script: &str) -> Result<PathBuf> {
    let tree = tempfile::tempdir()?;
    let root = tree.path();
    for dir in ["bin", "dev", "proc", "sys", "tmp"] {
        fs::create_dir(root.join(dir))?;
    }
    copy(Path::new(BUSYBOX), &root.join("bin/busybox"))?;
    for program in programs {
        let name = program.file_name().context("a program's name")?;
        copy(program, &root.join("bin").join(name))?;
        for library in libraries(program)? {
            let to = root.join(library.strip_prefix("/")?);
            fs::create_dir_all(to.parent().context("a library's directory")?)?;
            copy(&library, &to)?;
        }
    }
    let init = root.join("init");
    fs::write(
        &init,
        format!(
            "#!/bin/busybox sh\n\
             bb=/bin/busybox\n\
             $bb mount -t devtmpfs dev /dev\n\
             $bb mount -t proc proc /proc\n\
             $bb mount -t sysfs sys /sys\n\
             $bb --install -s /bin\n\
             export PATH=/bin\n\
             {script}\n\
             echo OVER\n\
             sleep 1000\n"
        ),
    )?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let path = dir.join(name);
    let packed = Command::new("sh")
        .arg("-c")
        .arg("find . | busybox cpio -o -H newc")
        .current_dir(root)
        .stdout(File::create(&path)?)
        .stderr(Stdio::null())
        .status()?;
    ensure!(packed.success(), "cannot pack an initramfs: {packed}");
    Ok(path)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| from.display().to_string())?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
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
