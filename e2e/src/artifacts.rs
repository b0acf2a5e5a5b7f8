//! Where `make setup` and `make build` leave what the tests run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::Machine;

/// A file below `out/`, or the reason why it is not there.
fn artifact(relative: &str, made_by: &str) -> Result<PathBuf> {
    let path = out_dir()?.join(relative);
    ensure!(
        path.exists(),
        "{} is missing: run `make {made_by}`",
        path.display()
    );
    Ok(path)
}

/// `out/` of the checkout; `DRUPE_OUT` names another.
pub fn out_dir() -> Result<PathBuf> {
    let dir = match std::env::var_os("DRUPE_OUT") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../out"),
    };
    dir.canonicalize()
        .with_context(|| format!("{} is missing: run `make setup build`", dir.display()))
}

pub fn daemon() -> Result<PathBuf> {
    artifact("bin/drupe", "build")
}

pub fn vmm() -> Result<PathBuf> {
    artifact("bin/drupe-vmm", "build")
}

pub fn shim() -> Result<PathBuf> {
    artifact("bin/drupe-shim", "build")
}

pub fn unpacker() -> Result<PathBuf> {
    artifact("bin/drupe-unpacker", "build")
}

pub fn guest_kernel(machine: Machine) -> Result<PathBuf> {
    artifact(&format!("guest/kernel-{}", machine.name()), "setup")
}

pub fn initramfs() -> Result<PathBuf> {
    artifact("guest/initramfs", "build")
}

pub fn crictl() -> Result<PathBuf> {
    artifact("tools/crictl", "setup")
}

/// critest, with ginkgo beside it.
pub fn critest() -> Result<PathBuf> {
    artifact("tools/ginkgo", "setup")?;
    artifact("tools/critest", "setup")
}

/// A program of Kubernetes, etcd or CoreDNS.
pub fn kubernetes(program: &str) -> Result<PathBuf> {
    artifact(&format!("kubernetes/{program}"), "out/kubernetes")
}

/// The package `name` of `image-packages.txt`.
pub fn deb(name: &str) -> Result<PathBuf> {
    artifact(&format!("debs/{name}.deb"), "setup")
}

/// The OCI runtime of pods on the node's kernel: another than runc is tried
/// with E2E_OCI_RUNTIME.
pub fn oci_runtime() -> String {
    std::env::var("E2E_OCI_RUNTIME").unwrap_or_else(|_| "runc".to_owned())
}
