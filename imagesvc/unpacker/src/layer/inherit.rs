//! Directories that a layer has but does not describe.
//!
//! An archive may hold `tmp/x` without `tmp`. Unpacked onto the layers below,
//! `tmp` stays what it was; in an overlay of images it takes the attributes of
//! the highest layer that has it. So an image with such directories gets one
//! more layer on top, which holds them alone, each with the attributes that
//! the nearest layer gave it which describes it:
//!
//! ```text
//! restored    tmp 1777
//! layer 2     tmp (implied, 0755), tmp/x
//! layer 1     tmp 1777
//! ```
//!
//! Where a layer in between hides the directory (a whiteout, another kind of
//! file, an opaque directory above it) nothing is inherited from below. An
//! opaque directory itself is emptied, not replaced: it does inherit. The root
//! is left alone: what a container sees there is the writable layer's.

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::io::{Read, Seek, Write};

use unpacker_client::{LimitError, Limits};

use super::error::{EntryError, Error};
use super::mark::{Marked, OVERLAY_XATTRS, implied_directory};
use super::path::show;
use crate::erofs::{Attr, Budget, InodeId, Nid, Reader, Tree, Writer, Xattrs};

/// The directories that an image's layers, stacked, show with the wrong
/// attributes: a layer to be put on top.
#[derive(Debug)]
pub struct Restored {
    tree: Tree,
    limits: Limits,
}

impl Restored {
    /// Of the images of `layers`, lowest first. None: no directory needs it.
    ///
    /// # Errors
    /// An image cannot be read, or the layers are beyond `limits`.
    pub fn of<R: Read + Seek>(layers: Vec<R>, limits: &Limits) -> Result<Option<Self>, Error> {
        let open = |image| Reader::open(image).map_err(Error::Converted);
        let stack = Stack {
            layers: layers.into_iter().map(open).collect::<Result<_, _>>()?,
            limits: *limits,
            looked_at: 0,
        };
        let tree = stack.walk()?;
        Ok(tree.map(|tree| Self {
            tree,
            limits: *limits,
        }))
    }

    /// Writes the layer's image to `out`, which is empty; gives its length.
    ///
    /// # Errors
    /// `out` cannot be written.
    pub fn write(&self, uuid: [u8; 16], out: impl Write + Seek) -> Result<u64, Error> {
        let writer = Writer::new(out, &Budget::from(&self.limits)).map_err(Error::Image)?;
        let (_, len) = writer.finish(&self.tree, uuid).map_err(Error::Image)?;
        Ok(len)
    }
}

/// Layers, lowest first.
struct Stack<R> {
    layers: Vec<Reader<R>>,
    limits: Limits,
    looked_at: u64,
}

/// One layer's part of a directory.
#[derive(Clone, Copy, Debug)]
struct Part {
    layer: usize,
    nid: Nid,
    marked: Marked,
}

/// A directory that several layers have.
struct Merged {
    name: Box<[u8]>,
    /// Highest layer first.
    parts: Vec<Part>,
    /// In the tree of what is restored.
    made: Option<InodeId>,
}

impl Merged {
    /// The part whose attributes the directory has; None: no layer gives any.
    fn origin(&self) -> Option<Part> {
        self.parts.iter().copied().find(|part| !part.marked.implied)
    }

    /// The parts whose content shows.
    fn shown(&self) -> &[Part] {
        let opaque = self.parts.iter().position(|part| part.marked.opaque);
        let count = opaque.map_or(self.parts.len(), |lowest| lowest + 1);
        &self.parts[..count]
    }
}

/// A step of the way from the root.
struct Step {
    directory: Merged,
    left: std::vec::IntoIter<Merged>,
}

impl<R: Read + Seek> Stack<R> {
    /// Goes through the directories that several layers have and at least one
    /// of them implies, or has an implied one below.
    fn walk(mut self) -> Result<Option<Tree>, Error> {
        let mut root = Merged {
            name: Box::default(),
            parts: Vec::with_capacity(self.layers.len()),
            made: Some(Tree::ROOT),
        };
        for layer in (0..self.layers.len()).rev() {
            let nid = self.layers[layer].root();
            root.parts.push(self.part(layer, nid)?);
        }
        let mut tree = None;
        let left = self.children(&root)?.into_iter();
        let mut way = vec![Step {
            directory: root,
            left,
        }];
        while let Some(step) = way.last_mut() {
            let Some(directory) = step.left.next() else {
                way.pop();
                continue;
            };
            let wrong = self.shows_wrong(&directory)?;
            let left = self.children(&directory)?.into_iter();
            way.push(Step { directory, left });
            if wrong {
                self.restore(&mut tree, &mut way)?;
            }
        }
        Ok(tree)
    }

    /// The subdirectories worth a look.
    fn children(&mut self, directory: &Merged) -> Result<Vec<Merged>, Error> {
        // What only the lowest part has inherits from nobody.
        let Some((_, upper)) = directory.shown().split_last() else {
            return Ok(Vec::new());
        };
        let mut found: BTreeMap<Box<[u8]>, Candidate> = BTreeMap::new();
        for part in upper.iter().filter(|part| part.marked.has_implied) {
            for (name, nid, is_directory) in self.names(*part, |_| true)? {
                if is_directory
                    && let btree_map::Entry::Vacant(slot) = found.entry(name)
                    && self.part(part.layer, nid)?.marked.has_implied
                {
                    self.count()?;
                    slot.insert(Candidate::default());
                }
            }
        }
        if found.is_empty() {
            return Ok(Vec::new());
        }
        for part in directory.shown() {
            for (name, nid, is_directory) in self.names(*part, |name| found.contains_key(name))? {
                let Some(candidate) = found.get_mut(&name) else {
                    continue;
                };
                if candidate.hidden_below {
                    continue;
                }
                if is_directory {
                    self.count()?;
                    candidate.parts.push(self.part(part.layer, nid)?);
                } else {
                    candidate.hidden_below = true;
                }
            }
        }
        let merged = found.into_iter().map(|(name, candidate)| Merged {
            name,
            parts: candidate.parts,
            made: None,
        });
        Ok(merged.filter(|merged| merged.parts.len() > 1).collect())
    }

    /// Whether an overlay of the layers shows other attributes than it should.
    fn shows_wrong(&mut self, directory: &Merged) -> Result<bool, Error> {
        let shown_is_implied = directory.parts.first().is_some_and(|p| p.marked.implied);
        match directory.origin() {
            Some(origin) if shown_is_implied => {
                Ok(self.attr(origin, &directory.name)? != implied_directory())
            }
            _ => Ok(false),
        }
    }

    /// Makes the last directory of `way` in `tree`, and those that lead there:
    /// they will be seen too.
    fn restore(&mut self, tree: &mut Option<Tree>, way: &mut [Step]) -> Result<(), Error> {
        let mut parent = Tree::ROOT;
        for step in way {
            let directory = &mut step.directory;
            if let (Some(made), Some(_)) = (directory.made, &tree) {
                parent = made;
                continue;
            }
            let attr = match directory.origin() {
                Some(origin) => self.attr(origin, &directory.name)?,
                None => implied_directory(),
            };
            match tree {
                None => *tree = Some(Tree::new(attr, Budget::from(&self.limits))),
                Some(tree) => {
                    parent = tree
                        .insert_directory(parent, &directory.name, attr)
                        .map_err(Error::Image)?;
                    directory.made = Some(parent);
                }
            }
        }
        Ok(())
    }

    fn part(&mut self, layer: usize, nid: Nid) -> Result<Part, Error> {
        let directory = self.layers[layer].directory(nid);
        let marked = Marked::of(&directory.map_err(Error::Converted)?);
        Ok(Part { layer, nid, marked })
    }

    /// The attributes of a part, without overlayfs's own.
    fn attr(&mut self, part: Part, name: &[u8]) -> Result<Attr, Error> {
        let directory = self.layers[part.layer].directory(part.nid);
        let directory = directory.map_err(Error::Converted)?;
        let mut xattrs = Xattrs::default();
        for (key, value) in &directory.xattrs {
            if !key.starts_with(OVERLAY_XATTRS) {
                xattrs.push(key, value).map_err(|source| {
                    let key = show(key);
                    EntryError::Xattr { name: key, source }.at(name)
                })?;
            }
        }
        Ok(Attr {
            mode: directory.mode,
            uid: directory.uid,
            gid: directory.gid,
            mtime: directory.mtime,
            xattrs,
        })
    }

    /// What a part has, of the names that are `wanted`.
    fn names(&mut self, part: Part, wanted: impl Fn(&[u8]) -> bool) -> Result<Names, Error> {
        let reader = &mut self.layers[part.layer];
        let mut names = Vec::new();
        let directory = reader.directory(part.nid).map_err(Error::Converted)?;
        let listed = reader.entries(&directory, |entry| {
            if wanted(entry.name) {
                names.push((entry.name.into(), entry.nid, entry.is_directory));
            }
        });
        listed.map_err(Error::Converted)?;
        Ok(names)
    }

    /// Bounds memory: a hostile image has a million of them in every layer.
    fn count(&mut self) -> Result<(), LimitError> {
        self.looked_at += 1;
        let limit = self.limits.max_entries;
        if self.looked_at > limit {
            return Err(LimitError::TooManyImplied { limit });
        }
        Ok(())
    }
}

/// Name, inode, and whether it is a directory.
type Names = Vec<(Box<[u8]>, Nid, bool)>;

#[derive(Default)]
struct Candidate {
    /// Highest layer first.
    parts: Vec<Part>,
    /// What lower layers have of that name is not this directory.
    hidden_below: bool,
}
