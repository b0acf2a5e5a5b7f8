//! The peer: Debian's QEMU with its `microvm` machine, as its documentation
//! has it for speed, and the devices that a pod's VMM has.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::shared::host;
use crate::shared::watch::Watch;
use crate::vm::{PATIENCE, Vm, append};

/// Of QEMU's own package.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// As drupe's, but for the way to restart: microvm has no keyboard controller.
const ARGS: &str = "console=ttyS0 reboot=t panic=-1 quiet rdinit=/init dummy.numdummies=0 \
    tsc=nowatchdog sysctl.vm.compaction_proactiveness=0 sysctl.vm.stat_interval=10";

pub struct Qemu {
    qemu: Kill,
    virtiofsd: Kill,
}

/// The file system's process runs already: QEMU does not start without, and
/// its start is not QEMU's fault.
pub struct Prepared {
    command: Command,
    virtiofsd: Kill,
    /// Kept until QEMU has it.
    _tap: Option<OwnedFd>,
}

/// A process that ends with this.
struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        // One that has ended by itself is fine, too.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Qemu {
    pub async fn prepare(vm: &Vm<'_>, vhost_net: bool, cid: u32, dir: &Path) -> Result<Prepared> {
        let shared = dir.join("shared");
        std::fs::create_dir(&shared)?;
        let socket = dir.join("fs");
        let watch = Watch::new(dir)?;
        let virtiofsd = Command::new(VIRTIOFSD)
            .arg(format!("--socket-path={}", socket.display()))
            .arg("-o")
            .arg(format!("source={}", shared.display()))
            .stdin(Stdio::null())
            .stdout(append(dir, "log")?)
            .stderr(append(dir, "log")?)
            .spawn()
            .context(VIRTIOFSD)?;
        let virtiofsd = Kill(virtiofsd);
        let listens = async {
            while !socket.exists() {
                watch.changed().await?;
            }
            io::Result::Ok(())
        };
        let listens = tokio::time::timeout(PATIENCE, listens).await;
        listens.with_context(|| format!("no {VIRTIOFSD}"))??;

        let mib = vm.memory_mib;
        let show = |path: &Path| path.display().to_string();
        let mut words: Vec<String> = [
            "-M microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,memory-backend=memory",
            "-name bench,debug-threads=on -cpu host -smp 1 -nodefaults -no-user-config -no-reboot -display none",
            "-global virtio-mmio.force-legacy=false",
            "-object iothread,id=disk",
            "-device virtio-blk-device,drive=scratch,serial=scratch,iothread=disk",
            "-device virtio-rng-device",
            "-device virtio-balloon-device,deflate-on-oom=on,free-page-reporting=on",
            "-device vhost-user-fs-device,chardev=fs,tag=shared,queue-size=512",
            "-serial chardev:console",
        ]
        .iter()
        .flat_map(|line| line.split(' ').map(str::to_owned))
        .collect();
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        add("-m", mib.to_string());
        add(
            "-object",
            format!("memory-backend-memfd,id=memory,size={mib}M,share=on"),
        );
        add(
            "-drive",
            format!("if=none,id=scratch,format=raw,file={}", show(vm.disk)),
        );
        add("-chardev", format!("socket,id=fs,path={}", show(&socket)));
        add(
            "-chardev",
            format!("file,id=console,path={}", show(&dir.join("console"))),
        );
        add("-device", format!("vhost-vsock-device,guest-cid={cid}"));
        add("-kernel", show(&vm.files.kernel));
        add("-initrd", show(vm.initramfs));
        add("-append", ARGS.to_owned());
        let mut tap = None;
        if let Some(wanted) = vm.tap {
            let open = host::open_tap(wanted.netns, wanted.name)?;
            fcntl(&open, FcntlArg::F_SETFD(FdFlag::empty()))?;
            let vhost = if vhost_net { "on" } else { "off" };
            let fd = open.as_raw_fd();
            add("-netdev", format!("tap,id=net,fd={fd},vhost={vhost}"));
            let mac = wanted.mac.map(|byte| format!("{byte:02x}")).join(":");
            add(
                "-device",
                format!("virtio-net-device,netdev=net,mac={mac},host_mtu=1500"),
            );
            tap = Some(open);
        }
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(words)
            .stdin(Stdio::null())
            .stdout(append(dir, "log")?)
            .stderr(append(dir, "log")?);
        Ok(Prepared {
            command,
            virtiofsd,
            _tap: tap,
        })
    }

    pub fn start(mut prepared: Prepared) -> Result<Self> {
        let qemu = Kill(prepared.command.spawn().context("qemu-system-x86_64")?);
        Ok(Self {
            qemu,
            virtiofsd: prepared.virtiofsd,
        })
    }

    /// QEMU's, then those of the file system, which is two processes.
    pub fn pids(&self) -> Vec<u32> {
        let parent = self.virtiofsd.0.id();
        let path = format!("/proc/{parent}/task/{parent}/children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        let children = children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok());
        [self.qemu.0.id(), parent]
            .into_iter()
            .chain(children)
            .collect()
    }

    pub fn end(self) -> Result<()> {
        drop(self);
        Ok(())
    }
}
