//! Directories of a tree by path, through symbolic links, never above the
//! root.

use std::borrow::Cow;

use super::build::is_whiteout;
use super::error::EntryError;
use super::mark::{Marks, implied_directory};
use super::path::{PathError, show};
use crate::erofs::{InodeId, MAX_NAME_LEN, Node, Tree};

/// As many as Linux follows in one path (MAXSYMLINKS).
const MAX_SYMLINKS: usize = 40;

/// No path of PATH_MAX bytes has more components.
const MAX_DEPTH: u32 = 2048;

/// Where a walk stands.
struct Walk<'p> {
    at: InodeId,
    /// Components still to go, the next one last.
    left: Vec<Cow<'p, [u8]>>,
    symlinks: usize,
}

enum Step<'p> {
    /// All components are behind.
    Arrived(InodeId),
    /// There is no such name here.
    Absent(Cow<'p, [u8]>),
}

impl<'p> Walk<'p> {
    fn new(directories: &[&'p [u8]]) -> Self {
        Self {
            at: Tree::ROOT,
            left: directories
                .iter()
                .rev()
                .map(|part| Cow::Borrowed(*part))
                .collect(),
            symlinks: 0,
        }
    }

    /// Goes on as far as there are directories. A whiteout is no name.
    fn go(&mut self, tree: &Tree) -> Result<Step<'p>, EntryError> {
        while let Some(part) = self.left.pop() {
            match &part[..] {
                b"" | b"." => continue,
                b".." => {
                    if let Node::Directory { parent, .. } = tree.node(self.at) {
                        self.at = *parent;
                    }
                    continue;
                }
                name if name.len() > MAX_NAME_LEN => {
                    return Err(EntryError::Path(PathError::ComponentTooLong(name.len())));
                }
                _ => {}
            }
            let Some(next) = tree.lookup(self.at, &part) else {
                return Ok(Step::Absent(part));
            };
            match tree.node(next) {
                Node::Directory { .. } => self.at = next,
                Node::Symlink(target) => self.follow(target)?,
                node if is_whiteout(node) => return Ok(Step::Absent(part)),
                _ => {
                    return Err(EntryError::ParentNotDirectory {
                        parent: show(&part),
                    });
                }
            }
        }
        Ok(Step::Arrived(self.at))
    }

    fn follow(&mut self, target: &[u8]) -> Result<(), EntryError> {
        self.symlinks += 1;
        if self.symlinks > MAX_SYMLINKS {
            return Err(EntryError::SymlinkLoop {
                limit: MAX_SYMLINKS,
            });
        }
        if target.starts_with(b"/") {
            self.at = Tree::ROOT;
        }
        let parts = target.split(|byte| *byte == b'/').rev();
        self.left
            .extend(parts.map(|part| Cow::Owned(part.to_vec())));
        Ok(())
    }
}

/// The directory at a path; None: there is none.
pub(super) fn find(tree: &Tree, directories: &[&[u8]]) -> Result<Option<InodeId>, EntryError> {
    match Walk::new(directories).go(tree)? {
        Step::Arrived(id) => Ok(Some(id)),
        Step::Absent(_) => Ok(None),
    }
}

/// The directory at a path. What is missing of it is made, and is implied; in
/// place of a whiteout it hides what the layers below have there.
pub(super) fn make(
    tree: &mut Tree,
    marks: &mut Marks,
    directories: &[&[u8]],
) -> Result<InodeId, EntryError> {
    let mut walk = Walk::new(directories);
    loop {
        let name = match walk.go(tree)? {
            Step::Arrived(id) => return Ok(id),
            Step::Absent(name) => name,
        };
        let hides = tree.lookup(walk.at, &name).is_some();
        if let Node::Directory { depth, .. } = tree.node(walk.at)
            && *depth >= MAX_DEPTH
        {
            return Err(EntryError::TooDeep { limit: MAX_DEPTH });
        }
        walk.at = tree.insert_directory(walk.at, &name, implied_directory())?;
        if hides {
            marks.replaces(walk.at);
        } else {
            marks.is_implied(walk.at);
        }
    }
}
