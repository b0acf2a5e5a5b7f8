//! A pod's VMM as the daemon starts it, with a guest whose init is a busybox
//! script. Needs root, a guest kernel (`DRUPE_TEST_KERNEL`) and a static
//! busybox. `DRUPE_TEST_MACHINE=kvm` runs the same on the other machine, for
//! which the host's CPU has to be able to run an ordinary kernel.
//!
//! Away from where they were built, the tests are told where the VMM is
//! (`DRUPE_TEST_VMM`), and the guest's vsock tool (`DRUPE_TEST_VSOCK_TOOL`).

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use tempfile::TempDir;
use vmm_client::protocol::{EndCause, Event, VmState};
use vmm_client::{
    Confinement, Control, Events, FdRole, HugePages, Machine, RateLimit, SpawnRequest, UmlMode,
    VmSpec, VmmProcess, spawn,
};

use crate::shared::watch::Watch;
use crate::shared::{host, initramfs};

pub const UID: u32 = 61_000;
pub const MAC: [u8; 6] = [0x02, 0xd7, 0, 0, 0, 1];
pub const HOST_ADDRESS: &str = "10.231.7.1";
/// Nothing here takes a tenth of this on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The kernel to test with; without one the test says so and passes.
pub fn kernel() -> Option<PathBuf> {
    let path = std::env::var_os("DRUPE_TEST_KERNEL").map(PathBuf::from);
    if path.is_none() {
        // Straight to the terminal: the test harness would swallow it.
        let note = "SKIPPED: set DRUPE_TEST_KERNEL to a UML kernel to boot guests\n";
        File::options()
            .write(true)
            .open("/dev/stderr")
            .and_then(|mut f| f.write_all(note.as_bytes()))
            .unwrap();
    }
    path
}

/// The machine to test.
pub fn machine(mode: UmlMode) -> Machine {
    match std::env::var("DRUPE_TEST_MACHINE").as_deref() {
        Ok("kvm") => Machine::Kvm,
        Ok("uml") | Err(_) => Machine::Uml(mode),
        Ok(other) => panic!("DRUPE_TEST_MACHINE is {other:?}: uml or kvm"),
    }
}

pub fn is_kvm() -> bool {
    machine(UmlMode::Seccomp) == Machine::Kvm
}

/// The kernel to test with, if it is a process of its own.
pub fn uml_kernel() -> Option<PathBuf> {
    kernel().filter(|_| !is_kvm())
}

pub fn tempdir() -> TempDir {
    tempfile::Builder::new()
        .prefix("drupe-vmm-test-")
        .tempdir()
        .unwrap()
}

/// What a test's pod is made of.
pub struct Setup {
    pub mode: UmlMode,
    pub vcpus: u32,
    pub memory_mib: u32,
    pub balloon_mib: u32,
    pub image_slots: u32,
    pub network: bool,
    /// Shell lines of the guest's init.
    pub script: &'static str,
    /// Programs for it beside the vsock tool: sources here, without `.c`.
    pub tools: &'static [&'static str],
    pub kernel_args: Vec<String>,
    /// Whether a kernel may run that does not seal itself.
    pub unsealed: bool,
    pub confinement: Confinement,
    pub core_scheduling: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            mode: UmlMode::Seccomp,
            vcpus: 1,
            memory_mib: 128,
            balloon_mib: 0,
            image_slots: 2,
            network: false,
            script: "",
            tools: &[],
            kernel_args: Vec::new(),
            unsealed: false,
            confinement: Confinement::default(),
            core_scheduling: false,
        }
    }
}

pub struct Pod {
    pub process: VmmProcess,
    events: Option<Events>,
    _cleanup: Cleanup,
    dir: TempDir,
}

/// Undoes what [`prepare`] did to the machine.
pub struct Cleanup {
    shared: PathBuf,
    pub netns: Option<String>,
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        let _ = umount2(&self.shared, MntFlags::MNT_DETACH);
        if let Some(name) = &self.netns {
            ip(&["netns", "del", name]);
        }
    }
}

impl Pod {
    pub async fn start(kernel: &Path, setup: Setup) -> Self {
        let dir = tempdir();
        let (request, cleanup) = prepare(kernel, &setup, dir.path());
        Self::run(dir, request, cleanup).await
    }

    pub async fn run(dir: TempDir, request: SpawnRequest, cleanup: Cleanup) -> Self {
        let process = match spawn(request).await {
            Ok(process) => process,
            Err(error) => {
                let log = fs::read_to_string(dir.path().join("vmm.log")).unwrap();
                panic!("{error:?}\n{log}");
            }
        };
        let control = Control::connect(&dir.path().join("control")).await.unwrap();
        Self {
            process,
            events: Some(control.subscribe().await.unwrap()),
            _cleanup: cleanup,
            dir,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn control(&self) -> Control {
        Control::connect(&self.path("control")).await.unwrap()
    }

    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("console.log")).unwrap()).into_owned()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("vmm.log")).unwrap()
    }

    /// Waits until the console shows `text`.
    pub async fn expect(&mut self, text: &str) {
        let watch = Watch::new(&self.path("console.log")).unwrap();
        let patience = tokio::time::sleep(PATIENCE);
        tokio::pin!(patience);
        let mut over = None;
        while !self.console().contains(text) {
            assert!(
                over.is_none(),
                "no {text:?} on the console ({over:?}):\n{}\n{}",
                self.console(),
                self.log()
            );
            tokio::select! {
                changed = watch.changed() => changed.unwrap(),
                end = self.process.wait() => over = Some(format!("{end:?}")),
                () = &mut patience => over = Some("too late".to_owned()),
            }
        }
    }

    /// Waits for the end of the machine and of its VMM; returns the reason.
    pub async fn ended(&mut self) -> String {
        self.ended_by().await.0
    }

    /// The same with its cause.
    pub async fn ended_by(&mut self) -> (String, EndCause) {
        let mut events = self.events.take().unwrap();
        let mut told = (String::new(), EndCause::Unknown);
        loop {
            let next = tokio::time::timeout(PATIENCE, events.next()).await;
            let next = next.unwrap_or_else(|_| {
                panic!(
                    "the machine does not end:\n{}\n{}",
                    self.console(),
                    self.log()
                )
            });
            let Some(Event::State(status)) = next.unwrap() else {
                break;
            };
            if let VmState::Ended { reason, cause } = status.state {
                told = (reason, cause);
            }
        }
        let status = tokio::time::timeout(PATIENCE, self.process.wait())
            .await
            .expect("the VMM exits")
            .unwrap();
        assert!(status.success(), "{status}: {}", self.log());
        told
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.process.kill();
    }
}

/// Runs `call` on a thread inside a network namespace.
pub fn in_netns<R: Send + 'static>(
    name: &str,
    call: impl FnOnce() -> R + Send + 'static,
) -> std::thread::JoinHandle<R> {
    let netns = host::netns(name).unwrap();
    std::thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
        call()
    })
}

/// Processes in the PID namespace whose first process is `pid`.
pub fn namespace_of(pid: u32) -> Vec<PathBuf> {
    let id = |path: &Path| fs::read_link(path.join("ns/pid")).ok();
    let Some(wanted) = id(&PathBuf::from(format!("/proc/{pid}"))) else {
        return Vec::new();
    };
    fs::read_dir("/proc")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| id(path).as_ref() == Some(&wanted))
        .collect()
}

/// Everything the daemon would have ready in `dir`.
pub fn prepare(kernel: &Path, setup: &Setup, dir: &Path) -> (SpawnRequest, Cleanup) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let shared = dir.join("shared");
    let jail = dir.join("jail");
    fs::create_dir(&shared).unwrap();
    fs::create_dir(&jail).unwrap();
    let none = None::<&str>;
    mount(Some(&shared), &shared, none, MsFlags::MS_BIND, none).unwrap();
    mount(none, &shared, none, MsFlags::MS_SHARED, none).unwrap();

    let initramfs = dir.join("initramfs");
    make_initramfs(&initramfs, setup.script, setup.tools);
    let scratch = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.join("scratch"))
        .unwrap();
    scratch.set_len(64 << 20).unwrap();
    let append = |name: &str| {
        OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(dir.join(name))
            .unwrap()
    };
    let mut fds: Vec<(FdRole, OwnedFd)> = vec![
        (FdRole::Kernel, File::open(kernel).unwrap().into()),
        (FdRole::Initramfs, File::open(&initramfs).unwrap().into()),
        (FdRole::ConsoleLog, append("console.log").into()),
        (
            FdRole::ControlListener,
            host::control_listener(&dir.join("control")).unwrap(),
        ),
        (
            FdRole::VsockListener,
            UnixListener::bind(dir.join("vsock")).unwrap().into(),
        ),
        (FdRole::Scratch, scratch.into()),
    ];
    if is_kvm() {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        fds.push((FdRole::Kvm, kvm.unwrap().into()));
    }
    let netns = setup.network.then(|| {
        let (name, tap) = make_network();
        fds.push((FdRole::Tap, tap));
        name
    });
    let cleanup = Cleanup {
        shared: shared.clone(),
        netns,
    };
    let (roles, fds) = fds.into_iter().unzip();
    let request = SpawnRequest {
        program: std::env::var_os("DRUPE_TEST_VMM")
            .unwrap_or_else(|| env!("CARGO_BIN_EXE_drupe-vmm").into())
            .into(),
        spec: VmSpec {
            pod_id: "test".into(),
            machine: machine(setup.mode),
            vcpus: setup.vcpus,
            memory_mib: setup.memory_mib,
            balloon_mib: setup.balloon_mib,
            huge_pages: HugePages::Off,
            kernel_args: kernel_args(setup),
            unsealed: setup.unsealed,
            confinement: setup.confinement,
            core_scheduling: setup.core_scheduling,
            mac: setup.network.then_some(MAC),
            mtu: setup.network.then_some(1400),
            image_slots: setup.image_slots,
            disk_limit: RateLimit::default(),
            jail_root: jail,
            shared_dir: shared,
            shared_ids: None,
            uid: UID,
            gid: UID,
            console_limit_bytes: 1 << 20,
            fds: roles,
        },
        fds,
        log: append("vmm.log"),
        cgroup_procs: Vec::new(),
    };
    (request, cleanup)
}

/// A test's own, and words to look closer (`DRUPE_TEST_KERNEL_ARGS`).
fn kernel_args(setup: &Setup) -> Vec<String> {
    let more = std::env::var("DRUPE_TEST_KERNEL_ARGS").unwrap_or_default();
    let more = more.split_whitespace().map(str::to_owned);
    setup.kernel_args.iter().cloned().chain(more).collect()
}

pub fn make_initramfs(path: &Path, script: &str, tools: &[&str]) {
    let built = tempdir();
    let vsock = match std::env::var_os("DRUPE_TEST_VSOCK_TOOL") {
        Some(tool) => tool.into(),
        None => compile("tests/boot/vsock.c", built.path()),
    };
    let mut programs = vec![("bin/vsock".into(), vsock)];
    for tool in tools {
        let program = compile(&format!("tests/boot/{tool}.c"), built.path());
        programs.push((Path::new("bin").join(tool), program));
    }
    let script = format!(
        "disk() {{ for d in /sys/block/vd*; do\n\
           [ \"$(cat $d/serial)\" = \"$1\" ] && echo /dev/${{d##*/}}; done; }}\n\
         turn() {{ t=$(disk $1); while [ $(cat /sys/block/${{t##*/}}/size) = 0 ]; do\n\
           usleep 10000; done; }}\n\
         echo GUEST-UP\n\
         {script}\n\
         reboot -f"
    );
    initramfs::make(path, &programs, &script).unwrap();
}

/// Makes a static program of one C file of this crate. Whoever can link Rust
/// programs has a C compiler.
pub fn compile(source: &str, dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    let program = dir.join(source.file_stem().unwrap());
    let status = Command::new("cc")
        .args(["-static", "-O1", "-o"])
        .arg(&program)
        .arg(&source)
        .status()
        .unwrap();
    assert!(status.success(), "cannot compile {}", source.display());
    program
}

/// A network namespace whose tap carries [`HOST_ADDRESS`].
fn make_network() -> (String, OwnedFd) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("drupe-vmm-test-{}-{number}", std::process::id());
    ip(&["netns", "add", &name]);
    ip(&[
        "-n", &name, "tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr",
    ]);
    ip(&[
        "-n",
        &name,
        "addr",
        "add",
        &format!("{HOST_ADDRESS}/24"),
        "dev",
        "tap0",
    ]);
    ip(&["-n", &name, "link", "set", "tap0", "up"]);
    let tap = host::open_tap(&name, "tap0").unwrap();
    (name, tap)
}

pub fn ip(args: &[&str]) {
    let status = Command::new("ip").args(args).status().unwrap();
    assert!(status.success(), "ip {args:?}");
}

/// Whether it is the pod's file server.
pub fn is_file_server(process: &Path) -> bool {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    line.starts_with(b"drupe-files\0")
}
