//! A list as a program of the kernel's packet filter language (cBPF), and its
//! way into the kernel.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use libc::{c_long, sock_filter, sock_fprog};

use super::{Answer, Check, List, Rule};

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const ALWAYS: u32 = libc::BPF_JMP | libc::BPF_JA;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// A filter that can be installed.
pub struct Program(Vec<sock_filter>);

/// Numbers from `first` up to the next span's have one answer.
struct Span<'a> {
    first: u32,
    rule: Option<&'a Rule>,
}

impl Program {
    #[must_use]
    pub fn new(list: &List) -> Self {
        let unnamed = answer(list.unnamed);
        let mut code = vec![
            statement(LOAD, ARCH),
            jump(EQUAL, ARCHITECTURE, 1, 0),
            unnamed,
            statement(LOAD, NUMBER),
        ];
        code.extend(search(&spans(list), unnamed));
        Self(code)
    }

    /// As an array of `struct sock_filter`.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let bytes = self.0.iter().flat_map(|line| {
            let [code, k] = [&line.code.to_ne_bytes()[..], &line.k.to_ne_bytes()[..]];
            [code, &[line.jt, line.jf], k].concat()
        });
        bytes.collect()
    }

    #[cfg(test)]
    pub(super) fn lines(&self) -> &[sock_filter] {
        &self.0
    }

    /// Installs it for the calling thread and what that starts from now on.
    /// Allocates nothing, as between fork and exec. Fails without
    /// `no_new_privs`.
    pub fn install(&self) -> io::Result<()> {
        self.set(0).map(drop)
    }

    /// The same, with a descriptor through which [`Answer::Ask`] is answered.
    /// Fails with EBUSY below a filter that has one.
    pub fn install_listening(&self) -> io::Result<OwnedFd> {
        let fd = self.set(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor and nothing else
        // knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn set(&self, flags: libc::c_ulong) -> io::Result<c_long> {
        let program = sock_fprog {
            len: u16::try_from(self.0.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            filter: self.0.as_ptr().cast_mut(),
        };
        let operation = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the program is read only, and for the length of this call.
        let result = unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, &program) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(result)
    }
}

/// Whether the node's kernel has filters at all.
#[must_use]
pub fn is_supported() -> bool {
    has_action(libc::SECCOMP_RET_ERRNO)
}

/// Whether the node's kernel (5.0 and later) can ask a listener.
#[must_use]
pub fn can_ask() -> bool {
    has_action(libc::SECCOMP_RET_USER_NOTIF)
}

fn has_action(action: u32) -> bool {
    let operation = libc::SECCOMP_GET_ACTION_AVAIL;
    // SAFETY: the kernel reads one u32.
    unsafe { libc::syscall(libc::SYS_seccomp, operation, 0, &raw const action) == 0 }
}

fn spans(list: &List) -> Vec<Span<'_>> {
    let mut spans: Vec<Span<'_>> = Vec::new();
    let mut push = |first, rule| {
        if spans.last().is_none_or(|last| last.rule != rule) {
            spans.push(Span { first, rule });
        }
    };
    let mut next = 0;
    for (number, rule) in &list.rules {
        if *number > next {
            push(next, None);
        }
        push(*number, Some(rule));
        next = number + 1;
    }
    push(next, None);
    spans
}

/// Finds the span of the loaded number by halves.
fn search(spans: &[Span<'_>], unnamed: sock_filter) -> Vec<sock_filter> {
    if let [span] = spans {
        return match span.rule {
            Some(rule) => decide(rule),
            None => vec![unnamed],
        };
    }
    let (lower, upper) = spans.split_at(spans.len() / 2);
    let pivot = upper[0].first;
    let lower = search(lower, unnamed);
    let mut code = match u8::try_from(lower.len()) {
        Ok(over) => vec![jump(AT_LEAST, pivot, over, 0)],
        Err(_) => {
            let over = statement(ALWAYS, lower.len() as u32);
            vec![jump(AT_LEAST, pivot, 0, 1), over]
        }
    };
    code.extend(lower);
    code.extend(search(upper, unnamed));
    code
}

fn decide(rule: &Rule) -> Vec<sock_filter> {
    let mut code = Vec::new();
    for case in &rule.cases {
        let mut lines: Vec<_> = case.iter().flat_map(compare).collect();
        lines.push(answer(Answer::Allow));
        // What does not compare goes on behind this case.
        let behind = lines.len();
        for (at, line) in lines.iter_mut().enumerate() {
            if u32::from(line.code) == EQUAL {
                line.jf = u8::try_from(behind - at - 1).expect("a case is short");
            }
        }
        code.extend(lines);
    }
    // Behind a case without checks nothing is reached, which the kernel takes.
    if !rule.cases.contains(&Vec::new()) {
        code.push(answer(rule.otherwise));
    }
    code
}

/// Each half on its own, as the language knows 32 bits.
fn compare(check: &Check) -> Vec<sock_filter> {
    let offset = ARGS + 8 * u32::from(check.argument);
    let halves = [
        (offset + LOW, check.mask as u32, check.value as u32),
        (
            offset + HIGH,
            (check.mask >> 32) as u32,
            (check.value >> 32) as u32,
        ),
    ];
    let mut lines = Vec::new();
    for (offset, mask, value) in halves {
        if mask == 0 {
            continue;
        }
        lines.push(statement(LOAD, offset));
        if mask != u32::MAX {
            lines.push(statement(AND, mask));
        }
        lines.push(jump(EQUAL, value, 0, 0));
    }
    lines
}

#[cfg(target_endian = "little")]
const LOW: u32 = 0;
#[cfg(target_endian = "little")]
const HIGH: u32 = 4;

fn answer(answer: Answer) -> sock_filter {
    statement(
        RETURN,
        match answer {
            Answer::Allow => libc::SECCOMP_RET_ALLOW,
            Answer::Refuse(errno) => libc::SECCOMP_RET_ERRNO | errno as u32,
            Answer::Ask => libc::SECCOMP_RET_USER_NOTIF,
            Answer::Trap(beside) => libc::SECCOMP_RET_TRAP | u32::from(beside),
        },
    )
}

fn statement(code: u32, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

/// Goes on behind the next `jt` or `jf` lines.
fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    let code = code as u16;
    sock_filter { code, jt, jf, k }
}
