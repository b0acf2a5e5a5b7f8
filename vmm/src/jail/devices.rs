//! The rule for devices of the pod's control groups of v2: a BPF program that is
//! asked whenever a process in the group opens or makes a device node (Linux's
//! `BPF_PROG_TYPE_CGROUP_DEVICE`). On v1 the daemon writes the rule.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `bpf(2)`: commands, a type of program and one of attachment.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
/// Beside those of whoever else has set a rule: all must agree.
const ALLOW_MULTI: u32 = 2;

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        immediate,
    }
}

/// `r2 = *(u32 *)(r1 + offset)`.
const fn load(offset: i16) -> Instruction {
    instruction(0x61, 0x12, offset, 0)
}

/// `if r2 == value`, skips `count`.
const fn if_is(value: i32, count: i16) -> Instruction {
    instruction(0x15, 2, count, value)
}

/// `if r2 != value`, skips `count`.
const fn unless(value: i32, count: i16) -> Instruction {
    instruction(0x55, 2, count, value)
}

/// `r0 = value`.
const fn answer(value: i32) -> Instruction {
    instruction(0xb7, 0, 0, value)
}

const EXIT: Instruction = instruction(0x95, 0, 0, 0);

/// Of `struct bpf_cgroup_dev_ctx`: the access in the upper half of the first
/// word, then major and minor. /dev/null, zero and urandom may be opened, which
/// the jail has; no node may be made, and nothing else be opened.
const RULE: [Instruction; 14] = [
    load(0),
    instruction(0x74, 2, 0, 16), // r2 >>= 16
    instruction(0x54, 2, 0, 1),  // r2 &= 1: to make a node
    if_is(1, 6),
    load(4),
    unless(1, 4),
    load(8),
    if_is(3, 4),
    if_is(5, 3),
    if_is(9, 2),
    answer(0),
    EXIT,
    answer(1),
    EXIT,
];

/// Sets the rule in each of `groups`. Fails where it cannot be set, on a node in
/// a container perhaps.
pub fn refuse_devices(groups: &[OwnedFd]) -> io::Result<()> {
    if groups.is_empty() {
        return Ok(());
    }
    let program = load_rule()?;
    groups.iter().try_for_each(|group| attach(&program, group))
}

/// The part of `union bpf_attr` that BPF_PROG_LOAD takes here.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
}

/// That of BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn load_rule() -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let attributes = Load {
        kind: PROG_TYPE_CGROUP_DEVICE,
        count: RULE.len() as u32,
        instructions: RULE.as_ptr() as u64,
        license: license.as_ptr() as u64,
    };
    // SAFETY: the program and the licence live until after the call, and their
    // lengths are as told; the kernel takes what is left out as zeroes.
    let fd = unsafe { bpf(BPF_PROG_LOAD, &attributes) }?;
    // SAFETY: the kernel has just made this descriptor for this process and
    // nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach(program: &OwnedFd, group: &OwnedFd) -> io::Result<()> {
    let number = |fd: &OwnedFd| u32::try_from(fd.as_raw_fd()).map_err(io::Error::other);
    let attributes = Attach {
        target: number(group)?,
        program: number(program)?,
        kind: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: the attributes hold no pointer.
    unsafe { bpf(BPF_PROG_ATTACH, &attributes) }.map(drop)
}

/// # Safety
///
/// Pointers in `attributes` must be as `command` takes them.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: as the caller has promised; the size is that of the object.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;
    use std::process::Command;

    use super::*;

    #[test]
    fn in_a_group_with_the_rule_only_devices_of_the_jail_open() {
        // Where there is v2, beside v1 perhaps.
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let has_v2 = |root: &&str| Path::new(root).join("cgroup.controllers").exists();
        let root = roots.into_iter().find(has_v2).expect("a v2 hierarchy");
        let group = Path::new(root).join(format!("drupe-unit-test-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        let program = load_rule().unwrap();
        attach(&program, &File::open(&group).unwrap().into()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "echo $$ > {group}/cgroup.procs
             (: < /dev/null && : < /dev/zero && : < /dev/urandom) && echo has those of the jail
             (: < /dev/full) 2> /dev/null || echo opens no other
             mknod {node} c 1 3 2> /dev/null || echo makes none",
            group = group.display(),
            node = dir.path().join("node").display(),
        );
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        fs::remove_dir(&group).unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(
            lines,
            ["has those of the jail", "opens no other", "makes none"]
        );
    }
}
