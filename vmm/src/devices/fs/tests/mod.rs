//! The device as a guest's FUSE driver sees it, on real directories.

mod credentials;
mod files;
mod guest;
mod hostile;
mod names;
mod race;
mod tmpfs;

use super::*;
use crate::files::on_thread;

#[test]
fn the_config_space_is_tag_and_queue_count() {
    let dir = tempfile::tempdir().unwrap();
    let fs = Fs::new(on_thread::start(dir.path(), None, || {}).unwrap(), "shared").unwrap();
    let mut config = [0xff; 44];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..7], b"shared\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_tag_that_cannot_be_is_an_error() {
    for tag in ["", "a\0b", &"t".repeat(37)] {
        let (channel, _files) = channel::pair().unwrap();
        assert!(matches!(Fs::new(channel, tag), Err(FsError::Tag(_))));
    }
}
