//! The roots of the jails: for the monitor a tmpfs with a /proc of the own PID
//! namespace, three device nodes and room for the guest's memory; for the file
//! server the shared directory and nothing else.

use std::fs::{self, File};
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};
use vmm_client::{Machine, VmSpec};

use super::{JailError, RUN_DIR, TMP_DIR, step};

/// The root's size beyond the guest's memory: sockets and directories.
const ROOT_KIB: u64 = 1024;
/// Files in the root; one a device and some directories.
const ROOT_INODES: u32 = 1024;
/// Where the own PID namespace's processes are. /proc holds what is needed of
/// it, and one file of the node's: User Mode Linux reads about the CPU.
const PIDS_DIR: &str = "pids";
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

    for dir in ["proc", "dev", PIDS_DIR] {
        make_dir(&root.join(dir), 0o755)?;
    }
    for dir in [TMP_DIR, RUN_DIR] {
        let dir = inside(root, dir);
        make_dir(&dir, 0o700)?;
        chown(&dir, Some(spec.uid), Some(spec.gid)).map_err(at("give the pod's uid", &dir))?;
    }
    for node in ["dev/null", "dev/zero", "dev/urandom"] {
        bind_file(&Path::new("/").join(node), &root.join(node))?;
    }
    mount_pids(&root.join(PIDS_DIR))?;
    bind_file(Path::new("/proc/cpuinfo"), &root.join("proc/cpuinfo"))?;
    let own = root.join("proc/self");
    symlink(format!("/{PIDS_DIR}/self"), &own).map_err(at("link", &own))?;
    enter(root)
}

fn bind_file(source: &Path, target: &Path) -> Result<(), JailError> {
    fs::write(target, "").map_err(at("create", target))?;
    mount(Some(source), target, NONE, MsFlags::MS_BIND, NONE).map_err(at("bind", source))
}

fn mount_pids(target: &Path) -> Result<(), JailError> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mounted = |options| mount(Some("proc"), target, Some("proc"), flags, options);
    match mounted(Some("subset=pid")) {
        // Linux before 5.8 has no such option.
        Err(nix::Error::EINVAL) => mounted(NONE),
        mounted => mounted,
    }
    .map_err(at("mount the own processes on", target))
}

/// Makes `root` the root, and lets go of the old one.
fn enter(root: &Path) -> Result<(), JailError> {
    // Stacks the old root over the new one, from where it is taken off.
    chdir(root).map_err(at("change to", root))?;
    pivot_root(".", ".").map_err(step("pivot into the jail's root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the host's root"))?;
    chdir("/").map_err(step("change to the new root"))
}

/// This process's /proc/self/fd, by a mount of its own: nothing above the
/// directory can be reached from it.
pub(super) fn own_fds() -> Result<File, JailError> {
    let path = c"/proc/self/fd";
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a string that lives until after the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(step("open its own descriptors")(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made this descriptor for this process and
    // nothing else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Makes the shared directory the root, by way of the directory `root`. Nothing
/// can be made in it, only in what is mounted below.
pub(super) fn pivot_into(shared: &Path, root: &Path) -> Result<(), JailError> {
    // From here on mounts of the daemon reach us and none of ours reach it.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)
        .map_err(step("make all mounts slaves"))?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(shared), root, NONE, flags, NONE).map_err(at("bind", shared))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags;
    mount(NONE, root, NONE, flags, NONE).map_err(at("make read-only", root))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(step("read mountinfo"))?;
    if !is_slave(&mounts, root) {
        return Err(JailError::NotShared {
            path: shared.to_owned(),
        });
    }
    enter(root)
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
