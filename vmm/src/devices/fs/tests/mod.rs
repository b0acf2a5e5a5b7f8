//! The device as a guest's FUSE driver sees it, on real directories.

mod credentials;
mod files;
mod guest;
mod hostile;
mod tmpfs;

use std::fs;

use super::*;

#[test]
fn the_config_space_is_tag_and_queue_count() {
    let dir = tempfile::tempdir().unwrap();
    let fs = Fs::new(dir.path(), "shared").unwrap();
    let mut config = [0xff; 44];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..7], b"shared\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_root_or_tag_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for tag in ["", "a\0b", &"t".repeat(37)] {
        assert!(matches!(Fs::new(dir.path(), tag), Err(FsError::Tag(_))));
    }
    let missing = dir.path().join("missing");
    let error = Fs::new(&missing, "shared").err().unwrap();
    assert!(error.to_string().contains("missing"), "{error}");
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(
        Fs::new(&file, "shared"),
        Err(FsError::Root { .. })
    ));
}
