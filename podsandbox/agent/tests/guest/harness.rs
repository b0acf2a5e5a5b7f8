//! A guest with the real agent, as the daemon starts and talks to it.

mod boot;
mod container;
mod image;

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_api::agent_client::AgentClient;
use agent_api::container_state::Phase;
use agent_api::exec_sync_event::Event as ExecEvent;
use agent_api::{
    ConfigureSandboxRequest, ContainerState, Event, EventsRequest, ExecExit, ExecSyncRequest, Exit,
    ListContainersRequest, RemoveContainerRequest, RootDisk, ShutdownRequest,
    SignalContainerRequest, StartContainerRequest, StatsRequest, StatsResponse, event,
};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tempfile::TempDir;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use vmm_client::{Control, LogToken, VmmProcess};

pub use boot::{Artifacts, Options, artifacts};
pub use container::{Container, TOKEN};
pub use image::{Image, busybox_tree};

/// Nothing here takes a tenth of this on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Guest {
    pub agent: AgentClient<Channel>,
    /// The same as the daemon has it, for streams.
    pub daemon: podsandbox::AgentClient,
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
                .open_log(&container.id, Some(LogToken::new(TOKEN)), log.as_fd())
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

    pub async fn stats(&mut self) -> StatsResponse {
        let stats = self.agent.stats(StatsRequest::default()).await;
        stats.unwrap().into_inner()
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
        let writes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).unwrap();
        let log = self.logs[id].as_path();
        writes.add_watch(log, AddWatchFlags::IN_MODIFY).unwrap();
        let fd = OwnedFd::from(writes);
        // SAFETY: an open descriptor, which the AsyncFd owns and nobody replaces.
        let writes = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.unwrap();
        let written = async {
            loop {
                let output = self.output(id, "stdout");
                if output.contains(text) {
                    return output;
                }
                let mut ready = writes.readable().await.unwrap();
                // Before the next look: of events that are the same, the kernel
                // keeps one.
                match nix::unistd::read(writes.get_ref(), &mut [0; 4096]) {
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    read => assert!(read.unwrap() > 0),
                }
            }
        };
        match tokio::time::timeout(PATIENCE, written).await {
            Ok(output) => output,
            Err(_) => panic!("no {text:?} in {:?}", self.output(id, "stdout")),
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

pub fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) -> String {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    status.message().to_owned()
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()
}
