//! Which containers of a pod see the same bind.
//!
//! To a guest two binds are two directories, even where both show the same one
//! of the node. A socket, a lock or a watch (inotify) of one container is
//! there for another only if both look through one bind. So a volume has one
//! for all containers of the pod that could not tell it from one of their own.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ids;
use crate::spec::{Mount, Propagation};

/// What of the node a bind shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub device: u64,
    pub inode: u64,
    /// Of the node's mount that it is in (`f_flag` of statvfs(3)).
    pub flags: u64,
    pub view: View,
}

/// What can be seen of the node's mounts below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum View {
    /// There are none.
    Alone,
    /// Those at this path, as they come and go.
    Follows(PathBuf),
    /// Those that were there when it was made: no other one is the same.
    Snapshot,
}

/// How the node lets the guest use a bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    Write,
    /// What is mounted below it may be written.
    Read,
    ReadRecursively,
}

/// A bind in the pod's shared directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Its name there, used only once: the guest remembers what it has seen.
    pub name: String,
    pub source: Source,
    pub access: Access,
}

impl Bind {
    /// What the guest is to do about writing: options of the mount in it.
    #[must_use]
    pub fn guest_option(&self, volume: &Mount) -> &'static str {
        match (volume.read_only, volume.recursive_read_only) {
            (false, _) => "rw",
            (true, true) => "rro",
            // The node refuses writes to the volume. The guest cannot tell
            // what is mounted below from it, and would refuse those as well.
            (true, false) if self.access == Access::Read && self.source.view != View::Alone => "rw",
            (true, false) => "ro",
        }
    }
}

/// One of `there`, the pod's binds, or a new one. `uid` is the pod's.
pub(super) fn choose<'a>(
    there: impl Iterator<Item = &'a Bind> + Clone,
    source: Source,
    volume: &Mount,
    uid: &str,
) -> Bind {
    let access = match (volume.read_only, volume.recursive_read_only) {
        (false, _) => Access::Write,
        // No secret and nothing of the node's: that a container of the pod may
        // not write it is for the guest to keep, and it can be shared.
        (true, _) if source.view == View::Alone && is_empty_dir(&volume.host_path, uid) => {
            Access::Write
        }
        (true, false) => Access::Read,
        (true, true) => Access::ReadRecursively,
    };
    let same = there.filter(|bind| bind.source == source && source.view != View::Snapshot);
    // Where the guest may write already, it is the guest who says which
    // container may not.
    let found = [Access::Write, access].into_iter().find_map(|wanted| {
        let mut same = same.clone();
        same.find(|bind| bind.access == wanted)
    });
    found.cloned().unwrap_or_else(|| Bind {
        name: ids::new_id(),
        source,
        access,
    })
}

/// Whether the kubelet made it for this pod and will delete it with it.
fn is_empty_dir(path: &Path, uid: &str) -> bool {
    let parts: Vec<_> = path.iter().collect();
    !uid.is_empty()
        && parts.windows(4).any(|parts| {
            parts[0] == "pods"
                && parts[1] == uid
                && parts[2] == "volumes"
                && parts[3] == "kubernetes.io~empty-dir"
        })
}

impl View {
    pub(super) fn of(volume: &Mount, has_mounts: bool) -> Self {
        match (volume.propagation, has_mounts) {
            (Propagation::HostToContainer | Propagation::Bidirectional, _) => {
                Self::Follows(volume.host_path.clone())
            }
            (Propagation::Private, true) => Self::Snapshot,
            (Propagation::Private, false) => Self::Alone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn source(inode: u64, view: View) -> Source {
        Source {
            device: 1,
            inode,
            flags: 0,
            view,
        }
    }

    fn volume(read_only: bool) -> Mount {
        Mount {
            host_path: "/v".into(),
            container_path: "/c".into(),
            read_only,
            recursive_read_only: false,
            propagation: Propagation::Private,
            id_mapping: None,
            image: None,
        }
    }

    fn next(there: &[Bind], source: Source, volume: &Mount) -> Bind {
        choose(there.iter(), source, volume, "u1")
    }

    #[test]
    fn the_same_directory_is_bound_once() {
        let first = next(&[], source(7, View::Alone), &volume(false));
        let there = [first.clone()];
        assert_eq!(next(&there, source(7, View::Alone), &volume(false)), first);
        let other = next(&there, source(8, View::Alone), &volume(false));
        assert_ne!(other.name, first.name);
        let snapshot = next(&[], source(7, View::Snapshot), &volume(false));
        let there = [snapshot.clone()];
        let again = next(&there, source(7, View::Snapshot), &volume(false));
        assert_ne!(again.name, snapshot.name);
    }

    #[test]
    fn a_reader_joins_a_writer_and_the_guest_holds_it_to_reading() {
        let writer = next(&[], source(7, View::Alone), &volume(false));
        let there = [writer.clone()];
        let reader = next(&there, source(7, View::Alone), &volume(true));
        assert_eq!(reader, writer);
        assert_eq!(reader.guest_option(&volume(true)), "ro");
        assert_eq!(reader.guest_option(&volume(false)), "rw");
    }

    #[test]
    fn the_node_itself_refuses_writes_to_what_no_container_may_write() {
        let reader = next(&[], source(7, View::Alone), &volume(true));
        assert_eq!(reader.access, Access::Read);
        let there = [reader.clone()];
        let writer = next(&there, source(7, View::Alone), &volume(false));
        assert_ne!(writer.name, reader.name);
        // But for what is the pod's alone.
        let empty_dir = |pod: &str| Mount {
            host_path: format!("/k/pods/{pod}/volumes/kubernetes.io~empty-dir/x").into(),
            ..volume(true)
        };
        let own = next(&[], source(7, View::Alone), &empty_dir("u1"));
        assert_eq!(own.access, Access::Write);
        assert_eq!(own.guest_option(&empty_dir("u1")), "ro");
        let foreign = next(&[], source(7, View::Alone), &empty_dir("u2"));
        assert_eq!(foreign.access, Access::Read);
    }

    #[test]
    fn what_is_mounted_below_a_read_only_volume_may_be_written_unless_it_may_not() {
        let read_only = volume(true);
        let plain = next(&[], source(7, View::Snapshot), &read_only);
        assert_eq!(plain.guest_option(&read_only), "rw");
        let recursive = Mount {
            recursive_read_only: true,
            ..read_only
        };
        let bind = next(&[], source(7, View::Snapshot), &recursive);
        assert_eq!(bind.access, Access::ReadRecursively);
        assert_eq!(bind.guest_option(&recursive), "rro");
    }

    fn any_view() -> impl Strategy<Value = View> {
        prop_oneof![
            Just(View::Alone),
            Just(View::Snapshot),
            Just(View::Follows("/v".into())),
        ]
    }

    proptest! {
        #[test]
        fn nobody_may_write_what_it_was_given_to_read(
            asked in proptest::collection::vec((0u64..3, any_view(), any::<bool>()), 1..12),
        ) {
            let mut there: Vec<Bind> = Vec::new();
            for (inode, view, read_only) in asked {
                let (source, volume) = (source(inode, view), volume(read_only));
                let bind = choose(there.iter(), source.clone(), &volume, "u1");
                prop_assert_eq!(&bind.source, &source);
                let writable = bind.access == Access::Write && bind.guest_option(&volume) == "rw";
                prop_assert_eq!(writable, !read_only);
                if !there.contains(&bind) {
                    prop_assert!(there.iter().all(|other| other.name != bind.name));
                    there.push(bind);
                }
            }
        }
    }
}
