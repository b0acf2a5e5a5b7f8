//! The monitor's threads and the file server of a running pod, taken over one
//! after the other: what the node's kernel still does for them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use drupe_vmm::filter::{self, Answer, Role};
use nix::errno::Errno;
use vmm_client::protocol::EndCause;

use crate::attempts;
use crate::common::{Pod, Setup, is_file_server, is_kvm, kernel, namespace_of};
use crate::taken::Arg::{self, Number};
use crate::taken::{Outcome, Taken};

/// A thread of a pod and what it is there for.
struct Thread {
    process: u32,
    id: u32,
    role: Role,
}

/// The pod's threads that have a role, one of each.
fn threads(pod: &Pod) -> Vec<Thread> {
    let monitor = pod.process.pid();
    let mut found: BTreeMap<u16, Thread> = BTreeMap::new();
    for process in namespace_of(monitor) {
        let is_server = is_file_server(&process);
        let pid = number_of(&process);
        if pid != monitor && !is_server {
            continue;
        }
        for task in fs::read_dir(process.join("task")).unwrap() {
            let task = task.unwrap().path();
            let id = number_of(&task);
            let name = fs::read_to_string(task.join("comm")).unwrap();
            let role = match name.trim() {
                _ if is_server => Role::FileServer,
                _ if id == pid => Role::Supervisor,
                "vcpu0" => Role::Vcpu,
                "disk-io" => continue,
                name => Role::ALL
                    .into_iter()
                    .find(|role| role.name() == name)
                    .unwrap_or_else(|| panic!("what is thread {name} for?")),
            };
            let thread = Thread {
                process: pid,
                id,
                role,
            };
            let before = found.insert(role as u16, thread);
            assert!(before.is_none(), "two threads of {role:?}");
        }
    }
    let wanted = if is_kvm() { 7 } else { 6 };
    assert_eq!(found.len(), wanted, "{}", pod.log());
    found.into_values().collect()
}

fn number_of(path: &Path) -> u32 {
    let name = path.file_name().unwrap().to_str().unwrap();
    name.parse().unwrap()
}

pub async fn running(kernel: &Path) -> Pod {
    let setup = Setup {
        network: true,
        script: "echo up; exec sleep 1000",
        ..Setup::default()
    };
    let mut pod = Pod::start(kernel, setup).await;
    pod.expect("up").await;
    pod
}

/// What comes of an attempt that no filter stops.
fn let_through(role: Role) -> &'static [(&'static str, Outcome)] {
    use Outcome::{Done, Failed};
    match role {
        Role::Supervisor | Role::Disks => &[("clone3", Failed(Errno::ENOSYS))],
        Role::Devices | Role::SharedDir | Role::Logs | Role::Vcpu => &[],
        // It is there to work with paths. All are below the pod's shared
        // directory, which is read-only and has none of these.
        Role::FileServer => &[
            ("open the root", Done),
            ("openat2", Done),
            ("open the daemon's root", Failed(Errno::ENOENT)),
            ("open a file of the node", Failed(Errno::ENOENT)),
            ("open a device of the node", Failed(Errno::ENOENT)),
            ("leave the root", Failed(Errno::ENOENT)),
            ("write into /run", Failed(Errno::ENOENT)),
            ("write into /tmp", Failed(Errno::ENOENT)),
            ("create a file", Failed(Errno::EROFS)),
            ("mark a file as deleted", Failed(Errno::EROFS)),
            ("mkdir", Failed(Errno::EROFS)),
            ("symlink", Failed(Errno::EROFS)),
            ("link", Failed(Errno::ENOENT)),
            ("rename", Failed(Errno::EROFS)),
            ("unlink", Failed(Errno::EROFS)),
            ("chmod", Failed(Errno::ENOENT)),
            ("chown", Failed(Errno::ENOENT)),
            ("setxattr", Failed(Errno::ENOENT)),
            ("stat", Failed(Errno::ENOENT)),
            ("statx", Failed(Errno::ENOENT)),
            ("readlink", Failed(Errno::ENOENT)),
            ("read /proc/1/mem", Failed(Errno::ENOENT)),
            ("read its own memory's map", Failed(Errno::ENOENT)),
            ("read /proc/kcore", Failed(Errno::ENOENT)),
            ("read /proc/keys", Failed(Errno::ENOENT)),
            ("write core_pattern", Failed(Errno::ENOENT)),
            ("write sysrq-trigger", Failed(Errno::ENOENT)),
            ("write a cgroup's release_agent", Failed(Errno::ENOENT)),
            ("reopen standard input", Failed(Errno::ENOENT)),
            ("take back capabilities", Failed(Errno::EPERM)),
        ],
    }
}

#[tokio::test]
async fn a_thread_that_was_taken_over_is_refused_the_node() {
    let Some(kernel) = kernel() else { return };
    assert!(filter::is_supported());
    let pod = running(&kernel).await;
    for thread in threads(&pod) {
        let role = thread.role;
        let mut taken = Taken::over(thread.process, thread.id).unwrap();
        let mut outcomes = BTreeMap::new();
        let mut expected = BTreeMap::new();
        for attempt in attempts::all() {
            let number = filter::number(attempt.call).unwrap();
            let outcome = taken.call(number, &attempt.args).unwrap();
            let before = outcomes.insert(attempt.name, outcome);
            assert!(before.is_none(), "{} twice", attempt.name);
            expected.insert(attempt.name, Outcome::Trapped(role as u16));
        }
        for (name, outcome) in let_through(role) {
            assert!(expected.insert(name, *outcome).is_some(), "no {name}");
        }
        let differ: Vec<_> = outcomes
            .iter()
            .filter(|(name, outcome)| expected[*name] != **outcome)
            .collect();
        assert!(differ.is_empty(), "{role:?}: {differ:#?}");
        assert!(outcomes.len() >= 60);
        every_other_number(&mut taken, role);
    }
}

/// Of all numbers that are calls or may become ones, those alone are open that
/// are on the list.
fn every_other_number(taken: &mut Taken, role: Role) {
    let list = filter::of(role);
    let open: Vec<String> = list.open().collect();
    // Of what the kernel itself puts into a probed program, no filter is asked.
    let kernels_own = [335, 336];
    for number in (0..600).filter(|number| !kernels_own.contains(number)) {
        let name = filter::name(number.into());
        if open.contains(&name) {
            continue;
        }
        let expected = match list.judge(number, &[0; 6]) {
            Answer::Refuse(errno) => Outcome::Failed(errno),
            _ => Outcome::Trapped(role as u16),
        };
        let outcome = taken.call(number, &[Number(0); 6]).unwrap();
        assert_eq!(outcome, expected, "{name} by {role:?}");
    }
    // The same numbers by another name.
    let getpid = 0x4000_0000 | filter::number("getpid").unwrap();
    let outcome = taken.call(getpid, &[]).unwrap();
    assert_eq!(outcome, Outcome::Trapped(role as u16));
}

#[tokio::test]
async fn the_end_of_a_pod_names_the_thread_and_its_call() {
    let Some(kernel) = kernel() else { return };
    let socket = filter::number("socket").unwrap();
    let args = [libc::AF_INET, libc::SOCK_STREAM, 0].map(|n| Arg::Number(n.into()));
    for role in Role::ALL {
        if role == Role::Vcpu && !is_kvm() {
            continue;
        }
        let mut pod = running(&kernel).await;
        let thread = threads(&pod).into_iter().find(|t| t.role == role).unwrap();
        let taken = Taken::over(thread.process, thread.id).unwrap();
        taken.let_go_into(socket, &args).unwrap();
        let (reason, cause) = pod.ended_by().await;
        let who = match role {
            Role::FileServer => "the file server".to_owned(),
            role => format!("the monitor's thread {:?}", role.name()),
        };
        let words = format!("{who} made a system call that it has no use for: socket");
        assert!(reason.starts_with(&words), "{role:?}: {reason}");
        assert_eq!(cause, EndCause::Fault);
    }
}
