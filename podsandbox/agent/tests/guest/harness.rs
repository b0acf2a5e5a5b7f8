//! A guest with the real agent, as the daemon starts and talks to it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use agent_api::agent_client::AgentClient;
use agent_api::container_state::Phase;
use agent_api::exec_sync_event::Event as ExecEvent;
use agent_api::{
    ConfigureSandboxRequest, ContainerState, CreateContainerRequest, Event, EventsRequest,
    ExecExit, ExecSyncRequest, Exit, Layer, ListContainersRequest, RemoveContainerRequest,
    RootDisk, ShutdownRequest, SignalContainerRequest, StartContainerRequest, User, event,
};
use hyper_util::rt::TokioIo;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status, Streaming};
use vmm_client::protocol::{AGENT_PORT, Event as VmEvent, VmState};
use vmm_client::{
    Control, FdRole, HugePages, Machine, SpawnRequest, UmlMode, VmSpec, VmmProcess, dial_vsock,
    spawn,
};

const UID: u32 = 61_100;
/// Nothing here takes a tenth of this on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

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
    pub network: Option<(OwnedFd, OwnedFd, [u8; 6])>,
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

pub struct Guest {
    pub agent: AgentClient<Channel>,
    pub control: Control,
    pub dir: TempDir,
    vmm: VmmProcess,
    logs: HashMap<String, PathBuf>,
    slots: u32,
}

impl Guest {
    /// Boots a guest and makes it a pod without a network.
    pub async fn boot(artifacts: &Artifacts) -> Self {
        let mut guest = Self::start(artifacts, Options::default()).await;
        guest.configure(configuration()).await;
        guest
    }

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
        if let Some((netns, tap, address)) = options.network {
            fds.push((FdRole::Netns, netns));
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
                huge_pages: HugePages::Off,
                kernel_args: Vec::new(),
                mac,
                mtu: mac.map(|_| 1400),
                image_slots: 4,
                jail_root: path("jail"),
                shared_dir: path("shared"),
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
                VmState::Ended { reason } => panic!("the guest ended: {reason}"),
            }
        }
        println!("boot: {:?}", begun.elapsed());
        let agent = AgentClient::new(connect(path("vsock")));
        Self {
            agent,
            control,
            dir,
            vmm,
            logs: HashMap::new(),
            slots: 0,
        }
    }

    pub async fn configure(&mut self, request: ConfigureSandboxRequest) {
        let begun = Instant::now();
        self.agent.configure_sandbox(request).await.unwrap();
        println!("configure: {:?}", begun.elapsed());
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn console(&self) -> String {
        read(&self.path("console.log"))
    }

    /// Attaches `image` to the next slot.
    pub async fn attach(&mut self, image: &Image) -> RootDisk {
        let slot = self.slots;
        self.slots += 1;
        let files: Vec<BorrowedFd<'_>> = image.files.iter().map(AsFd::as_fd).collect();
        self.control.attach_disk(slot, &files).await.unwrap();
        RootDisk {
            slot,
            layers: image.layers.clone(),
        }
    }

    pub async fn create(&mut self, container: Container) -> Result<(), Status> {
        if container.log {
            let path = self.path(&format!("{}.log", container.id));
            let log = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .unwrap();
            self.control
                .open_log(&container.id, log.as_fd())
                .await
                .unwrap();
            self.logs.insert(container.id.clone(), path);
        }
        let begun = Instant::now();
        let created = self.agent.create_container(container.request()).await;
        println!("create {}: {:?}", container.id, begun.elapsed());
        created.map(|_| ())
    }

    pub async fn start_container(&mut self, id: &str) -> Result<i64, Status> {
        let begun = Instant::now();
        let started = self
            .agent
            .start_container(StartContainerRequest { id: id.into() })
            .await;
        println!("start {id}: {:?}", begun.elapsed());
        started.map(|reply| reply.into_inner().started_at_unix_nanos)
    }

    /// Creates and starts.
    pub async fn run(&mut self, container: Container) {
        let id = container.id.clone();
        self.create(container).await.unwrap();
        self.start_container(&id).await.unwrap();
    }

    /// Runs to the end and gives exit and output.
    pub async fn run_to_end(&mut self, container: Container) -> (Exit, String) {
        let id = container.id.clone();
        let mut events = self.events().await;
        self.run(container).await;
        let exit = exit_of(&mut events, &id).await;
        let output = self.output(&id, "stdout");
        (exit, output)
    }

    pub async fn remove(&mut self, id: &str) {
        let begun = Instant::now();
        let request = RemoveContainerRequest { id: id.into() };
        self.agent.remove_container(request).await.unwrap();
        println!("remove {id}: {:?}", begun.elapsed());
    }

    pub async fn signal(&mut self, id: &str, signal: i32, all: bool) {
        let request = SignalContainerRequest {
            id: id.into(),
            signal: signal as u32,
            all,
        };
        self.agent.signal_container(request).await.unwrap();
    }

    pub async fn events(&mut self) -> Streaming<Event> {
        self.agent
            .events(EventsRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    pub async fn state(&mut self, id: &str) -> ContainerState {
        let list = self
            .agent
            .list_containers(ListContainersRequest {})
            .await
            .unwrap();
        list.into_inner()
            .containers
            .into_iter()
            .find(|state| state.id == id)
            .unwrap()
    }

    pub async fn phase(&mut self, id: &str) -> Phase {
        self.state(id).await.phase()
    }

    pub async fn exec(&mut self, id: &str, argv: &[&str]) -> Result<Executed, Status> {
        self.exec_for(id, argv, 0).await
    }

    pub async fn exec_for(
        &mut self,
        id: &str,
        argv: &[&str],
        timeout_millis: u64,
    ) -> Result<Executed, Status> {
        let begun = Instant::now();
        let request = ExecSyncRequest {
            container_id: id.into(),
            argv: argv.iter().map(|&word| word.to_owned()).collect(),
            timeout_millis,
        };
        let mut stream = self.agent.exec_sync(request).await?.into_inner();
        let mut executed = Executed::default();
        while let Some(event) = stream.message().await? {
            match event.event.unwrap() {
                ExecEvent::Stdout(bytes) => executed.stdout.extend(bytes),
                ExecEvent::Stderr(bytes) => executed.stderr.extend(bytes),
                ExecEvent::Exit(exit) => executed.exit = exit,
            }
        }
        println!("exec {argv:?}: {:?}", begun.elapsed());
        Ok(executed)
    }

    /// What a container has written to `stream`, put together from its log
    /// (CRI log format: time, stream, P or F, text).
    pub fn output(&self, id: &str, stream: &str) -> String {
        let mut output = String::new();
        for line in read(&self.logs[id]).split_inclusive('\n') {
            let mut words = line.splitn(4, ' ');
            let (_time, from) = (words.next().unwrap(), words.next().unwrap());
            let (tag, text) = (words.next().unwrap(), words.next().unwrap());
            if from == stream {
                output.push_str(if tag == "P" {
                    text.trim_end_matches('\n')
                } else {
                    text
                });
            }
        }
        output
    }

    /// Waits until a container has written `text`.
    pub async fn until_output(&self, id: &str, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.output(id, "stdout");
            if output.contains(text) {
                return output;
            }
            assert!(Instant::now() < deadline, "no {text:?} in {output:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the guest by its own means and waits for the VMM.
    pub async fn shut_down(mut self) {
        let begun = Instant::now();
        self.agent.shutdown(ShutdownRequest {}).await.unwrap();
        println!("shutdown answered: {:?}", begun.elapsed());
        let ended = tokio::time::timeout(PATIENCE, self.vmm.wait()).await;
        ended.expect("the guest powers off").unwrap();
        println!("shutdown: {:?}", begun.elapsed());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "console:\n{}\nvmm:\n{}",
                self.console(),
                read(&self.path("vmm.log"))
            );
        }
        // Ours and unreaped, or gone: in either case no other process's PID.
        let pid = nix::unistd::Pid::from_raw(self.vmm.pid() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = umount2(&self.path("shared"), MntFlags::MNT_DETACH);
    }
}

#[derive(Debug, Default)]
pub struct Executed {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: ExecExit,
}

impl Executed {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// The exit of container `id`, from events that were asked for before.
pub async fn exit_of(events: &mut Streaming<Event>, id: &str) -> Exit {
    let wait = async {
        loop {
            let event = events.message().await.unwrap().expect("the agent lives");
            if let (true, Some(event::Event::Exit(exit))) = (event.container_id == id, event.event)
            {
                return exit;
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait)
        .await
        .expect("the container ends")
}

pub fn configuration() -> ConfigureSandboxRequest {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    ConfigureSandboxRequest {
        time_unix_nanos: since.as_nanos() as i64,
        hostname: "test-pod".into(),
        ..ConfigureSandboxRequest::default()
    }
}

/// A container of the tests: a spec as the daemon writes it, with changes.
pub struct Container {
    pub id: String,
    pub spec: Value,
    pub root: RootDisk,
    pub user: User,
    pub etc: bool,
    pub stdin: bool,
    pub log: bool,
}

impl Container {
    pub fn new(id: &str, root: &RootDisk, args: &[&str]) -> Self {
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_KILL",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_NET_RAW",
            "CAP_SYS_CHROOT",
            "CAP_MKNOD",
            "CAP_AUDIT_WRITE",
            "CAP_SETFCAP"
        ]);
        let spec = json!({
            "ociVersion": "1.2.0",
            "root": { "path": "rootfs" },
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": args,
                "env": ["PATH=/usr/bin:/bin", "GREETING=hello"],
                "cwd": "/",
                "noNewPrivileges": true,
                "oomScoreAdj": 500,
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities
                }
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc",
                  "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                  "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs",
                  "options": ["nosuid", "noexec", "nodev", "ro"] },
                { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                  "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }
            ],
            "linux": {
                "namespaces": [{ "type": "mount" }, { "type": "cgroup" }, { "type": "pid" }],
                "resources": {},
                "maskedPaths": [
                    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
                    "/sys/firmware", "/sys/devices/virtual/powercap"
                ],
                "readonlyPaths": [
                    "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
                ]
            }
        });
        Self {
            id: id.into(),
            spec,
            root: root.clone(),
            user: User::default(),
            etc: true,
            stdin: false,
            log: true,
        }
    }

    /// A shell command.
    pub fn sh(id: &str, root: &RootDisk, script: &str) -> Self {
        Self::new(id, root, &["sh", "-c", script])
    }

    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        self.spec.pointer_mut(parent).unwrap()[name] = value;
        self
    }

    pub fn mount(mut self, mount: Value) -> Self {
        self.spec["mounts"].as_array_mut().unwrap().push(mount);
        self
    }

    pub fn user(mut self, user: User) -> Self {
        self.user = user;
        self
    }

    fn request(&self) -> CreateContainerRequest {
        CreateContainerRequest {
            id: self.id.clone(),
            oci_spec: self.spec.to_string().into_bytes(),
            root: Some(self.root.clone()),
            user: Some(self.user.clone()),
            provide_etc_files: self.etc,
            stdin: self.stdin,
            stdin_once: false,
            log: self.log,
        }
    }
}

/// An image: EROFS layers and where each begins on the disk they make up.
pub struct Image {
    files: Vec<File>,
    layers: Vec<Layer>,
    _dir: TempDir,
}

impl Image {
    /// One layer for each directory tree, lowest first.
    pub fn from_trees(trees: &[&Path]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut image = Self {
            files: Vec::new(),
            layers: Vec::new(),
            _dir: dir,
        };
        let mut offset = 0;
        for (number, tree) in trees.iter().enumerate() {
            let path = image._dir.path().join(number.to_string());
            let status = Command::new("mkfs.erofs")
                .args(["--quiet", "-T0", "-x1"])
                .arg(&path)
                .arg(tree)
                .output()
                .unwrap();
            assert!(
                status.status.success(),
                "{}",
                String::from_utf8_lossy(&status.stderr)
            );
            let file = File::open(&path).unwrap();
            let length = file.metadata().unwrap().len().next_multiple_of(4096);
            image.files.push(file);
            image.layers.push(Layer { offset, length });
            offset += length;
        }
        image
    }

    /// One layer with a busybox and an /etc.
    pub fn busybox() -> Self {
        let tree = busybox_tree();
        Self::from_trees(&[tree.path()])
    }
}

pub fn busybox_tree() -> TempDir {
    let tree = tempfile::tempdir().unwrap();
    let at = |name: &str| tree.path().join(name);
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for dir in ["bin", "etc", "tmp", "proc"] {
        fs::create_dir(at(dir)).unwrap();
    }
    fs::copy("/bin/busybox", at("bin/busybox")).unwrap();
    let list = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for name in String::from_utf8(list.stdout).unwrap().lines() {
        if name != "busybox" {
            std::os::unix::fs::symlink("busybox", at("bin").join(name)).unwrap();
        }
    }
    fs::write(
        at("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n",
    )
    .unwrap();
    fs::write(at("etc/group"), "root:x:0:\nwww:x:34:\nlog:x:44:web\n").unwrap();
    fs::write(at("bin/notaprogram"), "hello").unwrap();
    fs::write(at("bin/lostscript"), "#!/bin/nothing\n").unwrap();
    fs::set_permissions(at("bin/lostscript"), fs::Permissions::from_mode(0o755)).unwrap();
    tree
}

pub fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) -> String {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    status.message().to_owned()
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()
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
