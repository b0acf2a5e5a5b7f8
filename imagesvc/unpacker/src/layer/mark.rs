//! What a layer's image says of its directories beside their attributes, as
//! extended attributes: for overlayfs which ones hide what is below them, for
//! [`super::inherit`] which ones no member describes.

use std::collections::{BTreeMap, BTreeSet};

use crate::erofs::{self, Attr, InodeId, Node, Tree, XattrError};

/// overlayfs's own attributes: from an archive they could redirect a lookup
/// to another part of a lower layer.
pub(super) const OVERLAY_XATTRS: &[u8] = b"trusted.overlay.";

type Xattr = (&'static [u8], &'static [u8]);

const OPAQUE: Xattr = (b"trusted.overlay.opaque", b"y");

/// Named as overlayfs's own, which no container sees and no copy in its
/// writable layer gets; overlayfs gives no meaning to this one.
const IMPLIED_NAME: &[u8] = b"trusted.overlay.drupe.implied";
const IMPLIED: Xattr = (IMPLIED_NAME, b"y");
/// There is such a directory further down.
const IMPLIED_BELOW: Xattr = (IMPLIED_NAME, b"below");

/// Of the directories that no member describes, in no layer.
pub(super) fn implied_directory() -> Attr {
    Attr {
        mode: 0o755,
        ..Attr::default()
    }
}

/// The directories of a tree that get a mark.
#[derive(Default)]
pub(super) struct Marks {
    opaque: BTreeSet<InodeId>,
    implied: BTreeSet<InodeId>,
}

impl Marks {
    /// Nothing that lower layers have in the directory shows; it may still be
    /// the same directory.
    pub(super) fn hides_content(&mut self, id: InodeId) {
        self.opaque.insert(id);
    }

    /// It is another directory than a lower layer's of the same name.
    pub(super) fn replaces(&mut self, id: InodeId) {
        self.opaque.insert(id);
        self.implied.remove(&id);
    }

    /// It is there only because something is in it.
    pub(super) fn is_implied(&mut self, id: InodeId) {
        self.implied.insert(id);
    }

    /// A member describes it.
    pub(super) fn is_described(&mut self, id: InodeId) {
        self.implied.remove(&id);
    }

    pub(super) fn is_opaque(&self, id: InodeId) -> bool {
        self.opaque.contains(&id)
    }

    /// Writes the marks into the attributes of `tree`.
    pub(super) fn apply(&self, tree: &mut Tree) -> Result<(), MarkError> {
        let mut implied = BTreeMap::new();
        for id in &self.implied {
            implied.insert(*id, IMPLIED);
            let mut at = *id;
            while let Node::Directory { parent, .. } = tree.node(at)
                && *parent != at
                && !implied.contains_key(parent)
            {
                at = *parent;
                implied.insert(at, IMPLIED_BELOW);
            }
        }
        let opaque = self.opaque.iter().map(|id| (*id, OPAQUE));
        for (id, (name, value)) in opaque.chain(implied) {
            let mut attr = tree.attr(id).clone();
            let pushed = attr.xattrs.push(name, value);
            pushed.map_err(|source| MarkError::Xattr { name, source })?;
            tree.set_directory_attr(id, attr)?;
        }
        Ok(())
    }
}

#[derive(Debug)]
pub(super) enum MarkError {
    Xattr {
        name: &'static [u8],
        source: XattrError,
    },
    Tree(erofs::Error),
}

impl From<erofs::Error> for MarkError {
    fn from(source: erofs::Error) -> Self {
        Self::Tree(source)
    }
}

/// The marks of one directory, read back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marked {
    pub(super) opaque: bool,
    pub(super) implied: bool,
    /// It or a directory further down is implied.
    pub(super) has_implied: bool,
}

impl Marked {
    pub(super) fn of(directory: &erofs::Directory) -> Self {
        let has = |mark: Xattr| {
            let mut xattrs = directory.xattrs.iter();
            xattrs.any(|(name, value)| (&name[..], &value[..]) == mark)
        };
        Self {
            opaque: has(OPAQUE),
            implied: has(IMPLIED),
            has_implied: has(IMPLIED) || has(IMPLIED_BELOW),
        }
    }
}
