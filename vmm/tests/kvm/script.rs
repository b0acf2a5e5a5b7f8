//! A guest that does what a list says: one line a register or a word of
//! memory. It runs in real mode with segments of 4 GiB: in protected mode a PVM
//! host delivers no interrupts to it.
//!
//! A line that does not hold makes it print `F` and the line's number, and end
//! the machine.

use crate::common::BASE;
use crate::guest;

/// The lines, after the interpreter's page.
const LINES: u32 = BASE + 0x1000;
/// Free memory for rings and buffers, filled by [`Script::memory`].
pub const DATA: u32 = BASE + 0x8000;
const DATA_LEN: usize = 0x8000;

/// The vector that devices' pins are wired to.
const VECTOR: u32 = 0x30;
const IO_APIC: u32 = 0xfec0_0000;
const LOCAL_APIC: u32 = 0xfee0_0000;

guest!(
    interpreter,
    "lgdt gdt_register - interpreter + 0x10000",
    "mov $0x18, %eax",
    "mov %eax, %ds",
    "mov %eax, %es",
    "mov %eax, %ss",
    "ljmp $0x10, $(1f - interpreter)",
    ".code16",
    "1:",
    "mov %cr0, %eax",
    "and $~1, %al",
    "mov %eax, %cr0",
    // Real mode, but with segments of 4 GiB.
    "ljmp $0x1000, $(2f - interpreter)",
    "2:",
    "mov $0x9000, %esp",
    "mov $(idt_register - interpreter + 0x10000), %edi",
    "lidt (%edi)",
    // Nothing from the old interrupt controllers.
    "mov $0xff, %al",
    "out %al, $0x21",
    "out %al, $0xa1",
    // One vector; the count of its interrupts.
    "movw $(on_interrupt - interpreter), 0xc0",
    "movw $0x1000, 0xc2",
    "movl $0, 0x5000",
    "mov $0x11000, %esi",
    "next_line:",
    "mov (%esi), %eax",
    "mov 4(%esi), %ebx",
    "mov 8(%esi), %ecx",
    "mov 12(%esi), %edx",
    "add $16, %esi",
    "cmp $1, %eax",
    "je write_word",
    "cmp $2, %eax",
    "je expect_word",
    "cmp $3, %eax",
    "je wait_interrupts",
    "cmp $4, %eax",
    "je print",
    "cmp $5, %eax",
    "je expect_port",
    "cmp $6, %eax",
    "je poll_word",
    "cmp $7, %eax",
    "je spin",
    "cmp $8, %eax",
    "je write_half",
    // Everything else: the end.
    "mov $0xfe, %al",
    "out %al, $0x64",
    "hlt",
    "write_word:",
    "mov %ecx, (%ebx)",
    "jmp next_line",
    "write_half:",
    "mov %cx, (%ebx)",
    "jmp next_line",
    "expect_word:",
    "mov (%ebx), %eax",
    "and %edx, %eax",
    "cmp %ecx, %eax",
    "jne failed",
    "jmp next_line",
    "poll_word:",
    "mov $0x1000000, %edi",
    "2:",
    "mov (%ebx), %eax",
    "and %edx, %eax",
    "cmp %ecx, %eax",
    "je next_line",
    "pause",
    "dec %edi",
    "jnz 2b",
    "jmp failed",
    "wait_interrupts:",
    "cli",
    "cmp %ecx, 0x5000",
    "jae next_line",
    "sti",
    "hlt",
    "jmp wait_interrupts",
    "print:",
    "mov $0x3f8, %edx",
    "mov %cl, %al",
    "out %al, %dx",
    "jmp next_line",
    "expect_port:",
    "mov %ebx, %edx",
    "xor %eax, %eax",
    "in %dx, %al",
    "cmp %ecx, %eax",
    "jne failed",
    "jmp next_line",
    "spin:",
    "jmp spin",
    "failed:",
    "mov $0x3f8, %edx",
    "mov $'F', %al",
    "out %al, %dx",
    // The line's number in hexadecimal, two digits.
    "mov %esi, %ecx",
    "sub $0x11010, %ecx",
    "shr $4, %ecx",
    "mov %ecx, %eax",
    "shr $4, %eax",
    "call digit",
    "mov %ecx, %eax",
    "call digit",
    "mov $0xfe, %al",
    "out %al, $0x64",
    "hlt",
    "digit:",
    "and $15, %eax",
    "cmp $10, %eax",
    "jb 3f",
    "add $7, %eax",
    "3:",
    "add $'0', %eax",
    "out %al, %dx",
    "ret",
    "on_interrupt:",
    "push %edi",
    "incl 0x5000",
    "mov $0xfee000b0, %edi",
    "movl $0, (%edi)",
    "pop %edi",
    "iret",
    ".balign 8",
    "gdt_register:",
    ".word 31",
    ".long gdt - interpreter + 0x10000",
    "idt_register:",
    ".word 0x3ff",
    ".long 0",
    ".balign 8",
    "gdt:",
    // Code of 16 bits where the interpreter is; all memory.
    ".quad 0, 0, 0x00009b010000ffff, 0x00cf93000000ffff",
);

/// A list under construction.
pub struct Script {
    lines: Vec<[u32; 4]>,
    data: Vec<u8>,
}

impl Script {
    pub fn new() -> Self {
        Self {
            lines: Vec::new(),
            data: vec![0; DATA_LEN],
        }
    }

    fn line(mut self, op: u32, at: u32, value: u32, mask: u32) -> Self {
        self.lines.push([op, at, value, mask]);
        self
    }

    pub fn write(self, at: u32, value: u32) -> Self {
        self.line(1, at, value, 0)
    }

    /// A write of 16 bits.
    pub fn write_half(self, at: u32, value: u16) -> Self {
        self.line(8, at, value.into(), 0)
    }

    pub fn expect(self, at: u32, value: u32) -> Self {
        self.line(2, at, value, u32::MAX)
    }

    pub fn expect_masked(self, at: u32, value: u32, mask: u32) -> Self {
        self.line(2, at, value, mask)
    }

    /// Looks at a word until it is `value`.
    pub fn poll(self, at: u32, value: u32, mask: u32) -> Self {
        self.line(6, at, value, mask)
    }

    pub fn expect_port(self, port: u16, value: u8) -> Self {
        self.line(5, port.into(), value.into(), 0)
    }

    /// Halts until `count` interrupts have come since the beginning.
    pub fn wait(self, count: u32) -> Self {
        self.line(3, 0, count, 0)
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes()
            .fold(self, |script, byte| script.line(4, 0, byte.into(), 0))
    }

    pub fn spin(self) -> Self {
        self.line(7, 0, 0, 0)
    }

    /// Wires IOAPIC pin `gsi` to the one handler, edge-triggered.
    pub fn listen(self, gsi: u32) -> Self {
        self.write(LOCAL_APIC + 0xf0, 0x1ff)
            .write(IO_APIC, 0x11 + 2 * gsi)
            .write(IO_APIC + 0x10, 0)
            .write(IO_APIC, 0x10 + 2 * gsi)
            .write(IO_APIC + 0x10, VECTOR)
    }

    /// Starts processor 1 at `page`, in real mode.
    pub fn start_second(self, page: u32) -> Self {
        self.write(LOCAL_APIC + 0xf0, 0x1ff)
            .write(LOCAL_APIC + 0x310, 1 << 24)
            .write(LOCAL_APIC + 0x300, 0x4500)
            .write(LOCAL_APIC + 0x310, 1 << 24)
            .write(LOCAL_APIC + 0x300, 0x4600 | page >> 12)
    }

    /// Has `bytes` at `at`, which lies in [`DATA`], from the beginning.
    pub fn memory(mut self, at: u32, bytes: &[u8]) -> Self {
        let offset = (at - DATA) as usize;
        self.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// What is loaded at [`BASE`]; the end of the list ends the machine.
    pub fn image(&self) -> Vec<u8> {
        let mut image = interpreter().to_vec();
        assert!(image.len() < (LINES - BASE) as usize);
        image.resize((LINES - BASE) as usize, 0);
        for line in &self.lines {
            image.extend(line.iter().flat_map(|word| word.to_le_bytes()));
        }
        image.extend([0; 16]);
        assert!(image.len() < (DATA - BASE) as usize);
        image.resize((DATA - BASE) as usize, 0);
        image.extend(&self.data);
        image
    }
}
