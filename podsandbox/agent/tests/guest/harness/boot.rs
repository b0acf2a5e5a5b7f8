//! Starting the VMM of a guest, until the agent answers.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use agent_api::agent_client::AgentClient;
use hyper_util::rt::TokioIo;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use vmm_client::protocol::{AGENT_PORT, Event as VmEvent, VmState};
use vmm_client::{
    Confinement, Control, FdRole, HugePages, Machine, RateLimit, SpawnRequest, UmlMode, VmSpec,
    dial_vsock, spawn,
};

use super::{Guest, PATIENCE, read};

const UID: u32 = 61_100;
/// What the tests need from outside; without it they say so and pass.
pub struct Artifacts {
    kernel: PathBuf,
    initramfs: PathBuf,
    vmm: PathBuf,
}

pub fn artifacts() -> Option<Artifacts> {
    let get = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let all = (|| {
        Some(Artifacts {
            kernel: get("DRUPE_TEST_KERNEL")?,
            initramfs: get("DRUPE_TEST_INITRAMFS")?,
            vmm: get("DRUPE_TEST_VMM")?,
        })
    })();
    if all.is_none() {
        // Straight to the terminal: the test harness would swallow it.
        let note = "SKIPPED: set DRUPE_TEST_KERNEL, DRUPE_TEST_INITRAMFS and DRUPE_TEST_VMM to run guests\n";
        let mut terminal = File::options().write(true).open("/dev/stderr").unwrap();
        terminal.write_all(note.as_bytes()).unwrap();
    }
    all
}

pub struct Options {
    pub memory_mib: u32,
    pub mode: UmlMode,
    /// Network namespace, tap and the NIC's address.
    pub network: Option<(OwnedFd, [u8; 6])>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            mode: UmlMode::Seccomp,
            network: None,
        }
    }
}

impl Guest {
    pub async fn start(artifacts: &Artifacts, options: Options) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("drupe-agent-test-")
            .tempdir()
            .unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(path("jail")).unwrap();
        fs::create_dir(path("shared")).unwrap();
        let none = None::<&str>;
        mount(
            Some(&path("shared")),
            &path("shared"),
            none,
            MsFlags::MS_BIND,
            none,
        )
        .unwrap();
        mount(none, &path("shared"), none, MsFlags::MS_SHARED, none).unwrap();
        let append = |name: &str| {
            let options = OpenOptions::new()
                .create(true)
                .append(true)
                .read(true)
                .clone();
            options.open(path(name)).unwrap()
        };
        let mut fds: Vec<(FdRole, OwnedFd)> = vec![
            (
                FdRole::Kernel,
                File::open(&artifacts.kernel).unwrap().into(),
            ),
            (
                FdRole::Initramfs,
                File::open(&artifacts.initramfs).unwrap().into(),
            ),
            (FdRole::ConsoleLog, append("console.log").into()),
            (FdRole::ControlListener, control_listener(&path("control"))),
            (
                FdRole::VsockListener,
                UnixListener::bind(path("vsock")).unwrap().into(),
            ),
            (FdRole::Scratch, scratch(&path("scratch")).into()),
        ];
        let mut mac = None;
        if let Some((tap, address)) = options.network {
            fds.push((FdRole::Tap, tap));
            mac = Some(address);
        }
        let (roles, fds) = fds.into_iter().unzip();
        let begun = Instant::now();
        let vmm = spawn(SpawnRequest {
            program: artifacts.vmm.clone(),
            spec: VmSpec {
                pod_id: "agent-test".into(),
                machine: Machine::Uml(options.mode),
                vcpus: 1,
                memory_mib: options.memory_mib,
                balloon_mib: 0,
                huge_pages: HugePages::Off,
                kernel_args: Vec::new(),
                unsealed: false,
                confinement: Confinement::default(),
                core_scheduling: false,
                mac,
                mtu: mac.map(|_| 1400),
                image_slots: 4,
                disk_limit: RateLimit::default(),
                jail_root: path("jail"),
                shared_dir: path("shared"),
                shared_ids: None,
                uid: UID,
                gid: UID,
                console_limit_bytes: 1 << 20,
                fds: roles,
            },
            fds,
            log: append("vmm.log"),
            cgroup_procs: Vec::new(),
        })
        .await;
        let vmm = match vmm {
            Ok(vmm) => vmm,
            Err(error) => panic!("{error:?}\n{}", read(&path("vmm.log"))),
        };
        let control = Control::connect(&path("control")).await.unwrap();
        let mut events = Control::connect(&path("control"))
            .await
            .unwrap()
            .subscribe()
            .await
            .unwrap();
        loop {
            let event = tokio::time::timeout(PATIENCE, events.next()).await;
            let event = event.expect("the guest boots").unwrap();
            let Some(VmEvent::State(status)) = event else {
                panic!("the VMM has gone:\n{}", read(&path("console.log")));
            };
            match status.state {
                VmState::Booting => {}
                VmState::Ready => break,
                VmState::Ended { reason, .. } => panic!("the guest ended: {reason}"),
            }
        }
        println!("boot: {:?}", begun.elapsed());
        let agent = AgentClient::new(connect(path("vsock")));
        let daemon = podsandbox::AgentClient::new(
            path("vsock"),
            CancellationToken::new(),
            std::sync::Arc::new(()),
        );
        Self {
            agent,
            daemon,
            control,
            dir,
            vmm,
            logs: HashMap::new(),
            slots: 0,
        }
    }
}

fn scratch(path: &Path) -> File {
    let options = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .clone();
    let file = options.open(path).unwrap();
    file.set_len(256 << 20).unwrap();
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1"])
        .arg(path)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    file
}

fn control_listener(path: &Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    listener
}

fn connect(vsock: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_: Uri| {
        let vsock = vsock.clone();
        async move {
            let stream = dial_vsock(&vsock, AGENT_PORT).await?;
            Ok::<_, vmm_client::DialError>(TokioIo::new(stream))
        }
    });
    Endpoint::from_static("http://agent").connect_with_connector_lazy(connector)
}
