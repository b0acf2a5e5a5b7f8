//! What drivers that follow the rules put into requests: what a script starts
//! from, so that it gets past the first look at a header.

#[derive(Default)]
pub(super) struct Templates {
    /// What a driver says first, on its last queue, for anything else to be
    /// understood.
    pub(super) hello: Option<Vec<u8>>,
    pub(super) requests: Vec<Vec<u8>>,
}

impl From<Vec<Vec<u8>>> for Templates {
    fn from(requests: Vec<Vec<u8>>) -> Self {
        Self {
            hello: None,
            requests,
        }
    }
}

/// Little-endian words of 4 bytes.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// IN, OUT, FLUSH, GET_ID; DISCARD and WRITE_ZEROES with one range.
pub(super) fn blk() -> Templates {
    let mut all = [0, 1, 4, 8].map(|kind| words(&[kind, 0, 2, 0])).to_vec();
    for kind in [11, 13] {
        all.push(words(&[kind, 0, 0, 0, 8, 0, 8, 0]));
    }
    all.into()
}

/// Page numbers: data, rings, none.
pub(super) fn balloon() -> Templates {
    let lists: [&[u32]; 4] = [&[70, 71, 72], &[0], &[512, 527, 528], &[u32::MAX, 255]];
    lists.map(words).to_vec().into()
}

/// Frames behind a header, and a command of the control queue.
pub(super) fn net() -> Templates {
    let mut frame = vec![0; 12 + 60];
    frame[12..18].fill(0xff);
    frame[24..26].copy_from_slice(&[8, 0]);
    let mut segment = frame.clone();
    segment[..6].copy_from_slice(&[1, 1, 54, 0, 100, 0]);
    vec![frame, segment, vec![4, 0, 2, 0], vec![4, 0, 1, 0]].into()
}

/// Each operation on a connection from port 9 to port 8.
pub(super) fn vsock(guest_cid: u32) -> Templates {
    let packet = |op: u32, len, flags| {
        let mut all = words(&[guest_cid, 0, 2, 0, 9, 8, len, op << 16 | 1]);
        all.extend(words(&[flags, 65536, 0]));
        all.resize(44 + len as usize, 7);
        all
    };
    let mut all: Vec<_> = (1..=7).map(|op| packet(op, 0, 0)).collect();
    all.extend([packet(5, 20, 0), packet(4, 0, 1), packet(4, 0, 3)]);
    all.into()
}

/// FUSE requests on the root and on what it may have been looked up to.
pub(super) fn fs() -> Templates {
    let request = |opcode: u32, node: u32, body: &[u8]| {
        let len = 40 + body.len() as u32;
        let mut all = words(&[len, opcode, 1, 0, node, 0, 0, 0, 0, 0]);
        all.extend(body);
        all
    };
    let init = request(26, 0, &words(&[7, 38, 1 << 20, 1 << 27]));
    let mut all = vec![init.clone(), request(2, 2, &words(&[1, 0]))];
    let names = [
        "file",
        "dir",
        "new",
        "..",
        "",
        "../new",
        "../beside/file",
        "/tmp/new",
        "link/file",
    ];
    for name in names {
        let name = [name.as_bytes(), b"\0"].concat();
        // LOOKUP, UNLINK, RMDIR; SYMLINK, MKDIR, LINK, CREATE.
        for opcode in [1, 10, 11] {
            all.push(request(opcode, 1, &name));
        }
        all.push(request(6, 1, &[&name[..], b"../beside\0"].concat()));
        let after = |fixed: &[u32]| [words(fixed), name.clone()].concat();
        all.push(request(9, 1, &after(&[0o755, 0])));
        all.push(request(13, 1, &after(&[2, 0])));
        all.push(request(35, 1, &after(&[0o102, 0o644, 0, 0])));
        // MKNOD of a FIFO, a whiteout, a terminal and a disk.
        for (mode, device) in [
            (0o010_644, 0),
            (0o020_644, 0),
            (0o020_666, 0x500),
            (0o060_666, 0x800),
        ] {
            all.push(request(8, 1, &after(&[mode, device, 0, 0])));
        }
        // RENAME and RENAME2, from and to it, the latter to exchange as well.
        let pairs = [
            [&name[..], b"moved\0"].concat(),
            [b"file\0", &name[..]].concat(),
        ];
        for pair in pairs {
            all.push(request(12, 1, &[words(&[1, 0]), pair.clone()].concat()));
            for flags in [0, 2] {
                let fixed = words(&[1, 0, flags, 0]);
                all.push(request(45, 1, &[fixed, pair.clone()].concat()));
            }
        }
    }
    // SETXATTR and REMOVEXATTR; IOCTL and TMPFILE, which are not known.
    all.push(request(
        21,
        2,
        &[words(&[1, 0]), b"user.name\0x".to_vec()].concat(),
    ));
    all.push(request(24, 2, b"user.name\0"));
    all.push(request(39, 2, &words(&[0, 0, 0, 0, 0, 0, 16, 16])));
    all.push(request(
        51,
        1,
        &[words(&[0o102, 0o644, 0, 0]), b"/\0".to_vec()].concat(),
    ));
    for opcode in [3, 5, 14, 27] {
        all.push(request(opcode, 2, &words(&[0, 0, 0, 0])));
    }
    // READ and WRITE are most of what a guest asks for; READDIR, READDIRPLUS.
    for opcode in [[15; 12], [16; 12]].as_flattened().iter().chain(&[28, 44]) {
        let body = words(&[0, 0, 0, 0, 4096, 0, 0, 0, 0, 0]);
        all.push(request(*opcode, 1, &body));
    }
    Templates {
        hello: Some(init),
        requests: all,
    }
}
