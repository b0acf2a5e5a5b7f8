//! Which device files a container may open or make: a BPF program on its
//! cgroup (bpf(2), `BPF_PROG_TYPE_CGROUP_DEVICE`).
//!
//! A container's root may make any device file, and the guest has disks that
//! are not the container's. Nothing is allowed but what every container may
//! use, what the spec's device rules allow (runtime spec 1.2, "Allowed Device
//! list"), and the spec's own device files.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

/// Rules of one container; the kernel takes a million instructions, of which a
/// rule needs eight.
const MAX_RULES: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the container has {count} device rules, more than {MAX_RULES}")]
    TooMany { count: usize },
    #[error("{access:?} is no device access: it is made of r, w and m")]
    Access { access: String },
    #[error("device number {number} is out of range")]
    Number { number: i64 },
    #[error("cannot load the program that guards the container's devices")]
    Load(#[source] Errno),
    #[error("cannot attach the program that guards the container's devices")]
    Attach(#[source] Errno),
}

// linux/bpf.h, BPF_DEVCG_*.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    /// None: both kinds.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    const fn allow(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Self {
        Self {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }
    }
}

/// What every container may do (runtime spec, "Default Devices"): make device
/// files, and use null, zero, full, random, urandom, tty and terminals.
const DEFAULTS: [Rule; 10] = [
    Rule::allow(CHARACTER, None, None, MKNOD),
    Rule::allow(BLOCK, None, None, MKNOD),
    Rule::allow(CHARACTER, Some(1), Some(3), ALL),
    Rule::allow(CHARACTER, Some(1), Some(5), ALL),
    Rule::allow(CHARACTER, Some(1), Some(7), ALL),
    Rule::allow(CHARACTER, Some(1), Some(8), ALL),
    Rule::allow(CHARACTER, Some(1), Some(9), ALL),
    Rule::allow(CHARACTER, Some(5), Some(0), ALL),
    Rule::allow(CHARACTER, Some(5), Some(2), ALL),
    Rule::allow(CHARACTER, Some(136), None, ALL),
];

/// The rules of a container in the order in which they are applied: of those
/// that match, the last decides.
pub fn rules(
    asked: &[LinuxDeviceCgroup],
    devices: &[LinuxDevice],
) -> Result<Vec<Rule>, DeviceError> {
    let mut rules = Vec::with_capacity(asked.len() + devices.len() + DEFAULTS.len());
    for rule in asked {
        rules.push(Rule {
            allow: rule.allow(),
            kind: kind(rule.typ().unwrap_or(LinuxDeviceType::A)),
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access: rule.access().as_deref().map_or(Ok(ALL), access)?,
        });
    }
    // What a rule names is as the rule says.
    let is_named = |device: &LinuxDevice| {
        asked.iter().any(|rule| {
            rule.typ() == Some(device.typ())
                && rule.major() == Some(device.major())
                && rule.minor() == Some(device.minor())
        })
    };
    for device in devices.iter().filter(|device| !is_named(device)) {
        if let Some(kind) = kind(device.typ()) {
            let (major, minor) = (number(Some(device.major()))?, number(Some(device.minor()))?);
            rules.push(Rule::allow(kind, major, minor, ALL));
        }
    }
    rules.extend(DEFAULTS);
    if rules.len() > MAX_RULES {
        return Err(DeviceError::TooMany { count: rules.len() });
    }
    Ok(rules)
}

fn kind(kind: LinuxDeviceType) -> Option<u32> {
    match kind {
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::A | LinuxDeviceType::P => None,
    }
}

/// -1 and nothing both mean any.
fn number(number: Option<i64>) -> Result<Option<u32>, DeviceError> {
    match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number)
            .map(Some)
            .map_err(|_| DeviceError::Number { number }),
    }
}

fn access(text: &str) -> Result<u32, DeviceError> {
    text.chars().try_fold(0, |access, letter| match letter {
        'r' => Ok(access | READ),
        'w' => Ok(access | WRITE),
        'm' => Ok(access | MKNOD),
        _ => Err(DeviceError::Access {
            access: text.to_owned(),
        }),
    })
}

/// One instruction as the kernel lays it out (linux/bpf.h, `struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    }
}

// Opcodes: BPF_LDX|BPF_MEM|BPF_W, BPF_ALU64 operations, BPF_JMP operations.
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_IF_NOT: u8 = 0x55;
const JUMP_IF_NOT_REGISTER: u8 = 0x5d;
const JUMP_IF: u8 = 0x15;
const EXIT: u8 = 0x95;

// What the program keeps in which register.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// Instructions of a block that does not test anything: set the result, exit.
const VERDICT: usize = 2;

/// The program for `rules`. Its context is `struct bpf_cgroup_dev_ctx`: access
/// and kind in one word, then major, then minor.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(AND, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        for (register, value) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(value) = value {
                tests.push(vec![instruction(JUMP_IF_NOT, register, 0, 0, value as i32)]);
            }
        }
        if rule.access != ALL {
            // Allowed is what asks for nothing else; denied what asks for any.
            let jump = if rule.allow {
                instruction(JUMP_IF_NOT_REGISTER, SCRATCH, ACCESS, 0, 0)
            } else {
                instruction(JUMP_IF, SCRATCH, 0, 0, 0)
            };
            tests.push(vec![
                instruction(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0),
                instruction(AND, SCRATCH, 0, 0, rule.access as i32),
                jump,
            ]);
        }
        let mut block: Vec<Instruction> = tests.into_iter().flatten().collect();
        block.push(instruction(MOVE, RESULT, 0, 0, i32::from(rule.allow)));
        block.push(instruction(EXIT, 0, 0, 0, 0));
        let end = block.len();
        for (at, step) in block.iter_mut().enumerate() {
            if matches!(step.code, JUMP_IF_NOT | JUMP_IF_NOT_REGISTER | JUMP_IF) {
                // A block has at most nine instructions.
                step.offset = (end - at - 1) as i16;
            }
        }
        let matches_all = block.len() == VERDICT;
        program.extend(block);
        if matches_all {
            // The kernel refuses a program with instructions never reached.
            return program;
        }
    }
    program.push(instruction(MOVE, RESULT, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

// linux/bpf.h: commands, program type and attach type.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// The head of `union bpf_attr` for BPF_PROG_LOAD; the kernel takes what is
/// left out as zero.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

/// The head of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// A loaded program, used by every container of the pod with the same rules.
#[derive(Debug)]
pub struct Guard {
    rules: Vec<Rule>,
    program: OwnedFd,
}

impl Guard {
    pub fn load(rules: Vec<Rule>) -> Result<Self, DeviceError> {
        let instructions = compile(&rules);
        let attributes = LoadAttributes {
            program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
            instruction_count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
        };
        // SAFETY: the attributes and what they point to live, and the size
        // given is theirs.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_LOAD,
                &raw const attributes,
                size_of::<LoadAttributes>(),
            )
        };
        let fd = Errno::result(result).map_err(DeviceError::Load)?;
        // SAFETY: the kernel has just made this descriptor, close-on-exec.
        let program = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Self { rules, program })
    }

    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// From here on the cgroup's processes, and those below it, are guarded.
    pub fn attach(&self, cgroup: BorrowedFd<'_>) -> Result<(), DeviceError> {
        let attributes = AttachAttributes {
            target: cgroup.as_raw_fd() as u32,
            program: self.program.as_raw_fd() as u32,
            attach_type: BPF_CGROUP_DEVICE,
            flags: 0,
        };
        // SAFETY: as above.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_ATTACH,
                &raw const attributes,
                size_of::<AttachAttributes>(),
            )
        };
        Errno::result(result).map(drop).map_err(DeviceError::Attach)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel would do with `program`.
    fn run(program: &[Instruction], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0;
        loop {
            let step = program[at];
            let (to, from) = (
                usize::from(step.registers & 15),
                usize::from(step.registers >> 4),
            );
            let immediate = step.immediate as i64 as u64;
            let mut jump = false;
            match step.code {
                LOAD_WORD => registers[to] = context[step.offset as usize / 4].into(),
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE => registers[to] = immediate,
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_IF_NOT => jump = registers[to] != immediate,
                JUMP_IF_NOT_REGISTER => jump = registers[to] != registers[from],
                JUMP_IF => jump = registers[to] == immediate,
                EXIT => return registers[0] != 0,
                code => panic!("{code:#x}"),
            }
            at += 1 + if jump { step.offset as usize } else { 0 };
        }
    }

    /// What the rules say, read one by one.
    fn decide(rules: &[Rule], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let mut allowed = false;
        for rule in rules {
            let any = |wanted: Option<u32>, value| wanted.is_none_or(|wanted| wanted == value);
            let asks = if rule.allow {
                access & !rule.access == 0
            } else {
                access & rule.access != 0
            };
            if any(rule.kind, kind) && any(rule.major, major) && any(rule.minor, minor) && asks {
                allowed = rule.allow;
            }
        }
        allowed
    }

    fn rule() -> impl Strategy<Value = Rule> {
        (
            any::<bool>(),
            prop::option::of(1..=2u32),
            prop::option::of(0..4u32),
            prop::option::of(0..4u32),
            1..=7u32,
        )
            .prop_map(|(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            })
    }

    proptest! {
        #[test]
        fn the_program_does_what_the_rules_say(
            rules in prop::collection::vec(rule(), 0..8),
            kind in 1..=2u32, major in 0..4u32, minor in 0..4u32, access in 1..=7u32,
        ) {
            let program = compile(&rules);
            prop_assert_eq!(
                run(&program, kind, major, minor, access),
                decide(&rules, kind, major, minor, access)
            );
        }
    }

    #[test]
    fn a_container_may_make_any_device_but_use_few() {
        let program = compile(&rules(&[], &[]).unwrap());
        assert!(run(&program, CHARACTER, 1, 3, READ | WRITE));
        assert!(run(&program, CHARACTER, 136, 7, READ));
        assert!(run(&program, BLOCK, 254, 0, MKNOD));
        assert!(!run(&program, BLOCK, 254, 0, READ));
        assert!(!run(&program, CHARACTER, 1, 1, READ), "/dev/mem");
    }

    #[test]
    fn a_privileged_spec_allows_all() {
        let asked: Vec<LinuxDeviceCgroup> =
            serde_json::from_str(r#"[{"allow":true,"access":"rwm"}]"#).unwrap();
        let program = compile(&rules(&asked, &[]).unwrap());
        assert!(run(&program, BLOCK, 254, 0, READ | WRITE));
    }

    #[test]
    fn a_device_file_may_be_used_as_the_rule_about_it_says() {
        let read: Vec<LinuxDeviceCgroup> = serde_json::from_str(
            r#"[{"allow":true,"type":"b","major":254,"minor":3,"access":"r"}]"#,
        )
        .unwrap();
        let files: Vec<LinuxDevice> = serde_json::from_str(
            r#"[{"path":"/dev/a","type":"b","major":254,"minor":3},
                {"path":"/dev/b","type":"b","major":254,"minor":4}]"#,
        )
        .unwrap();
        let program = compile(&rules(&read, &files).unwrap());
        assert!(run(&program, BLOCK, 254, 3, READ));
        assert!(!run(&program, BLOCK, 254, 3, READ | WRITE));
        assert!(run(&program, BLOCK, 254, 4, READ | WRITE));
    }

    #[test]
    fn an_access_of_other_letters_is_refused() {
        let asked: Vec<LinuxDeviceCgroup> =
            serde_json::from_str(r#"[{"allow":true,"access":"rx"}]"#).unwrap();
        assert!(matches!(
            rules(&asked, &[]),
            Err(DeviceError::Access { .. })
        ));
    }
}
