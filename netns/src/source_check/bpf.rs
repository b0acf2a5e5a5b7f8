//! Classic BPF (Documentation/networking/filter.rst of the kernel), put
//! together instruction by instruction: an accumulator A, an index X, loads
//! from the frame, and jumps that lead forward only.
//!
//! The kernel checks a program before it takes it, and ends one that reads
//! beyond the frame with 0, which here means that the frame does not match.

/// What a load reads. Multi-byte values are in network byte order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Size {
    Byte,
    Half,
    Word,
}

/// Where a load reads.
#[derive(Clone, Copy, Debug)]
pub(super) enum At {
    /// Bytes from the start of the frame.
    Frame(u32),
    /// Bytes from where X points in the frame.
    Index(u32),
}

/// A word of the program's own memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Slot {
    Header = 0,
    End = 1,
}

#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    k: u32,
}

/// A place further on, for jumps that come before it.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Label {
    jumps: Vec<usize>,
}

/// A program for tc's `bpf` classifier.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    code: Vec<Instruction>,
}

/// As instructions have them.
const NO_MATCH: u32 = 0;
/// With the class of the filter, of which an ingress qdisc makes nothing.
const MATCH: u32 = u32::MAX;
/// `TC_ACT_SHOT`, for a filter whose result is the action.
const SHOT: u32 = 2;

impl Program {
    /// For a direct-action filter: drops whatever comes.
    pub(crate) fn drop_all() -> Self {
        let mut program = Self::default();
        program.give(SHOT);
        program
    }

    pub(crate) fn len(&self) -> usize {
        self.code.len()
    }

    /// `struct sock_filter[]`, as the kernel wants it.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let code = self.code.iter();
        code.flat_map(|instruction| {
            let mut bytes = [0; 8];
            bytes[..2].copy_from_slice(&instruction.code.to_ne_bytes());
            bytes[2] = instruction.if_true;
            bytes[3] = instruction.if_false;
            bytes[4..].copy_from_slice(&instruction.k.to_ne_bytes());
            bytes
        })
        .collect()
    }

    /// A = what the frame has there.
    pub(super) fn load(&mut self, size: Size, at: At) {
        let size = match size {
            Size::Byte => libc::BPF_B,
            Size::Half => libc::BPF_H,
            Size::Word => libc::BPF_W,
        };
        let (mode, k) = match at {
            At::Frame(k) => (libc::BPF_ABS, k),
            At::Index(k) => (libc::BPF_IND, k),
        };
        self.plain(libc::BPF_LD | size | mode, k);
    }

    /// A = 1 if the frame came with a VLAN tag, which the kernel has taken out
    /// of it by now; else 0.
    pub(super) fn load_vlan_present(&mut self) {
        let k = (libc::SKF_AD_OFF + libc::SKF_AD_VLAN_TAG_PRESENT).cast_unsigned();
        self.load(Size::Byte, At::Frame(k));
    }

    pub(super) fn load_slot(&mut self, slot: Slot) {
        self.plain(libc::BPF_LD | libc::BPF_MEM, slot as u32);
    }

    /// Keeps A.
    pub(super) fn store(&mut self, slot: Slot) {
        self.plain(libc::BPF_ST, slot as u32);
    }

    pub(super) fn add(&mut self, k: u32) {
        self.plain(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K, k);
    }

    pub(super) fn add_index(&mut self) {
        self.plain(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X, 0);
    }

    pub(super) fn shift_left(&mut self, bits: u32) {
        self.plain(libc::BPF_ALU | libc::BPF_LSH | libc::BPF_K, bits);
    }

    /// X = k.
    pub(super) fn set_index(&mut self, k: u32) {
        self.plain(libc::BPF_LDX | libc::BPF_W | libc::BPF_IMM, k);
    }

    /// X = A.
    pub(super) fn move_to_index(&mut self) {
        self.plain(libc::BPF_MISC | libc::BPF_TAX, 0);
    }

    /// A = X.
    pub(super) fn load_index(&mut self) {
        self.plain(libc::BPF_MISC | libc::BPF_TXA, 0);
    }

    /// X = the length of the IPv4 header that begins there.
    pub(super) fn index_ipv4_length(&mut self, at: u32) {
        self.plain(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, at);
    }

    pub(super) fn jump(&mut self, to: &mut Label) {
        to.jumps.push(self.code.len());
        self.plain(libc::BPF_JMP | libc::BPF_JA, 0);
    }

    pub(super) fn jump_if(&mut self, a: u32, to: &mut Label) {
        self.branch(libc::BPF_JEQ | libc::BPF_K, a, 0, 1);
        self.jump(to);
    }

    pub(super) fn jump_if_any_bit(&mut self, bits: u32, to: &mut Label) {
        self.branch(libc::BPF_JSET | libc::BPF_K, bits, 0, 1);
        self.jump(to);
    }

    /// Jumps if A is not beyond X.
    pub(super) fn jump_up_to_index(&mut self, to: &mut Label) {
        self.branch(libc::BPF_JGT | libc::BPF_X, 0, 1, 0);
        self.jump(to);
    }

    /// Jumps if the words from there on are these, else goes on behind it.
    pub(super) fn jump_if_words(&mut self, at: u32, words: &[u32], to: &mut Label) {
        for (i, word) in (0u32..).zip(words) {
            self.load(Size::Word, At::Frame(at + 4 * i));
            // Two for each word that is left, and the jump.
            let left = 2 * (words.len() - 1 - i as usize) + 1;
            self.branch(
                libc::BPF_JEQ | libc::BPF_K,
                *word,
                0,
                u8::try_from(left).unwrap_or(u8::MAX),
            );
        }
        self.jump(to);
    }

    /// What comes next is where `label`'s jumps lead.
    pub(super) fn place(&mut self, label: Label) {
        for jump in label.jumps {
            let skipped = self.code.len() - jump - 1;
            self.code[jump].k = u32::try_from(skipped).unwrap_or(u32::MAX);
        }
    }

    /// No match unless A is this.
    pub(super) fn need(&mut self, a: u32) {
        self.branch(libc::BPF_JEQ | libc::BPF_K, a, 1, 0);
        self.give(NO_MATCH);
    }

    /// No match if A is this.
    pub(super) fn refuse(&mut self, a: u32) {
        self.branch(libc::BPF_JEQ | libc::BPF_K, a, 0, 1);
        self.give(NO_MATCH);
    }

    pub(super) fn no_match(&mut self) {
        self.give(NO_MATCH);
    }

    pub(super) fn matched(&mut self) {
        self.give(MATCH);
    }

    fn give(&mut self, result: u32) {
        self.plain(libc::BPF_RET | libc::BPF_K, result);
    }

    fn plain(&mut self, code: u32, k: u32) {
        self.emit(code, k, 0, 0);
    }

    fn branch(&mut self, condition: u32, k: u32, if_true: u8, if_false: u8) {
        self.emit(libc::BPF_JMP | condition, k, if_true, if_false);
    }

    fn emit(&mut self, code: u32, k: u32, if_true: u8, if_false: u8) {
        self.code.push(Instruction {
            // The classes and modes are all in the low byte.
            code: code as u16,
            if_true,
            if_false,
            k,
        });
    }
}
