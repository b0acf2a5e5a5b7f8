//! Named network namespaces, as `ip netns` keeps them: a file onto which the
//! namespace is bind mounted, so that it lives without a process.
//!
//! Whatever has to happen inside a namespace runs on a thread that enters it
//! and then ends: a thread that came back could come back to the wrong one.

use std::{
    fs::{File, OpenOptions},
    future::Future,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, statfs},
};
use tokio::{sync::oneshot, time::timeout};

use crate::{error::NetnsError, netlink};

/// Where `ip netns` and CNI plugins' operators look for namespaces.
pub const DEFAULT_DIR: &str = "/run/netns";

/// Namespace work is a handful of system calls; the kernel's one rtnl lock may
/// hold them up while many pods start.
const WORK_TIMEOUT: Duration = Duration::from_secs(15);

/// How many mounts may lie on top of each other on one name. More than one
/// only exists where something else mounted over ours.
const MAX_STACKED_MOUNTS: usize = 8;

/// A named network namespace. The value is only its name: dropping it leaves
/// the namespace, [`Netns::remove`] ends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    path: PathBuf,
}

impl Netns {
    /// Makes a new namespace with its loopback up, named by `dir/name`.
    ///
    /// A plain file of that name, left by a create that was interrupted, is
    /// taken over; a namespace of that name is [`NetnsError::Exists`].
    pub async fn create(dir: &Path, name: &str) -> Result<Self, NetnsError> {
        let netns = Self::at(dir, name)?;
        let path = netns.path.clone();
        let dir = dir.to_owned();
        on_thread(netns.path.clone(), move |runtime| {
            std::fs::create_dir_all(&dir).map_err(|source| NetnsError::File {
                action: "create the directory",
                path: dir,
                source,
            })?;
            reserve(&path)?;
            let made = runtime.block_on(make_and_pin(&path));
            if made.is_err()
                && let Err(error) = unpin(&path)
            {
                tracing::warn!(%error, "a half-made network namespace stays");
            }
            made
        })
        .await?;
        Ok(netns)
    }

    /// The namespace that `dir/name` names.
    pub async fn open(dir: &Path, name: &str) -> Result<Self, NetnsError> {
        let netns = Self::at(dir, name)?;
        netns.fd()?;
        Ok(netns)
    }

    /// Ends the name `dir/name`, whatever state an interrupted create or
    /// remove has left it in. No such name is no error.
    pub async fn remove_at(dir: &Path, name: &str) -> Result<(), NetnsError> {
        Self::at(dir, name)?.remove().await
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor of the namespace, for `setns` and the VMM's jail.
    pub fn fd(&self) -> Result<OwnedFd, NetnsError> {
        open_namespace(&self.path)
    }

    /// Unmounts and unlinks the name; the namespace and the links in it go
    /// with its last user. Already gone is no error.
    pub async fn remove(&self) -> Result<(), NetnsError> {
        let path = self.path.clone();
        on_thread(self.path.clone(), move |_| unpin(&path)).await
    }

    /// Runs `work` inside the namespace, on a thread and a runtime of its own.
    pub(crate) async fn run<T, F, W>(&self, work: W) -> Result<T, NetnsError>
    where
        T: Send + 'static,
        W: FnOnce() -> F + Send + 'static,
        F: Future<Output = Result<T, NetnsError>>,
    {
        let fd = self.fd()?;
        let path = self.path.clone();
        on_thread(self.path.clone(), move |runtime| {
            setns(fd, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::System {
                action: "enter it",
                netns: path.clone(),
                source: errno.into(),
            })?;
            match runtime.block_on(async { timeout(WORK_TIMEOUT, work()).await }) {
                Ok(result) => result,
                Err(_) => Err(NetnsError::TimedOut {
                    netns: path,
                    after: WORK_TIMEOUT,
                }),
            }
        })
        .await
    }

    /// Runs `work` inside a namespace that has no name and ends with it.
    pub(crate) async fn run_in_nameless<T, F, W>(work: W) -> Result<T, NetnsError>
    where
        T: Send + 'static,
        W: FnOnce(PathBuf) -> F + Send + 'static,
        F: Future<Output = Result<T, NetnsError>>,
    {
        // What errors call it.
        let path = PathBuf::from("(nameless)");
        on_thread(path.clone(), move |runtime| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::System {
                action: "make a new namespace",
                netns: path.clone(),
                source: errno.into(),
            })?;
            runtime.block_on(work(path))
        })
        .await
    }

    fn at(dir: &Path, name: &str) -> Result<Self, NetnsError> {
        let plain = !name.is_empty()
            && name.len() <= 200
            && name != "."
            && name != ".."
            && !name.contains(['/', '\0']);
        if !plain {
            return Err(NetnsError::Name {
                name: name.to_owned(),
            });
        }
        Ok(Self {
            path: dir.join(name),
        })
    }
}

/// Whether `path` is a mounted namespace, as opposed to a file or nothing.
pub(crate) fn is_namespace(path: &Path) -> bool {
    // In a /proc/PID/ns path statfs follows the link to nsfs as well.
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC)
}

fn open_namespace(path: &Path) -> Result<OwnedFd, NetnsError> {
    let file = File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => NetnsError::NotFound {
            path: path.to_owned(),
        },
        _ => NetnsError::File {
            action: "open",
            path: path.to_owned(),
            source,
        },
    })?;
    if !is_namespace(path) {
        return Err(NetnsError::NotANamespace {
            path: path.to_owned(),
        });
    }
    Ok(file.into())
}

/// Makes the file that the namespace gets mounted on.
fn reserve(path: &Path) -> Result<(), NetnsError> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path);
    match made {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if is_namespace(path) {
                return Err(NetnsError::Exists {
                    path: path.to_owned(),
                });
            }
            Ok(())
        }
        Err(source) => Err(NetnsError::File {
            action: "create",
            path: path.to_owned(),
            source,
        }),
    }
}

/// Moves this thread into a new namespace and mounts that on `path`.
async fn make_and_pin(path: &Path) -> Result<(), NetnsError> {
    let system = |action: &'static str| {
        move |errno: Errno| NetnsError::System {
            action,
            netns: path.to_owned(),
            source: errno.into(),
        }
    };
    unshare(CloneFlags::CLONE_NEWNET).map_err(system("make a new namespace"))?;
    netlink::Links::connect(path)?.set_up("lo").await?;
    mount(
        Some("/proc/thread-self/ns/net"),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(system("mount the namespace"))
}

fn unpin(path: &Path) -> Result<(), NetnsError> {
    for _ in 0..MAX_STACKED_MOUNTS {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Not a mount point (any more), or not there at all.
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(errno) => {
                return Err(NetnsError::File {
                    action: "unmount",
                    path: path.to_owned(),
                    source: errno.into(),
                });
            }
        }
    }
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(NetnsError::File {
            action: "remove",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Runs `work` on a thread of its own, which may therefore change namespaces,
/// and hands it a runtime that lives there.
async fn on_thread<T, W>(netns: PathBuf, work: W) -> Result<T, NetnsError>
where
    T: Send + 'static,
    W: FnOnce(&tokio::runtime::Runtime) -> Result<T, NetnsError> + Send + 'static,
{
    let (answer, answered) = oneshot::channel();
    let failed = {
        let netns = netns.clone();
        move |source| NetnsError::System {
            action: "start a thread",
            netns,
            source,
        }
    };
    let thread = {
        let failed = failed.clone();
        move || {
            let result = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(failed)
                .and_then(|runtime| work(&runtime));
            // The caller may have given up waiting: nobody to tell.
            let _ = answer.send(result);
        }
    };
    thread::Builder::new()
        .name("netns".to_owned())
        .spawn(thread)
        .map_err(failed)?;
    match timeout(WORK_TIMEOUT, answered).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(NetnsError::ThreadEnded { netns }),
        Err(_) => Err(NetnsError::TimedOut {
            netns,
            after: WORK_TIMEOUT,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[tokio::test]
    async fn a_namespace_is_made_opened_and_removed() {
        let host = testing::Host::enter();
        let dir = host.dir().join("netns");
        let netns = Netns::create(&dir, "pod").await.unwrap();
        assert_eq!(netns.path(), dir.join("pod"));
        assert_eq!(Netns::open(&dir, "pod").await.unwrap(), netns);
        assert!(matches!(
            Netns::create(&dir, "pod").await,
            Err(NetnsError::Exists { .. })
        ));
        let links = testing::ip(netns.path(), "link show lo");
        assert!(links.contains("LOOPBACK,UP"), "{links}");

        netns.remove().await.unwrap();
        netns.remove().await.unwrap();
        assert!(!netns.path().exists());
        assert!(matches!(
            Netns::open(&dir, "pod").await,
            Err(NetnsError::NotFound { .. })
        ));
        assert!(!host.mounts().contains("netns/pod"));
    }

    #[tokio::test]
    async fn what_an_interrupted_create_left_is_taken_over_or_removed() {
        let host = testing::Host::enter();
        let dir = host.dir();
        std::fs::write(dir.join("a"), "").unwrap();
        std::fs::write(dir.join("b"), "").unwrap();
        assert!(matches!(
            Netns::open(dir, "a").await,
            Err(NetnsError::NotANamespace { .. })
        ));
        Netns::create(dir, "a").await.unwrap();
        Netns::remove_at(dir, "a").await.unwrap();
        Netns::remove_at(dir, "b").await.unwrap();
        assert!(!dir.join("a").exists() && !dir.join("b").exists());
    }

    #[tokio::test]
    async fn a_name_cannot_leave_the_directory() {
        for name in ["", ".", "..", "a/b", "../a"] {
            assert!(matches!(
                Netns::remove_at(Path::new("/run/netns"), name).await,
                Err(NetnsError::Name { .. })
            ));
        }
    }
}
