//! A container of the tests: a spec as the daemon writes it, with changes.

use agent_api::{CreateContainerRequest, ImageVolume, RootDisk, User};
use serde_json::{Value, json};

/// What the host knows the tests' streams by.
pub const TOKEN: [u8; 16] = *b"sixteen numbers.";

pub struct Container {
    pub id: String,
    pub spec: Value,
    pub root: RootDisk,
    pub user: User,
    pub etc: bool,
    pub stdin: bool,
    pub stdin_once: bool,
    pub log: bool,
    pub log_token: [u8; 16],
    pub image_volumes: Vec<ImageVolume>,
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
            stdin_once: false,
            log: true,
            log_token: TOKEN,
            image_volumes: Vec::new(),
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

    pub fn request(&self) -> CreateContainerRequest {
        CreateContainerRequest {
            id: self.id.clone(),
            oci_spec: self.spec.to_string().into_bytes(),
            root: Some(self.root.clone()),
            user: Some(self.user.clone()),
            provide_etc_files: self.etc,
            stdin: self.stdin,
            stdin_once: self.stdin_once,
            log: self.log,
            log_token: self.log_token.into(),
            image_volumes: self.image_volumes.clone(),
            devices: Vec::new(),
            guest: false,
        }
    }
}
