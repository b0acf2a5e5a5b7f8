//! A pod's VMM as the daemon starts it.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use vmm_client::protocol::{Event, VmState};
use vmm_client::{
    Confinement, Control, Events, FdRole, HugePages, Machine, RateLimit, SpawnRequest, VmSpec,
    VmmProcess, spawn,
};

use crate::shared::host;
use crate::vm::{PATIENCE, Vm, append};

const UID: u32 = 61_000;

pub struct Drupe {
    process: VmmProcess,
    events: Events,
    _shared: Shared,
}

/// All that the daemon has ready before it starts a VMM.
pub struct Prepared {
    request: SpawnRequest,
    shared: Shared,
}

/// The mount that the guest's volumes would be in.
struct Shared(PathBuf);

impl Drop for Shared {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

impl Drupe {
    pub fn prepare(vm: &Vm<'_>, dir: &Path) -> Result<Prepared> {
        let [shared_dir, jail_root] = ["shared", "jail"].map(|name| dir.join(name));
        fs::create_dir(&shared_dir)?;
        fs::create_dir(&jail_root)?;
        let none = None::<&str>;
        mount(Some(&shared_dir), &shared_dir, none, MsFlags::MS_BIND, none)?;
        let shared = Shared(shared_dir.clone());
        mount(none, &shared_dir, none, MsFlags::MS_SHARED, none)?;

        let writable = |path: &Path| {
            let opened = File::options().read(true).write(true).open(path);
            opened.with_context(|| path.display().to_string())
        };
        let vsock = UnixListener::bind(dir.join("vsock"))?;
        let mut fds: Vec<(FdRole, OwnedFd)> = vec![
            (FdRole::Kernel, File::open(&vm.files.kernel)?.into()),
            (FdRole::Initramfs, File::open(vm.initramfs)?.into()),
            (FdRole::ConsoleLog, append(dir, "console")?.into()),
            (
                FdRole::ControlListener,
                host::control_listener(&dir.join("control"))?,
            ),
            (FdRole::VsockListener, vsock.into()),
            (FdRole::Scratch, writable(vm.disk)?.into()),
            (FdRole::Kvm, writable(Path::new("/dev/kvm"))?.into()),
        ];
        if let Some(tap) = vm.tap {
            fds.push((FdRole::Tap, host::open_tap(tap.netns, tap.name)?));
        }
        let (roles, fds) = fds.into_iter().unzip();
        let spec = VmSpec {
            pod_id: "bench".into(),
            machine: Machine::Kvm,
            vcpus: 1,
            memory_mib: vm.memory_mib,
            balloon_mib: 0,
            huge_pages: HugePages::Off,
            kernel_args: Vec::new(),
            unsealed: false,
            confinement: Confinement::default(),
            core_scheduling: false,
            mac: vm.tap.map(|tap| tap.mac),
            mtu: vm.tap.map(|_| 1500),
            image_slots: 0,
            disk_limit: RateLimit::default(),
            jail_root,
            shared_dir,
            shared_ids: None,
            uid: UID,
            gid: UID,
            console_limit_bytes: 1 << 20,
            fds: roles,
        };
        let request = SpawnRequest {
            program: vm.files.vmm.clone(),
            spec,
            fds,
            log: append(dir, "log")?,
            cgroup_procs: Vec::new(),
        };
        Ok(Prepared { request, shared })
    }

    pub async fn start(prepared: Prepared, dir: &Path) -> Result<Self> {
        let process = spawn(prepared.request).await?;
        let control = Control::connect(&dir.join("control")).await?;
        Ok(Self {
            process,
            events: control.subscribe().await?,
            _shared: prepared.shared,
        })
    }

    /// Waits for the agent's first message.
    pub async fn agent(&mut self) -> Result<()> {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.events.next());
            match next.await.context("it says nothing")?? {
                Some(Event::State(status)) if status.state == VmState::Ready => return Ok(()),
                Some(Event::State(status)) if status.state == VmState::Booting => {}
                other => bail!("{other:?}"),
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub async fn end(mut self) -> Result<()> {
        self.process.kill();
        let end = tokio::time::timeout(Duration::from_secs(30), self.process.wait());
        end.await.context("the VMM does not end")??;
        Ok(())
    }
}

impl Drop for Drupe {
    fn drop(&mut self) {
        self.process.kill();
    }
}
