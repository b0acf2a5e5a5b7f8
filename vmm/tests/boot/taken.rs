//! A thread of another process that makes the system calls it is told to, as one
//! does whose memory an attacker writes: by ptrace(2), which takes root.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use libc::{c_int, c_long, c_uint, c_void, pid_t, user_regs_struct};
use nix::errno::Errno;

/// Room for what the arguments of a call point at, below what the thread uses
/// of its stack.
const SCRATCH: u64 = 0x3000;
const SCRATCH_SIZE: usize = 0x1000;

/// `syscall`.
const INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// An argument of a call.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    Number(i64),
    /// The address of these bytes and a zero.
    Text(&'static str),
    /// The address of these numbers, 64 bits each.
    Words(&'static [u64]),
    /// The address of so many zeroes.
    Zeroes(usize),
    /// The address of a page of the thread's own.
    Page,
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Failed(Errno),
    /// By SIGSYS of a filter, with what that says beside it.
    Trapped(u16),
}

/// A thread that does nothing else any more.
pub struct Taken {
    thread: pid_t,
    registers: user_regs_struct,
    instruction: u64,
    memory: File,
}

/// How a thread has stopped.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// On its way into a call or out of it.
    Call,
    Signal(c_int),
    Event,
}

impl Taken {
    /// Takes over thread `thread` of process `process`, where it stands.
    pub fn over(process: u32, thread: u32) -> io::Result<Self> {
        let thread = pid_t::try_from(thread).map_err(io::Error::other)?;
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        trace(libc::PTRACE_SEIZE, thread, 0, options as u64)?;
        trace(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{process}/mem"))?;
        let mut taken = Self {
            thread,
            registers: zeroed(),
            instruction: find_instruction(process, &memory)?,
            memory,
        };
        taken.stopped()?;
        taken.registers = taken.read_registers()?;
        Ok(taken)
    }

    /// Has it make call number `number`.
    pub fn call(&mut self, number: u32, args: &[Arg]) -> io::Result<Outcome> {
        let mut registers = self.registers;
        let values = self.place(args)?;
        registers.rip = self.instruction;
        registers.rax = number.into();
        // Not on its way out of another.
        registers.orig_rax = u64::MAX;
        [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ] = values;
        let result = self.make(&registers)?;
        // A signal that the call has raised comes before the next one.
        registers.rax = libc::SYS_getpid as u64;
        self.write_registers(&registers)?;
        let mut trapped = None;
        loop {
            match self.go_on(0)? {
                Stop::Call => break,
                Stop::Signal(libc::SIGSYS) => trapped = Some(self.beside()?),
                Stop::Signal(_) | Stop::Event => {}
            }
        }
        self.until_a_call()?;
        Ok(match (trapped, result) {
            (Some(beside), _) => Outcome::Trapped(beside),
            (None, failed @ -4095..=-1) => Outcome::Failed(Errno::from_raw(-failed as i32)),
            (None, _) => Outcome::Done,
        })
    }

    /// Lets it go on by itself, with call number `number` in place of the one
    /// that it was in.
    pub fn let_go_into(self, number: u32, args: &[Arg]) -> io::Result<()> {
        let mut registers = self.registers;
        let values = self.place(args)?;
        registers.rip -= INSTRUCTION.len() as u64;
        registers.rax = number.into();
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = [values[0], values[1], values[2]];
        self.write_registers(&registers)?;
        trace(libc::PTRACE_DETACH, self.thread, 0, 0).map(drop)
    }

    /// Goes through one call; what the kernel has left as its result.
    fn make(&self, registers: &user_regs_struct) -> io::Result<i64> {
        self.write_registers(registers)?;
        self.until_a_call()?;
        self.until_a_call()?;
        Ok(self.read_registers()?.rax.cast_signed())
    }

    fn until_a_call(&self) -> io::Result<()> {
        while self.go_on(0)? != Stop::Call {}
        Ok(())
    }

    fn go_on(&self, signal: u64) -> io::Result<Stop> {
        trace(libc::PTRACE_SYSCALL, self.thread, 0, signal)?;
        self.stopped()
    }

    fn stopped(&self) -> io::Result<Stop> {
        let mut status = 0;
        // SAFETY: the kernel writes the status, which lives.
        let waited = unsafe { libc::waitpid(self.thread, &raw mut status, libc::__WALL) };
        if waited < 0 {
            return Err(io::Error::last_os_error());
        }
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other(format!(
                "the thread has gone: {status:#x}"
            )));
        }
        Ok(match libc::WSTOPSIG(status) {
            signal if signal == libc::SIGTRAP | 0x80 => Stop::Call,
            _ if status >> 16 != 0 => Stop::Event,
            signal => Stop::Signal(signal),
        })
    }

    /// `si_errno` of the signal that it is about to get.
    fn beside(&self) -> io::Result<u16> {
        let mut info: libc::siginfo_t = zeroed();
        let to = (&raw mut info).expose_provenance() as u64;
        trace(libc::PTRACE_GETSIGINFO, self.thread, 0, to)?;
        u16::try_from(info.si_errno).map_err(io::Error::other)
    }

    fn read_registers(&self) -> io::Result<user_regs_struct> {
        let mut registers = zeroed();
        let to: *mut user_regs_struct = &raw mut registers;
        trace(
            libc::PTRACE_GETREGS,
            self.thread,
            0,
            to.expose_provenance() as u64,
        )?;
        Ok(registers)
    }

    fn write_registers(&self, registers: &user_regs_struct) -> io::Result<()> {
        let from: *const user_regs_struct = registers;
        trace(
            libc::PTRACE_SETREGS,
            self.thread,
            0,
            from.expose_provenance() as u64,
        )
        .map(drop)
    }

    /// Writes what arguments point at; the arguments as they are in registers.
    fn place(&self, args: &[Arg]) -> io::Result<[u64; 6]> {
        let start = (self.registers.rsp - SCRATCH) & !0xfff;
        let mut values = [0; 6];
        let mut used = 0;
        for (value, arg) in values.iter_mut().zip(args) {
            let bytes = match *arg {
                Arg::Number(number) => {
                    *value = number.cast_unsigned();
                    continue;
                }
                Arg::Text(text) => [text.as_bytes(), &[0]].concat(),
                Arg::Words(words) => words.iter().flat_map(|word| word.to_ne_bytes()).collect(),
                Arg::Zeroes(size) => vec![0; size],
                Arg::Page => {
                    *value = start;
                    continue;
                }
            };
            *value = start + used as u64;
            self.memory.write_all_at(&bytes, *value)?;
            used += bytes.len().next_multiple_of(16);
            assert!(used <= SCRATCH_SIZE, "too much for one call");
        }
        Ok(values)
    }
}

/// Of a structure that the kernel fills in.
fn zeroed<T: Copy>() -> T {
    // SAFETY: used for structures of integers alone, for which all-zero bytes are
    // a value.
    unsafe { std::mem::zeroed() }
}

fn trace(request: c_uint, thread: pid_t, address: u64, data: u64) -> io::Result<c_long> {
    let (address, data) = (address as *mut c_void, data as *mut c_void);
    // SAFETY: what `data` points at for a request is as large as that asks for,
    // by the callers above, and lives through the call.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Where the process has the instruction.
fn find_instruction(process: u32, memory: &File) -> io::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some("r-xp")) = (words.next(), words.next()) else {
            continue;
        };
        let bounds = range.split_once('-').and_then(|(from, to)| {
            let address = |text| u64::from_str_radix(text, 16).ok();
            Some((address(from)?, address(to)?))
        });
        let (from, to) = bounds.ok_or(io::ErrorKind::InvalidData)?;
        let mut bytes = vec![0; usize::try_from(to - from).map_err(io::Error::other)?];
        if memory.read_exact_at(&mut bytes, from).is_err() {
            continue;
        }
        if let Some(at) = bytes.windows(2).position(|pair| pair == INSTRUCTION) {
            return Ok(from + at as u64);
        }
    }
    Err(io::Error::other("the process has no such instruction"))
}
