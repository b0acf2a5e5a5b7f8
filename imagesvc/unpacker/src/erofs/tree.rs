//! The names and attributes of a file system to be written.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::{Budget, Content, Error, Xattrs};

/// What a name and its slot in a directory's map cost beside its bytes.
const NAME_COST: u64 = 48;

/// What an inode costs: itself, and where it lies while it is written.
const INODE_COST: usize = size_of::<Inode>() + 64;

/// An inode of one [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub(super) u32);

impl InodeId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Time since the epoch; before it `seconds` is negative, `nanos` never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    pub seconds: i64,
    pub nanos: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// Permission, set-id and sticky bits (07777).
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    pub xattrs: Xattrs,
}

/// A device number as Linux encodes it on disk: 12 bits major, 20 bits minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(u32);

impl Device {
    /// None: Linux has no such number.
    pub fn new(major: u32, minor: u32) -> Option<Self> {
        (major < 1 << 12 && minor < 1 << 20).then_some(Self(
            (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        ))
    }

    pub(super) fn encoded(self) -> u32 {
        self.0
    }
}

#[derive(Debug)]
pub enum Node {
    Directory {
        children: BTreeMap<Box<[u8]>, InodeId>,
        /// The root is its own parent.
        parent: InodeId,
        /// Directories between this one and the root.
        depth: u32,
    },
    File(Content),
    Symlink(Box<[u8]>),
    CharDevice(Device),
    BlockDevice(Device),
    Fifo,
    Socket,
}

impl Node {
    fn memory(&self) -> usize {
        match self {
            Self::File(content) => content.memory(),
            Self::Symlink(target) => target.len(),
            _ => 0,
        }
    }
}

#[derive(Debug)]
pub(super) struct Inode {
    pub(super) attr: Attr,
    pub(super) node: Node,
}

/// Inodes and the names that lead to them. What no name leads to any more is
/// not written, but stays in memory and in the budget.
#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
    names: u64,
    memory: u64,
    budget: Budget,
}

impl Tree {
    pub const ROOT: InodeId = InodeId(0);

    /// A root directory with attributes `root`, and nothing in it.
    pub fn new(root: Attr, budget: Budget) -> Self {
        let node = Node::Directory {
            children: BTreeMap::new(),
            parent: Self::ROOT,
            depth: 0,
        };
        Self {
            inodes: vec![Inode { attr: root, node }],
            names: 0,
            memory: 0,
            budget,
        }
    }

    pub fn node(&self, id: InodeId) -> &Node {
        &self.inodes[id.index()].node
    }

    pub fn attr(&self, id: InodeId) -> &Attr {
        &self.inodes[id.index()].attr
    }

    /// Only a directory's attributes may change: room for a file's xattrs was
    /// reckoned with when its content was written.
    pub fn set_directory_attr(&mut self, id: InodeId, mut attr: Attr) -> Result<(), Error> {
        if !matches!(self.node(id), Node::Directory { .. }) {
            return Err(Error::NotADirectory(id.0));
        }
        attr.xattrs.shrink();
        self.charge(attr.xattrs.memory() as u64)?;
        self.inodes[id.index()].attr = attr;
        Ok(())
    }

    /// None: `directory` has no such name, or is no directory.
    pub fn lookup(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        match self.node(directory) {
            Node::Directory { children, .. } => children.get(name).copied(),
            _ => None,
        }
    }

    /// Puts an empty directory at `name`, in place of what was there.
    pub fn insert_directory(
        &mut self,
        parent: InodeId,
        name: &[u8],
        attr: Attr,
    ) -> Result<InodeId, Error> {
        let depth = match self.node(parent) {
            Node::Directory { depth, .. } => depth + 1,
            _ => return Err(Error::NotADirectory(parent.0)),
        };
        let node = Node::Directory {
            children: BTreeMap::new(),
            parent,
            depth,
        };
        self.insert(parent, name, attr, node)
    }

    /// Puts `node` at `name`, in place of what was there. Directories come by
    /// [`Tree::insert_directory`].
    pub fn insert(
        &mut self,
        parent: InodeId,
        name: &[u8],
        mut attr: Attr,
        node: Node,
    ) -> Result<InodeId, Error> {
        if self.inodes.len() as u64 >= self.budget.max_entries.min(u64::from(u32::MAX)) {
            return Err(Error::TooManyEntries {
                limit: self.budget.max_entries,
            });
        }
        attr.xattrs.shrink();
        let cost = INODE_COST + attr.xattrs.memory() + node.memory();
        self.charge(cost as u64)?;
        let id = InodeId(self.inodes.len() as u32);
        self.inodes.push(Inode { attr, node });
        self.link(parent, name, id)?;
        Ok(id)
    }

    /// Makes `name` another name of `target`, which is not a directory.
    pub fn link(&mut self, parent: InodeId, name: &[u8], target: InodeId) -> Result<(), Error> {
        let Node::Directory { children, .. } = &mut self.inodes[parent.index()].node else {
            return Err(Error::NotADirectory(parent.0));
        };
        match children.entry(name.into()) {
            Entry::Occupied(mut slot) => {
                slot.insert(target);
                Ok(())
            }
            Entry::Vacant(slot) => {
                slot.insert(target);
                self.names += 1;
                if self.names > self.budget.max_entries {
                    return Err(Error::TooManyEntries {
                        limit: self.budget.max_entries,
                    });
                }
                self.charge(NAME_COST + name.len() as u64)
            }
        }
    }

    pub(super) fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.index()]
    }

    /// Inodes that were ever inserted.
    pub(super) fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    fn charge(&mut self, bytes: u64) -> Result<(), Error> {
        self.memory += bytes;
        if self.memory > self.budget.max_metadata_bytes {
            return Err(Error::MetadataTooLarge {
                limit: self.budget.max_metadata_bytes,
            });
        }
        Ok(())
    }
}
