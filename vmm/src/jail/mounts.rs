//! The jail's root: a tmpfs with a /proc of the own PID namespace, three
//! device nodes, room for the guest's memory, and the shared directory.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};
use vmm_client::{Machine, VmSpec};

use super::{JailError, RUN_DIR, SHARED_DIR, TMP_DIR, step};

/// The root's size beyond the guest's memory: sockets and directories.
const ROOT_KIB: u64 = 1024;
/// Files in the root; one a device and some directories.
const ROOT_INODES: u32 = 1024;
/// Room of a socket-only root.
const NONE: Option<&str> = None;

pub(super) fn pivot(spec: &VmSpec) -> Result<(), JailError> {
    // From here on mounts of the daemon reach us and none of ours reach it.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)
        .map_err(step("make all mounts slaves"))?;

    let root = spec.jail_root.as_path();
    // UML keeps the guest's memory in a file that it maps executable.
    let memory_kib = match spec.machine {
        Machine::Uml(_) => u64::from(spec.memory_mib) * 1024,
        Machine::Kvm => 0,
    };
    let size = memory_kib + ROOT_KIB;
    let options = format!("mode=0755,size={size}k,nr_inodes={ROOT_INODES}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), root, Some("tmpfs"), flags, Some(&*options))
        .map_err(at("mount a tmpfs on", root))?;

    for dir in ["proc", "dev"] {
        make_dir(&root.join(dir), 0o755)?;
    }
    for dir in [TMP_DIR, RUN_DIR] {
        let dir = inside(root, dir);
        make_dir(&dir, 0o700)?;
        chown(&dir, Some(spec.uid), Some(spec.gid)).map_err(at("give the pod's uid", &dir))?;
    }
    bind_shared(&spec.shared_dir, &inside(root, SHARED_DIR))?;
    for node in ["null", "zero", "urandom"] {
        let target = root.join("dev").join(node);
        let source = Path::new("/dev").join(node);
        fs::write(&target, "").map_err(at("create", &target))?;
        mount(Some(&source), &target, NONE, MsFlags::MS_BIND, NONE).map_err(at("bind", &source))?;
    }
    let proc = root.join("proc");
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), &proc, Some("proc"), flags, NONE).map_err(at("mount /proc on", &proc))?;

    // Stacks the old root over the new one, from where it is taken off.
    chdir(root).map_err(at("change to", root))?;
    pivot_root(".", ".").map_err(step("pivot into the jail's root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the host's root"))?;
    chdir("/").map_err(step("change to the new root"))
}

fn bind_shared(source: &Path, target: &Path) -> Result<(), JailError> {
    make_dir(target, 0o755)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, NONE, flags, NONE).map_err(at("bind", source))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(step("read mountinfo"))?;
    if is_slave(&mounts, target) {
        Ok(())
    } else {
        Err(JailError::NotShared {
            path: source.to_owned(),
        })
    }
}

/// Whether the topmost mount at `target` receives mounts from elsewhere
/// (proc_pid_mountinfo(5): optional fields between the sixth and a dash).
fn is_slave(mountinfo: &str, target: &Path) -> bool {
    let topmost = mountinfo.lines().rev().find(|line| {
        let path = line.split(' ').nth(4).map(unescape);
        path.as_deref() == target.to_str()
    });
    topmost.is_some_and(|line| {
        line.split(' ')
            .skip(6)
            .take_while(|field| *field != "-")
            .any(|field| field.starts_with("master:"))
    })
}

fn unescape(path: &str) -> String {
    path.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

fn make_dir(path: &Path, mode: u32) -> Result<(), JailError> {
    fs::DirBuilder::new()
        .mode(mode)
        .create(path)
        .map_err(at("create", path))?;
    // Whatever the umask was.
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(at("create", path))
}

fn inside(root: &Path, path: &str) -> std::path::PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn at<E: Into<io::Error>>(step: &'static str, path: &Path) -> impl FnOnce(E) -> JailError {
    let path = path.to_owned();
    move |source| JailError::Path {
        step,
        path,
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
90 27 0:40 / /run/pod\\040a/shared rw master:3 - ext4 /dev/vda rw
91 27 0:41 / /run/b rw shared:4 - ext4 /dev/vda rw
92 27 0:42 / /run/c rw shared:4 master:5 - ext4 /dev/vda rw
93 27 0:43 / /run/c rw - tmpfs tmpfs rw
";

    #[test]
    fn slaves_are_told_from_mountinfo() {
        assert!(is_slave(MOUNTINFO, Path::new("/run/pod a/shared")));
        assert!(!is_slave(MOUNTINFO, Path::new("/run/b")));
        assert!(!is_slave(MOUNTINFO, Path::new("/run/c")), "topmost counts");
        assert!(!is_slave(MOUNTINFO, Path::new("/run/d")));
    }
}
