//! The `kvm` machine: a microVM of our own. Guest memory, 1 to 32 processors
//! on a thread each, KVM's interrupt controllers, a serial port, and virtio
//! devices behind windows in memory. No PCI, no ACPI, no firmware.
//!
//! ```text
//! Builder::new ── add a device, each ──▶ Builder::start ──▶ running
//!   memory, VM                            kernel, vCPUs
//! ```
//! A running machine ends when the guest resets it, when a processor cannot go
//! on, or when it is killed. The first two are told to whoever started it.

mod bus;
mod cpuid;
mod handover;
pub mod layout;
pub mod load;
mod memory;
mod mptable;
mod serial;
mod vcpu;

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use nix::sys::wait::WaitStatus;
use vm_memory::GuestMemoryMmap;
use vmm_client::HugePages;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

pub use self::vcpu::{End, VcpuState};

use self::bus::Bus;
use self::load::LoadError;
use self::memory::MemoryError;
use self::serial::Serial;
use self::vcpu::{Running, Vcpu, VcpuError};
use super::{Ending, Machine, Started};
use crate::filter::{Confine, Role};
use crate::transport::SharedSlot;
use crate::transport::mmio::{Line, Mmio, NOTIFY, WINDOW};

/// What the kernel is always told. The machine has no way to start over:
/// `reboot=k` and `panic=-1` end it instead.
const ARGS: [&str; 9] = [
    "console=ttyS0",
    "reboot=k",
    "panic=-1",
    "quiet",
    "rdinit=/init",
    // The driver is there for whoever asks; no pod shall find one unasked.
    "dummy.numdummies=0",
    // An idle guest sleeps: nobody compares two clocks that are both the
    // host's, nobody looks for memory to compact before anyone needs it, and
    // the counters of memory are summed up every ten seconds.
    "tsc=nowatchdog",
    "sysctl.vm.compaction_proactiveness=0",
    "sysctl.vm.stat_interval=10",
];

/// Without any of these there is no machine.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "an interrupt controller"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::UserMemory, "user memory"),
    (Cap::ExtCpuid, "CPUID"),
    (Cap::ImmediateExit, "immediate exit"),
];

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the descriptor handed over is no /dev/kvm")]
    NoKvm(#[source] io::Error),
    #[error("KVM has API version {0}, {KVM_API_VERSION} is needed")]
    Version(i32),
    #[error("KVM of this host lacks {0}")]
    Lacks(&'static str),
    #[error("the guest shall have {vcpus} vCPUs, this host has {host} CPUs")]
    TooManyVcpus { vcpus: u32, host: usize },
    #[error("KVM refuses to {step}")]
    Kvm {
        step: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the guest's memory cannot be written")]
    Write(#[from] vm_memory::GuestMemoryError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("cannot prepare the machine")]
    Prepare(#[source] io::Error),
}

fn refused(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StartError {
    move |source| StartError::Kvm {
        step,
        source: source.into(),
    }
}

/// What the machine is made of, apart from its devices.
#[derive(Debug)]
pub struct Hardware {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    pub vcpus: u32,
    pub memory_mib: u32,
    pub huge_pages: HugePages,
}

/// What it runs.
#[derive(Debug)]
pub struct Guest {
    pub kernel: OwnedFd,
    pub initramfs: OwnedFd,
    /// More words for the kernel.
    pub args: Vec<String>,
}

/// A machine that does not run yet.
pub struct Builder {
    vm: VmFd,
    mem: GuestMemoryMmap,
    vcpus: u8,
    tsc_deadline: bool,
    cpuid: Vec<kvm_cpuid_entry2>,
    devices: Vec<Mmio>,
}

impl Builder {
    pub fn new(hardware: Hardware) -> Result<Self, StartError> {
        // SAFETY: the descriptor is owned, and `Kvm` becomes its only owner.
        let kvm = unsafe { Kvm::from_raw_fd(hardware.kvm.into_raw_fd()) };
        match kvm.get_api_version() {
            version if version < 0 => {
                return Err(StartError::NoKvm(io::Error::last_os_error()));
            }
            version if version != KVM_API_VERSION as i32 => {
                return Err(StartError::Version(version));
            }
            _ => {}
        }
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(StartError::Lacks(name));
        }
        let host = kvm.get_nr_vcpus();
        let vcpus = u8::try_from(hardware.vcpus).unwrap_or(u8::MAX);
        if usize::from(vcpus) > host {
            return Err(StartError::TooManyVcpus {
                vcpus: hardware.vcpus,
                host,
            });
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("tell what its processors can do"))?;
        let vm = kvm.create_vm().map_err(refused("make a machine"))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(refused("place its page tables"))?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(refused("place its task state"))?;
        // Before any processor: each gets its local APIC with it.
        vm.create_irq_chip()
            .map_err(refused("make interrupt controllers"))?;
        let mem = memory::map(hardware.memory_mib, hardware.huge_pages)?;
        memory::register(&vm, &mem)?;
        Ok(Self {
            vm,
            mem,
            vcpus,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            cpuid: cpuid.as_slice().to_vec(),
            devices: Vec::new(),
        })
    }

    /// Adds the device of `slot`, which interrupts through `line`, at the next
    /// free window.
    pub fn add(&mut self, slot: SharedSlot, line: Arc<Line>) -> Result<(), StartError> {
        let index = self.devices.len();
        let device = Mmio::new(slot, line, self.mem.clone()).map_err(StartError::Prepare)?;
        let notify = IoEventAddress::Mmio(window(index) + NOTIFY);
        for (queue, kick) in (0u32..).zip(device.kicks()) {
            self.vm
                .register_ioevent(kick, &notify, queue)
                .map_err(refused("listen to a device's driver"))?;
        }
        self.vm
            .register_irqfd(device.line().irqfd(), layout::device_gsi(index))
            .map_err(refused("wire a device's interrupt"))?;
        self.devices.push(device);
        Ok(())
    }

    /// Loads the kernel and lets the processors run, each on a thread that begins
    /// by `confine`. `ended` is told when the guest has ended by itself.
    pub fn start(
        self,
        guest: Guest,
        confine: Confine,
        ended: impl Fn(End) + Clone + Send + 'static,
    ) -> Result<Started, StartError> {
        let command_line = self.command_line(&guest.args);
        let loaded = load::load(
            &self.mem,
            File::from(guest.kernel),
            File::from(guest.initramfs),
            &command_line,
        )?;
        let regs = handover::write(&self.mem, &loaded)?;
        mptable::write(&self.mem, self.vcpus)?;

        let (serial, console, serial_irq) = Serial::new().map_err(StartError::Prepare)?;
        self.vm
            .register_irqfd(&serial_irq, layout::SERIAL_GSI)
            .map_err(refused("wire the serial port's interrupt"))?;

        let vcpus = (0..self.vcpus)
            .map(|id| {
                let vcpu = Vcpu::new(&self.vm, id)?;
                let registers = match id {
                    0 => {
                        let sregs = vcpu.fresh_system_registers()?;
                        Some((handover::system_registers(&loaded.entry, sregs), regs))
                    }
                    _ => None,
                };
                let place = cpuid::Place {
                    id,
                    vcpus: self.vcpus,
                    tsc_deadline: self.tsc_deadline,
                };
                let cpuid = cpuid::for_guest(&self.cpuid, place);
                vcpu.apply(&vcpu.initial_state(cpuid, registers)?)?;
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>, VcpuError>>()?;

        // Its only use is to end a KVM_RUN.
        register_signal_handler(SIGRTMIN(), on_stop).map_err(|e| StartError::Prepare(e.into()))?;
        let bus = Arc::new(Bus::new(serial, self.devices, self.mem));
        let mut machine = KvmMachine {
            stop: Arc::new(AtomicBool::new(false)),
            vcpus: Vec::new(),
            _vm: self.vm,
        };
        for vcpu in vcpus {
            let (bus, stop, ended) = (bus.clone(), machine.stop.clone(), ended.clone());
            let confine = move || confine(Role::Vcpu);
            let running = vcpu.start(bus, stop, confine, ended)?;
            machine.vcpus.push(running);
        }
        Ok(Started {
            machine: Box::new(machine),
            console,
            refusals: None,
        })
    }

    fn command_line(&self, args: &[String]) -> String {
        let devices = (0..self.devices.len()).map(|index| {
            let gsi = layout::device_gsi(index);
            format!("virtio_mmio.device=4K@{:#x}:{gsi}", window(index))
        });
        let words = ARGS.into_iter().map(str::to_owned).chain(devices);
        words
            .chain(args.iter().cloned())
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// The address of device `index`.
fn window(index: usize) -> u64 {
    layout::MMIO + WINDOW * index as u64
}

extern "C" fn on_stop(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

struct KvmMachine {
    stop: Arc<AtomicBool>,
    vcpus: Vec<Running>,
    /// Interrupts by irqfd end when this descriptor is closed.
    _vm: VmFd,
}

impl Machine for KvmMachine {
    fn kill(&mut self) {
        self.stop.store(true, Ordering::Release);
        for vcpu in self.vcpus.iter_mut().filter(|vcpu| !vcpu.is_over()) {
            if let Err(error) = vcpu.stop() {
                tracing::warn!(%error, "a processor of the guest cannot be stopped");
            }
        }
    }

    fn child_ended(&mut self, _: WaitStatus) -> Option<Ending> {
        None
    }
}
