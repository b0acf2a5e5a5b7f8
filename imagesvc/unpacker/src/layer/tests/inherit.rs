//! Directories that some layers have but do not describe: what a stack of
//! images shows against archives unpacked one after another onto one tree.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;

use proptest::prelude::*;

use super::support::{Overlay, Tar, image_of};
use crate::erofs::{Directory, Nid, Reader, Timestamp};
use crate::layer::{Limits, Restored};

type Path = Vec<&'static str>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
    Whiteout,
    Opaque,
}

#[derive(Clone, Debug)]
struct Member {
    kind: Kind,
    path: Path,
}

/// What tells one description of a directory from all others.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Described {
    mode: u16,
    owner: u32,
    seconds: i64,
    xattr: Option<Vec<u8>>,
}

impl Described {
    /// By member number `number` of the whole stack.
    fn by(number: u32) -> Self {
        Self {
            mode: 0o1700 + (number % 0o100) as u16,
            owner: 1000 + number,
            seconds: i64::from(number),
            xattr: Some(number.to_string().into_bytes()),
        }
    }

    fn by_nobody() -> Self {
        Self {
            mode: 0o755,
            owner: 0,
            seconds: 0,
            xattr: None,
        }
    }

    fn of(directory: &Directory) -> Self {
        assert_eq!(directory.uid, directory.gid);
        let Timestamp { seconds, nanos } = directory.mtime;
        assert_eq!(nanos, 0);
        let xattr = |(name, value): &(Vec<u8>, Vec<u8>)| (name == b"user.n").then(|| value.clone());
        Self {
            mode: directory.mode,
            owner: directory.uid,
            seconds,
            xattr: directory.xattrs.iter().find_map(xattr),
        }
    }
}

/// The members that make a valid layer: no path through a file.
fn valid(members: Vec<Member>) -> Vec<Member> {
    let mut directories = BTreeSet::from([Path::new()]);
    let mut files = BTreeSet::new();
    let mut kept = Vec::new();
    for member in members {
        let path = &member.path;
        let mut parents = (0..path.len()).map(|len| path[..len].to_vec());
        let fits = match member.kind {
            Kind::Directory | Kind::Opaque => !files.contains(path),
            Kind::File | Kind::Whiteout if path.is_empty() => false,
            Kind::File => !directories.contains(path),
            Kind::Whiteout => true,
        };
        if !fits || parents.any(|parent| files.contains(&parent)) {
            continue;
        }
        directories.extend((0..path.len()).map(|len| path[..len].to_vec()));
        match member.kind {
            Kind::Directory | Kind::Opaque => {
                directories.insert(path.clone());
            }
            Kind::File => {
                files.insert(path.clone());
            }
            Kind::Whiteout => {}
        }
        kept.push(member);
    }
    kept
}

fn archive(members: &[Member], first: u32) -> Vec<u8> {
    let mut tar = Tar::default();
    for (number, member) in (first..).zip(members) {
        let (parent, name) = match member.path.split_last() {
            Some((name, parent)) => (parent.to_vec(), *name),
            None => (Path::new(), "."),
        };
        let inside = |name: &str| [&parent.join("/"), name].join("/");
        match member.kind {
            Kind::Directory => {
                let described = Described::by(number);
                let xattr = described.xattr.unwrap();
                tar.pax(&[(b"SCHILY.xattr.user.n", &xattr)]);
                tar.member_with(b'5', inside(name).as_bytes(), b"", b"", |header| {
                    header.set_mode(described.mode.into());
                    header.set_uid(described.owner.into());
                    header.set_gid(described.owner.into());
                    header.set_mtime(described.seconds as u64);
                })
            }
            Kind::File => tar.file(&inside(name), b"x"),
            Kind::Whiteout => tar.file(&inside(&format!(".wh.{name}")), b""),
            Kind::Opaque => tar.file(&format!("{}/.wh..wh..opq", member.path.join("/")), b""),
        };
    }
    tar.finish()
}

/// A tree onto which archives are unpacked; None: no directory.
#[derive(Default)]
struct Model(BTreeMap<Path, Option<Described>>);

impl Model {
    fn unpack(&mut self, members: &[Member], first: u32) {
        // Whiteouts hide what is below, wherever in the archive they are.
        for member in members {
            let hidden = |path: &Path| match member.kind {
                Kind::Whiteout => path.starts_with(&member.path),
                Kind::Opaque => path.len() > member.path.len() && path.starts_with(&member.path),
                Kind::Directory | Kind::File => false,
            };
            self.0.retain(|path, _| !hidden(path));
        }
        for (number, member) in (first..).zip(members) {
            let path = &member.path;
            let parents = match member.kind {
                Kind::Opaque => path.len(),
                _ => path.len().saturating_sub(1),
            };
            for len in 1..=parents {
                self.directory(&path[..len]);
            }
            match member.kind {
                Kind::Directory => {
                    self.directory(path);
                    self.0.insert(path.clone(), Some(Described::by(number)));
                }
                Kind::File => {
                    self.0.retain(|other, _| !other.starts_with(path));
                    self.0.insert(path.clone(), None);
                }
                Kind::Whiteout | Kind::Opaque => {}
            }
        }
    }

    fn directory(&mut self, path: &[&'static str]) {
        let there = self.0.entry(path.to_vec()).or_default();
        there.get_or_insert_with(Described::by_nobody);
    }

    /// All but the root, which belongs to the writable layer.
    fn directories(self) -> BTreeMap<String, Described> {
        let paths = self.0.into_iter().filter(|(path, _)| !path.is_empty());
        paths
            .filter_map(|(path, described)| Some((path.join("/"), described?)))
            .collect()
    }
}

/// What overlayfs shows of images, lowest first.
fn shown(images: &[Vec<u8>]) -> BTreeMap<String, Described> {
    let mut readers: Vec<_> = images
        .iter()
        .map(|image| Reader::open(Cursor::new(&image[..])).unwrap())
        .collect();
    let root = readers.iter().map(Reader::root).enumerate().rev().collect();
    let mut found = BTreeMap::new();
    show(&mut readers, "", root, &mut found);
    found
}

fn show(
    readers: &mut [Reader<Cursor<&[u8]>>],
    path: &str,
    parts: Vec<(usize, Nid)>,
    found: &mut BTreeMap<String, Described>,
) {
    let mut children: BTreeMap<String, (Vec<(usize, Nid)>, bool)> = BTreeMap::new();
    for (index, (layer, nid)) in parts.into_iter().enumerate() {
        let directory = readers[layer].directory(nid).unwrap();
        if index == 0 && !path.is_empty() {
            found.insert(path.to_owned(), Described::of(&directory));
        }
        let taken = readers[layer].entries(&directory, |entry| {
            let name = String::from_utf8(entry.name.to_vec()).unwrap();
            let (parts, closed) = children.entry(name).or_default();
            if !*closed && entry.is_directory {
                parts.push((layer, entry.nid));
            }
            *closed |= !entry.is_directory;
        });
        taken.unwrap();
        let opaque = (b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
        if directory.xattrs.contains(&opaque) {
            break;
        }
    }
    for (name, (parts, _)) in children {
        if !parts.is_empty() {
            let path = [path, &name].join(if path.is_empty() { "" } else { "/" });
            show(readers, &path, parts, found);
        }
    }
}

fn restored(images: &[Vec<u8>], limits: &Limits) -> Result<Option<Vec<u8>>, super::super::Error> {
    let layers = images.iter().map(|image| Cursor::new(&image[..])).collect();
    let Some(restored) = Restored::of(layers, limits)? else {
        return Ok(None);
    };
    let mut out = Cursor::new(Vec::new());
    let len = restored.write([7; 16], &mut out)?;
    assert_eq!(out.get_ref().len() as u64, len);
    Ok(Some(out.into_inner()))
}

fn members() -> impl Strategy<Value = Vec<Member>> {
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    let kind = prop_oneof![
        4 => Just(Kind::Directory),
        6 => Just(Kind::File),
        1 => Just(Kind::Whiteout),
        1 => Just(Kind::Opaque),
    ];
    let member =
        (kind, prop::collection::vec(name(), 0..5)).prop_map(|(kind, path)| Member { kind, path });
    prop::collection::vec(member, 0..8).prop_map(valid)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a_stack_shows_what_unpacking_leaves(
        layers in prop::collection::vec(members(), 1..6)
    ) {
        let mut model = Model::default();
        let mut images = Vec::new();
        let mut first = 1;
        for members in &layers {
            model.unpack(members, first);
            images.push(image_of(&archive(members, first)).unwrap().0);
            first += members.len() as u32;
        }
        let expected = model.directories();
        let plain = shown(&images);
        match restored(&images, &Limits::default()).unwrap() {
            None => prop_assert_eq!(plain, expected),
            Some(top) => {
                // It is made only where it changes something.
                prop_assert_ne!(plain, expected.clone());
                images.push(top);
                prop_assert_eq!(shown(&images), expected);
            }
        }
    }
}

fn described(tar: &mut Tar, path: &str, mode: u32, owner: u64) {
    tar.pax(&[(b"SCHILY.xattr.user.n", b"kept")]);
    tar.member_with(b'5', path.as_bytes(), b"", b"", |header| {
        header.set_mode(mode);
        header.set_uid(owner);
    });
}

fn image(tar: &Tar) -> Vec<u8> {
    image_of(&tar.finish()).unwrap().0
}

#[test]
fn the_kernel_shows_a_restored_directory_and_no_mark() {
    let (mut base, mut middle, mut top) = (Tar::default(), Tar::default(), Tar::default());
    described(&mut base, "tmp", 0o1777, 0);
    base.file("tmp/low", b"low");
    described(&mut base, "home", 0o755, 0);
    described(&mut base, "home/me", 0o700, 1000);
    described(&mut middle, "home", 0o711, 7);
    middle.file("tmp/middle", b"middle");
    top.file("tmp/high", b"high").file("home/me/note", b"note");
    let mut images = vec![image(&base), image(&middle), image(&top)];
    images.push(restored(&images, &Limits::default()).unwrap().unwrap());
    images.reverse();

    let overlay = Overlay::of_images(&images);
    assert_eq!(overlay.names("tmp"), ["high", "low", "middle"]);
    assert_eq!(overlay.read("home/me/note"), b"note");
    for (path, mode, owner) in [
        ("tmp", 0o41777, 0),
        ("home", 0o40711, 7),
        ("home/me", 0o40700, 1000),
    ] {
        let stat = overlay.stat(path);
        assert_eq!((stat.mode, stat.uid), (mode, owner), "{path}");
        assert_eq!(stat.mtime, (1_600_000_000, 0), "{path}");
        assert_eq!(stat.xattr("user.n"), Some(&b"kept"[..]), "{path}");
        assert_eq!(stat.xattrs.len(), 1, "{path}: {:?}", stat.xattrs);
    }
}

#[test]
fn layers_that_describe_their_directories_need_nothing() {
    let (mut base, mut top) = (Tar::default(), Tar::default());
    described(&mut base, "tmp", 0o1777, 0);
    base.file("implied/low", b"");
    described(&mut top, "tmp", 0o700, 0);
    top.file("tmp/x", b"").file("implied/high", b"");
    top.file("new/x", b"");
    let images = [image(&base), image(&top)];
    assert_eq!(restored(&images, &Limits::default()).unwrap(), None);
    assert_eq!(restored(&images[..1], &Limits::default()).unwrap(), None);
    assert_eq!(restored(&[], &Limits::default()).unwrap(), None);
}

#[test]
fn what_is_looked_at_is_bounded() {
    let (mut base, mut top) = (Tar::default(), Tar::default());
    for number in 0..100 {
        described(&mut base, &format!("d{number}"), 0o700, 0);
        top.file(&format!("d{number}/x"), b"");
    }
    let images = [image(&base), image(&top)];
    let limits = |max_entries| Limits {
        max_entries,
        ..Limits::default()
    };
    assert!(restored(&images, &limits(300)).unwrap().is_some());
    let error = restored(&images, &limits(299)).unwrap_err();
    assert!(error.to_string().contains("more than 299"), "{error}");
}

#[test]
fn a_damaged_image_is_an_error() {
    let mut base = Tar::default();
    base.dir("tmp");
    let mut bytes = image(&base);
    bytes[1024] ^= 1;
    let images = [image(&base), bytes];
    let error = restored(&images, &Limits::default()).unwrap_err();
    assert!(
        super::support::message(&error).contains("no superblock"),
        "{error}"
    );
}
