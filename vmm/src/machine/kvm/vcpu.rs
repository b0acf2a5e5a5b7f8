//! One processor of the guest: its state, and the thread that runs it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{KvmRunWrapper, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use super::bus::{Bus, Reset};
use crate::machine::Ending;

/// Fast string instructions.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// All memory is write-back where no range says otherwise; ranges are on.
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_DEFAULT: u64 = 1 << 11 | 6;

/// Local vector table entries of the local APIC, and how a PC has them wired:
/// the old interrupt controller, and NMI.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const MODE_NMI: u32 = 4;
const MODE_EXT_INT: u32 = 7;
const MODE_SHIFT: u32 = 8;
const MODE_MASK: u32 = 7 << MODE_SHIFT;

#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("KVM refuses to {step} of processor {id}")]
    Kvm {
        step: &'static str,
        id: u8,
        source: io::Error,
    },
    #[error("KVM refuses model-specific register {index:#x} of processor {id}")]
    Msr { index: u32, id: u8 },
    #[error("cannot start a thread for processor {id}")]
    Thread { id: u8, source: io::Error },
}

/// What a processor starts from, as plain data.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    pub id: u8,
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub msrs: Vec<kvm_msr_entry>,
    pub lapic: kvm_lapic_state,
    /// None for one that waits to be started by another.
    pub registers: Option<(kvm_sregs, kvm_regs)>,
}

pub struct Vcpu {
    fd: VcpuFd,
    run: KvmRunWrapper,
    id: u8,
}

impl Vcpu {
    pub fn new(vm: &VmFd, id: u8) -> Result<Self, VcpuError> {
        let failed = |step| move |source| VcpuError::Kvm { step, id, source };
        let fd = vm
            .create_vcpu(id.into())
            .map_err(|e| failed("make the state")(e.into()))?;
        // A second view of what the thread's KVM_RUN shares with the kernel.
        let run = KvmRunWrapper::mmap_from_fd(&fd, vm.run_size())
            .map_err(|e| failed("share the state")(e.into()))?;
        Ok(Self { fd, run, id })
    }

    /// The system registers of a processor that was just made.
    pub fn fresh_system_registers(&self) -> Result<kvm_sregs, VcpuError> {
        self.fd
            .get_sregs()
            .map_err(self.failed("tell the registers"))
    }

    /// What processor `id` starts from; `registers` are the first one's.
    pub fn initial_state(
        &self,
        cpuid: Vec<kvm_cpuid_entry2>,
        registers: Option<(kvm_sregs, kvm_regs)>,
    ) -> Result<VcpuState, VcpuError> {
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        };
        let mut lapic = self
            .fd
            .get_lapic()
            .map_err(self.failed("tell the local APIC"))?;
        set_mode(&mut lapic, APIC_LVT0, MODE_EXT_INT);
        set_mode(&mut lapic, APIC_LVT1, MODE_NMI);
        Ok(VcpuState {
            id: self.id,
            cpuid,
            msrs: vec![
                msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
                msr(MSR_MTRR_DEFAULT, MTRR_DEFAULT),
            ],
            lapic,
            registers,
        })
    }

    /// CPUID first: it decides what else can be set.
    pub fn apply(&self, state: &VcpuState) -> Result<(), VcpuError> {
        let id = self.id;
        let too_many = |step| VcpuError::Kvm {
            step,
            id,
            source: io::ErrorKind::InvalidInput.into(),
        };
        let cpuid =
            CpuId::from_entries(&state.cpuid).map_err(|_| too_many("take so long a CPUID"))?;
        self.fd
            .set_cpuid2(&cpuid)
            .map_err(self.failed("set the CPUID"))?;
        let msrs =
            Msrs::from_entries(&state.msrs).map_err(|_| too_many("take so many registers"))?;
        let taken = self
            .fd
            .set_msrs(&msrs)
            .map_err(self.failed("set the model-specific registers"))?;
        if let Some(refused) = state.msrs.get(taken) {
            let index = refused.index;
            return Err(VcpuError::Msr { index, id });
        }
        if let Some((sregs, regs)) = &state.registers {
            self.fd
                .set_sregs(sregs)
                .map_err(self.failed("set the system registers"))?;
            self.fd
                .set_regs(regs)
                .map_err(self.failed("set the registers"))?;
        }
        self.fd
            .set_lapic(&state.lapic)
            .map_err(self.failed("set the local APIC"))
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError {
        let id = self.id;
        move |source| VcpuError::Kvm {
            step,
            id,
            source: source.into(),
        }
    }

    /// Runs it on a thread of its own, which begins by `confine`, until the
    /// machine ends, by the guest (`ended` is told how) or by [`Running::stop`].
    pub fn start(
        mut self,
        bus: Arc<Bus>,
        stop: Arc<AtomicBool>,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
        ended: impl FnOnce(End) + Send + 'static,
    ) -> Result<Running, VcpuError> {
        let id = self.id;
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                let end = match confine() {
                    Ok(()) => run(&mut self.fd, &bus, &stop),
                    Err(e) => Some(End::Failed(format!("a processor cannot be confined: {e}"))),
                };
                if let Some(end) = end {
                    ended(end);
                }
            })
            .map_err(|source| VcpuError::Thread { id, source })?;
        Ok(Running {
            thread,
            run: self.run,
        })
    }
}

fn set_mode(lapic: &mut kvm_lapic_state, at: usize, mode: u32) {
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(&lapic.regs[at..at + 4]) {
        *to = *from as u8;
    }
    let word = u32::from_le_bytes(word) & !MODE_MASK | mode << MODE_SHIFT;
    for (to, from) in lapic.regs[at..at + 4].iter_mut().zip(word.to_le_bytes()) {
        *to = from as _;
    }
}

/// Why a machine has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// By the guest's will.
    PowerOff,
    /// In words.
    Failed(String),
}

impl From<End> for Ending {
    fn from(end: End) -> Self {
        match end {
            End::PowerOff => Self::powered_off(),
            End::Failed(how) => Self::fault(how),
        }
    }
}

/// A processor's thread.
pub struct Running {
    thread: JoinHandle<()>,
    run: KvmRunWrapper,
}

impl Running {
    /// Has it leave the guest and see that it shall stop.
    pub fn stop(&mut self) -> io::Result<()> {
        // Between its look at the flag and the guest: KVM_RUN looks at this.
        self.run.as_mut_ref().immediate_exit = 1;
        // In the guest: a signal gets it out.
        self.thread.kill(SIGRTMIN()).map_err(io::Error::from)
    }

    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }
}

/// None when it was told to stop.
fn run(fd: &mut VcpuFd, bus: &Bus, stop: &AtomicBool) -> Option<End> {
    let failed = |what: String| Some(End::Failed(what));
    while !stop.load(Ordering::Acquire) {
        let exit = match fd.run() {
            Ok(exit) => exit,
            Err(e) if [libc::EINTR, libc::EAGAIN].contains(&e.errno()) => continue,
            Err(e) => return failed(format!("the guest's processor cannot run: {e}")),
        };
        match exit {
            VcpuExit::IoIn(port, data) => bus.port_in(port, data),
            VcpuExit::IoOut(port, data) => {
                if let Some(Reset) = bus.port_out(port, data) {
                    return Some(End::PowerOff);
                }
            }
            VcpuExit::MmioRead(address, data) => bus.read(address, data),
            VcpuExit::MmioWrite(address, data) => {
                if let Err(e) = bus.write(address, data) {
                    return failed(e.to_string());
                }
            }
            VcpuExit::Intr => {}
            VcpuExit::Shutdown => {
                return failed("the guest's processor shut down (triple fault)".into());
            }
            VcpuExit::SystemEvent(kind, _) => {
                return failed(format!("the guest's processor reported event {kind}"));
            }
            VcpuExit::FailEntry(reason, _) => {
                return failed(format!(
                    "the host's processor refuses to enter the guest: reason {reason:#x}"
                ));
            }
            VcpuExit::InternalError => return failed(emulation_failed(fd)),
            other => return failed(format!("the guest's processor stopped: {other:?}")),
        }
    }
    None
}

/// KVM_EXIT_INTERNAL_ERROR: usually an instruction that it cannot emulate.
fn emulation_failed(fd: &mut VcpuFd) -> String {
    // SAFETY: the exit reason tells that this member of the union is set.
    let kind = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let at = fd
        .get_regs()
        .map_or_else(|_| String::new(), |regs| format!(" at {:#x}", regs.rip));
    format!("KVM cannot go on with the guest's processor{at} (internal error {kind})")
}
