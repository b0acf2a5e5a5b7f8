//! What drivers that follow the rules put into requests: what a script starts
//! from, so that it gets past the first look at a header.

pub(super) type Templates = Vec<Vec<u8>>;

/// Little-endian words of 4 bytes.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// IN, OUT, FLUSH, GET_ID; DISCARD and WRITE_ZEROES with one range.
pub(super) fn blk() -> Templates {
    let mut all: Templates = [0, 1, 4, 8].map(|kind| words(&[kind, 0, 2, 0])).into();
    for kind in [11, 13] {
        all.push(words(&[kind, 0, 0, 0, 8, 0, 8, 0]));
    }
    all
}

/// Page numbers: data, rings, none.
pub(super) fn balloon() -> Templates {
    let lists: [&[u32]; 4] = [&[70, 71, 72], &[0], &[512, 527, 528], &[u32::MAX, 255]];
    lists.map(words).into()
}

/// Frames behind a header, and a command of the control queue.
pub(super) fn net() -> Templates {
    let mut frame = vec![0; 12 + 60];
    frame[12..18].fill(0xff);
    frame[24..26].copy_from_slice(&[8, 0]);
    let mut segment = frame.clone();
    segment[..6].copy_from_slice(&[1, 1, 54, 0, 100, 0]);
    vec![frame, segment, vec![4, 0, 2, 0], vec![4, 0, 1, 0]]
}

/// Each operation on a connection from port 9 to port 8.
pub(super) fn vsock(guest_cid: u32) -> Templates {
    let packet = |op: u32, len, flags| {
        let mut all = words(&[guest_cid, 0, 2, 0, 9, 8, len, op << 16 | 1]);
        all.extend(words(&[flags, 65536, 0]));
        all.resize(44 + len as usize, 7);
        all
    };
    let mut all: Templates = (1..=7).map(|op| packet(op, 0, 0)).collect();
    all.extend([packet(5, 20, 0), packet(4, 0, 1), packet(4, 0, 3)]);
    all
}

/// FUSE requests on the root and on what it may have been looked up to.
pub(super) fn fs() -> Templates {
    let request = |opcode: u32, node: u32, body: &[u8]| {
        let len = 40 + body.len() as u32;
        let mut all = words(&[len, opcode, 1, 0, node, 0, 0, 0, 0, 0]);
        all.extend(body);
        all
    };
    let mut all = vec![
        request(26, 0, &words(&[7, 38, 1 << 20, 1 << 27])),
        request(2, 2, &words(&[1, 0])),
    ];
    for name in ["file", "dir", "link", "new", ".."] {
        let name = [name.as_bytes(), b"\0"].concat();
        all.push(request(1, 1, &name));
        all.push(request(10, 1, &name));
        all.push(request(9, 1, &[words(&[0o755, 0]), name.clone()].concat()));
        let create = words(&[0o102, 0o644, 0, 0]);
        all.push(request(35, 1, &[create, name].concat()));
    }
    for opcode in [3, 5, 14, 27] {
        all.push(request(opcode, 2, &words(&[0, 0, 0, 0])));
    }
    for opcode in [15, 16, 28, 44] {
        all.push(request(
            opcode,
            1,
            &words(&[0, 0, 0, 0, 4096, 0, 0, 0, 0, 0]),
        ));
    }
    all
}
