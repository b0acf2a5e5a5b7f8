//! From the kernel's hand-over to a guest in which containers can be made.
//!
//! Everything here happens once, in order, before anything else runs; a phase
//! that fails ends the guest.

use std::fs;
use std::io;
use std::path::Path;

use agent_api::{SCRATCH_SERIAL, SHARED_DIR, SHARED_TAG};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::unistd::{chdir, chroot};

use crate::cgroup::{POD, ROOT};
use crate::container::child::PIVOT;
use crate::container::{ETC_DIR, SHM};
use crate::disk::{Disk, DiskError};
use crate::rootfs::SCRATCH;
use crate::sandbox::DEFAULT_SHM_BYTES;

/// Descriptors the agent itself may have open: ten for each of its containers
/// and a few thousand.
const MAX_FILES: u64 = 65_536;

/// The ceiling that containers inherit, the kernel's default `fs.nr_open`.
const MAX_FILES_HARD: u64 = 1_048_576;

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot make {path}")]
    Directory { path: String, source: io::Error },
    #[error("cannot mount {what} at {path}")]
    Mount {
        what: &'static str,
        path: String,
        source: Errno,
    },
    #[error("cannot leave the initramfs")]
    SwitchRoot(#[source] Errno),
    #[error("cannot enable the cgroup controllers of {path}")]
    Controllers {
        path: &'static str,
        source: io::Error,
    },
    #[error("cannot expedite RCU")]
    Rcu(#[source] io::Error),
    #[error("cannot raise the limits of open files and processes")]
    Limits(#[source] Errno),
    #[error("cannot find the scratch disk")]
    Scratch(#[from] DiskError),
}

type Result<T> = std::result::Result<T, BootError>;

/// The file systems of the guest, and its disks.
pub fn mount_all() -> Result<()> {
    switch_root()?;
    mount_kernel()?;
    expedite_rcu()?;
    enable_controllers()?;
    raise_limits()?;
    mount_shared()?;
    mount_scratch()
}

/// Those that containers get: one in a user namespace cannot raise its own.
fn raise_limits() -> Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, MAX_FILES, MAX_FILES_HARD)
        .and_then(|()| setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY))
        .map_err(BootError::Limits)
}

/// pivot_root(2) refuses to leave the initial ramfs, and each container has to
/// pivot: so the agent's root is a tmpfs moved over it.
fn switch_root() -> Result<()> {
    make_dir("/root")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_at("tmpfs", "/root", "tmpfs", flags, "mode=755")?;
    let switch = || -> nix::Result<()> {
        chdir("/root")?;
        mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
        chroot(".")?;
        chdir("/")
    };
    switch().map_err(BootError::SwitchRoot)
}

fn mount_kernel() -> Result<()> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mounts: [(&'static str, &str, MsFlags, &str); 6] = [
        ("proc", "/proc", plain, ""),
        ("sysfs", "/sys", plain, ""),
        (
            "devtmpfs",
            "/dev",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "mode=755",
        ),
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "mode=620,ptmxmode=666",
        ),
        ("cgroup2", ROOT, plain, ""),
        ("tmpfs", "/run/drupe/shm", plain, ""),
    ];
    debug_assert_eq!(SHM.to_str(), Ok("/run/drupe/shm"));
    for (fs, path, flags, options) in mounts {
        // Those of sysfs are there once it is mounted.
        if !path.starts_with("/sys/") {
            make_dir(path)?;
        }
        let shm = format!("mode=1777,size={DEFAULT_SHM_BYTES}");
        let options = if path == "/run/drupe/shm" {
            shm.as_str()
        } else {
            options
        };
        mount_at(fs, path, fs, flags, options)?;
    }
    for dir in [
        "/tmp",
        ETC_DIR,
        &PIVOT.to_string_lossy(),
        SCRATCH,
        SHARED_DIR,
    ] {
        make_dir(dir)?;
    }
    Ok(())
}

/// Taking things down (mounts, cgroups, devices at power-off) waits for RCU
/// grace periods, which take tens of milliseconds each in a guest that idles;
/// expedited ones interrupt the CPUs instead, of which a guest has few.
fn expedite_rcu() -> Result<()> {
    match fs::write("/sys/kernel/rcu_expedited", "1") {
        // A kernel for one CPU has no grace periods to wait for.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(BootError::Rcu),
    }
}

/// Every controller the kernel has, for the pod's cgroup and for those of its
/// containers.
fn enable_controllers() -> Result<()> {
    fs::create_dir(POD).map_err(|source| BootError::Directory {
        path: POD.to_owned(),
        source,
    })?;
    for path in [ROOT, POD] {
        let failed = |source| BootError::Controllers { path, source };
        let dir = Path::new(path);
        let controllers = fs::read_to_string(dir.join("cgroup.controllers")).map_err(failed)?;
        let enable: Vec<String> = controllers
            .split_whitespace()
            .map(|name| format!("+{name}"))
            .collect();
        fs::write(dir.join("cgroup.subtree_control"), enable.join(" ")).map_err(failed)?;
    }
    Ok(())
}

/// The directory of the pod's volumes. Shared, so that a container may ask to
/// see what another mounts in a volume.
fn mount_shared() -> Result<()> {
    // Volumes may hold set-user-ID programs: each container's own mount says.
    mount_at(SHARED_TAG, SHARED_DIR, "virtiofs", MsFlags::empty(), "")?;
    mount(
        None::<&str>,
        SHARED_DIR,
        None::<&str>,
        MsFlags::MS_SHARED,
        None::<&str>,
    )
    .map_err(|source| BootError::Mount {
        what: "the shared directory as shared",
        path: SHARED_DIR.to_owned(),
        source,
    })
}

fn mount_scratch() -> Result<()> {
    let device = Disk::find(SCRATCH_SERIAL)?.device();
    let failed = |source| BootError::Mount {
        what: "the scratch disk",
        path: SCRATCH.to_owned(),
        source,
    };
    // The template's inode tables are lazy: writing them out would only make
    // the host's sparse file grow.
    let options = Some("noinit_itable");
    mount(
        Some(&device),
        SCRATCH,
        Some("ext4"),
        MsFlags::MS_NOATIME,
        options,
    )
    .map_err(failed)
}

fn make_dir(path: &str) -> Result<()> {
    fs::create_dir_all(path).map_err(|source| BootError::Directory {
        path: path.to_owned(),
        source,
    })
}

fn mount_at(what: &'static str, path: &str, fs: &str, flags: MsFlags, options: &str) -> Result<()> {
    mount(Some(what), path, Some(fs), flags, Some(options)).map_err(|source| BootError::Mount {
        what,
        path: path.to_owned(),
        source,
    })
}
