//! The writer by itself; what the kernel makes of its images is tested with
//! the layers that become them.

use std::io::Cursor;

use super::*;

const BUDGET: Budget = Budget {
    max_image_bytes: 1 << 30,
    max_entries: 1000,
    max_metadata_bytes: 1 << 20,
    max_tail_bytes: 1 << 16,
};

fn writer() -> Writer<Cursor<Vec<u8>>> {
    Writer::new(Cursor::new(Vec::new()), &BUDGET).unwrap()
}

#[test]
fn a_file_takes_exactly_its_size() {
    let mut image = writer();
    let mut file = image.file(10, 0);
    assert!(matches!(
        file.data(&[0; 11]),
        Err(Error::WrongSize {
            expected: 10,
            given: 11
        })
    ));
    file.data(&[1; 4]).unwrap();
    assert!(matches!(file.hole(7), Err(Error::WrongSize { .. })));
    assert!(matches!(
        file.hole(u64::MAX),
        Err(Error::WrongSize {
            given: u64::MAX,
            ..
        })
    ));
    assert!(matches!(
        file.finish(),
        Err(Error::WrongSize {
            expected: 10,
            given: 4
        })
    ));
}

#[test]
fn an_image_stays_within_its_budget() {
    let mut image = Writer::new(
        Cursor::new(Vec::new()),
        &Budget {
            max_image_bytes: 3 * BLOCK,
            ..BUDGET
        },
    )
    .unwrap();
    let mut file = image.file(4 * BLOCK, 0);
    file.data(&[1; 2 * BLOCK_SIZE]).unwrap();
    assert!(matches!(file.data(&[1]), Err(Error::ImageTooLarge { limit }) if limit == 3 * BLOCK));
}

#[test]
fn small_files_and_zeros_take_no_blocks() {
    let mut image = writer();
    let before = image.written();
    for size in [0, 1, 2048] {
        let mut file = image.file(size, 0);
        file.data(&vec![1; size as usize]).unwrap();
        file.finish().unwrap();
    }
    let mut file = image.file(10 << 20, 0);
    file.data(&vec![0; 5 << 20]).unwrap();
    file.hole(5 << 20).unwrap();
    file.finish().unwrap();
    assert_eq!(image.written(), before);
    let mut file = image.file(2049, 0);
    file.data(&[1; 2049]).unwrap();
    file.finish().unwrap();
    assert_eq!(image.written(), before + BLOCK);
}

#[test]
fn sockets_and_the_uuid_are_written() {
    let mut tree = Tree::new(Attr::default(), BUDGET);
    tree.insert(Tree::ROOT, b"socket", Attr::default(), Node::Socket)
        .unwrap();
    let uuid = *b"0123456789abcdef";
    let (out, len) = writer().finish(&tree, uuid).unwrap();
    let image = out.into_inner();
    assert_eq!(image.len() as u64, len);
    assert_eq!(&image[1024 + 48..1024 + 64], &uuid);
    assert_eq!(
        u64::from_le_bytes(image[1024 + 16..1024 + 24].try_into().unwrap()),
        2
    );
}

#[test]
fn only_directories_have_children() {
    let mut tree = Tree::new(Attr::default(), BUDGET);
    let fifo = tree
        .insert(Tree::ROOT, b"fifo", Attr::default(), Node::Fifo)
        .unwrap();
    assert!(matches!(
        tree.insert_directory(fifo, b"x", Attr::default()),
        Err(Error::NotADirectory(1))
    ));
    assert!(matches!(
        tree.link(fifo, b"x", fifo),
        Err(Error::NotADirectory(1))
    ));
    assert!(matches!(
        tree.set_directory_attr(fifo, Attr::default()),
        Err(Error::NotADirectory(1))
    ));
}
