//! The tree that a layer's members make, by the rules of the OCI image spec
//! ("Applying Changesets"): a later member replaces an earlier one, missing
//! parents are made, whiteouts become what overlayfs takes for them.
//!
//! A path that leads through a symbolic link of the same layer is followed as
//! the container would follow it: within the tree, whose root is `/`, and
//! above which there is nothing.

use std::io::{Read, Seek, Write};

use super::archive::{Archive, Kind, Member};
use super::error::{EntryError, Error, HardLinkReason};
use super::mark::{MarkError, Marks, OVERLAY_XATTRS, implied_directory};
use super::path::{EntryPath, Meaning, PathError, show};
use super::{Limits, resolve};
use crate::erofs::{
    self, Attr, Budget, Content, Device, InodeId, MAX_SYMLINK_LEN, Node, Tree, Writer, Xattrs,
};

pub(super) struct Builder<W: Write + Seek> {
    tree: Tree,
    image: Writer<W>,
    limits: Limits,
    marks: Marks,
    dropped_xattrs: u64,
}

/// What [`Builder::finish`] has to tell.
pub(super) struct Built {
    pub(super) erofs_len: u64,
    pub(super) dropped_xattrs: u64,
    pub(super) opaque_root: bool,
}

impl<W: Write + Seek> Builder<W> {
    pub(super) fn new(out: W, limits: Limits) -> Result<Self, erofs::Error> {
        let budget = Budget::from(&limits);
        Ok(Self {
            tree: Tree::new(implied_directory(), budget),
            image: Writer::new(out, &budget)?,
            limits,
            marks: Marks::default(),
            dropped_xattrs: 0,
        })
    }

    /// Takes `member`, and its data from `archive`.
    pub(super) fn add<R: Read>(
        &mut self,
        member: Member,
        archive: &mut Archive<R>,
    ) -> Result<(), Error> {
        let path = member.path.clone();
        let fail = |source: EntryError| source.at(&path);
        let parsed = EntryPath::parse(&path).map_err(|err| fail(EntryError::Path(err)))?;
        let meaning = parsed
            .meaning()
            .map_err(|err| fail(EntryError::Path(err)))?;
        let split = parsed.split();
        match (meaning, split) {
            (Meaning::Ignored, _) => Ok(()),
            (Meaning::Name, None) => self.root(&member).map_err(fail),
            (Meaning::Name, Some((parent, name))) => {
                let parent = self.parent(parent).map_err(fail)?;
                self.named(parent, name, &member, archive)
            }
            (Meaning::Whiteout(hidden), Some((parent, _))) => {
                self.whiteout(parent, hidden).map_err(fail)
            }
            (Meaning::Opaque, Some((parent, _))) => {
                let directory = self.parent(parent).map_err(fail)?;
                self.marks.hides_content(directory);
                Ok(())
            }
            (Meaning::Whiteout(_) | Meaning::Opaque, None) => {
                Err(fail(EntryError::Path(PathError::Malformed)))
            }
        }
    }

    fn root(&mut self, member: &Member) -> Result<(), EntryError> {
        if member.kind != Kind::Directory {
            return Err(EntryError::RootNotDirectory);
        }
        let attr = self.attr(member)?;
        Ok(self.tree.set_directory_attr(Tree::ROOT, attr)?)
    }

    fn named<R: Read>(
        &mut self,
        parent: InodeId,
        name: &[u8],
        member: &Member,
        archive: &mut Archive<R>,
    ) -> Result<(), Error> {
        let fail = |source: EntryError| source.at(&member.path);
        let mut attr = self.attr(member).map_err(fail)?;
        let node = match member.kind {
            Kind::HardLink => {
                return self.hard_link(parent, name, &member.link).map_err(fail);
            }
            Kind::Directory => return self.directory(parent, name, attr).map_err(fail),
            Kind::File => Node::File(self.content(&attr, member, archive)?),
            Kind::Symlink => {
                // Linux has no other.
                attr.mode = 0o777;
                match member.link.len() {
                    1..=MAX_SYMLINK_LEN => Node::Symlink(member.link.as_slice().into()),
                    len => return Err(fail(EntryError::SymlinkTarget(len))),
                }
            }
            Kind::CharDevice => Node::CharDevice(device(member.device).map_err(fail)?),
            Kind::BlockDevice => Node::BlockDevice(device(member.device).map_err(fail)?),
            Kind::Fifo => Node::Fifo,
        };
        self.tree
            .insert(parent, name, attr, node)
            .map_err(|err| fail(err.into()))?;
        Ok(())
    }

    fn directory(&mut self, parent: InodeId, name: &[u8], attr: Attr) -> Result<(), EntryError> {
        let present = self.tree.lookup(parent, name);
        if let Some(id) = present
            && matches!(self.tree.node(id), Node::Directory { .. })
        {
            self.marks.is_described(id);
            return Ok(self.tree.set_directory_attr(id, attr)?);
        }
        let hides = present.is_some_and(|id| is_whiteout(self.tree.node(id)));
        let id = self.tree.insert_directory(parent, name, attr)?;
        if hides {
            self.marks.replaces(id);
        }
        Ok(())
    }

    fn hard_link(&mut self, parent: InodeId, name: &[u8], link: &[u8]) -> Result<(), EntryError> {
        let fail = |reason| EntryError::HardLink {
            target: show(link),
            reason,
        };
        let path = EntryPath::parse(link).map_err(|err| {
            fail(match err {
                PathError::OutsideRoot => HardLinkReason::OutsideRoot,
                _ => HardLinkReason::Malformed,
            })
        })?;
        let Some((directories, last)) = path.split() else {
            return Err(fail(HardLinkReason::Directory));
        };
        let target = resolve::find(&self.tree, directories)?
            .and_then(|directory| self.tree.lookup(directory, last))
            .ok_or_else(|| fail(HardLinkReason::Absent))?;
        match self.tree.node(target) {
            Node::Directory { .. } => Err(fail(HardLinkReason::Directory)),
            node if is_whiteout(node) => Err(fail(HardLinkReason::Absent)),
            _ => Ok(self.tree.link(parent, name, target)?),
        }
    }

    fn content<R: Read>(
        &mut self,
        attr: &Attr,
        member: &Member,
        archive: &mut Archive<R>,
    ) -> Result<Content, Error> {
        if member.size > self.limits.max_file_bytes {
            let (size, limit) = (member.size, self.limits.max_file_bytes);
            return Err(EntryError::TooLong { size, limit }.at(&member.path));
        }
        let fail = |err: erofs::Error| EntryError::Image(err).at(&member.path);
        let mut file = self.image.file(member.size, attr.xattrs.encoded_len());
        let mut at = 0;
        for extent in &member.extents {
            file.hole(extent.offset - at).map_err(fail)?;
            let mut left = extent.len;
            while left > 0 {
                let bytes = archive.fill_data()?;
                let len = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                file.data(&bytes[..len]).map_err(fail)?;
                archive.consume_data(len);
                left -= len as u64;
            }
            at = extent.offset + extent.len;
            // A few stored bytes may take a whole chunk of the image.
            self.limits
                .check(archive.received(), file.image_written())?;
        }
        file.hole(member.size - at).map_err(fail)?;
        let content = file.finish().map_err(fail)?;
        self.limits
            .check(archive.received(), self.image.written())?;
        Ok(content)
    }

    /// Hides what lower layers have there, not what this layer has, in
    /// whatever order the two come.
    fn whiteout(&mut self, parent: &[&[u8]], hidden: &[u8]) -> Result<(), EntryError> {
        let parent = self.parent(parent)?;
        let Some(present) = self.tree.lookup(parent, hidden) else {
            let node = Node::CharDevice(device((0, 0))?);
            self.tree.insert(parent, hidden, Attr::default(), node)?;
            return Ok(());
        };
        if let Node::Directory { .. } = self.tree.node(present) {
            self.marks.replaces(present);
        }
        Ok(())
    }

    fn parent(&mut self, directories: &[&[u8]]) -> Result<InodeId, EntryError> {
        resolve::make(&mut self.tree, &mut self.marks, directories)
    }

    fn attr(&mut self, member: &Member) -> Result<Attr, EntryError> {
        let mut xattrs = Xattrs::default();
        for (name, value) in &member.xattrs {
            if name.starts_with(OVERLAY_XATTRS) {
                self.dropped_xattrs += 1;
                continue;
            }
            let taken = xattrs
                .push(name, value)
                .map_err(|source| EntryError::Xattr {
                    name: show(name),
                    source,
                })?;
            self.dropped_xattrs += u64::from(!taken);
        }
        Ok(Attr {
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            mtime: member.mtime,
            xattrs,
        })
    }

    pub(super) fn finish(mut self, uuid: [u8; 16]) -> Result<Built, Error> {
        self.marks
            .apply(&mut self.tree)
            .map_err(|error| match error {
                MarkError::Xattr { name, source } => {
                    let name = show(name);
                    EntryError::Xattr { name, source }.at(b"a directory")
                }
                MarkError::Tree(source) => Error::Image(source),
            })?;
        let (_, erofs_len) = self.image.finish(&self.tree, uuid).map_err(Error::Image)?;
        Ok(Built {
            erofs_len,
            dropped_xattrs: self.dropped_xattrs,
            opaque_root: self.marks.is_opaque(Tree::ROOT),
        })
    }
}

/// How overlayfs, and this tree, mark a name that hides what is below it.
pub(super) fn is_whiteout(node: &Node) -> bool {
    matches!(node, Node::CharDevice(device) if Some(*device) == Device::new(0, 0))
}

fn device((major, minor): (i64, i64)) -> Result<Device, EntryError> {
    u32::try_from(major)
        .ok()
        .zip(u32::try_from(minor).ok())
        .and_then(|(major, minor)| Device::new(major, minor))
        .ok_or(EntryError::Device { major, minor })
}
