//! Ends and clears away what a test has started when the test itself is killed
//! and so cannot.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::cgroup::Cgroup;

/// Both scripts' input ends with the test's process, which alone has the other
/// end.
///
/// The first argument is the directory of a node, the others are cgroups, that
/// of version 2 first, and settings as PATH=VALUE.
const SCRIPT: &str = r#"
    cat > /dev/null
    dir=$1 group=$2
    shift
    [ ! -e "$group" ] || echo 1 > "$group/cgroup.kill"
    rounds=0
    while grep -q 'populated 1' "$group/cgroup.events" && [ $rounds -lt 400 ]; do
        rounds=$((rounds + 1))
        sleep 0.05
    done
    mounted() { awk -v dir="$dir/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo; }
    # Another guard of the same node may have been first.
    mounted | tac | while read -r point; do umount --lazy "$point" 2> /dev/null; done
    losetup --list --noheadings --raw --output NAME,BACK-FILE |
        awk -v dir="$dir/" 'index($2, dir) == 1 { print $1 }' | xargs -r -n 1 losetup --detach
    for argument; do
        case $argument in
        *=*) echo "${argument#*=}" > "${argument%%=*}" ;;
        *) [ ! -e "$argument" ] || find "$argument" -depth -type d -exec rmdir {} + ;;
        esac
    done
    # Storage is large; what is left are logs.
    [ -n "$(mounted)" ] || rm -rf "$dir/root" "$dir/registry"
"#;

/// A process id, and what its command line has in it as long as it is that
/// process's.
const PROCESS_SCRIPT: &str = r#"
    cat > /dev/null
    ! grep -qF -e "$2" "/proc/$1/cmdline" 2> /dev/null || kill -KILL "$1"
"#;

/// A process that looks after the others.
pub struct Guard {
    process: Child,
}

impl Guard {
    /// Guards the processes of `cgroup`, the mounts and loop devices of `dir`,
    /// and `settings` (`PATH=VALUE`) that are to be put back.
    pub fn start(dir: &Path, cgroup: &Cgroup, settings: &[String]) -> Result<Self> {
        let mut guard = Self::command(SCRIPT);
        guard.arg(dir).args(cgroup.everywhere()).args(settings);
        Self::spawn(guard)
    }

    /// Guards the process `pid`, which was started with `argument`.
    pub fn of_process(pid: u32, argument: &Path) -> Result<Self> {
        let mut guard = Self::command(PROCESS_SCRIPT);
        guard.arg(pid.to_string()).arg(argument);
        Self::spawn(guard)
    }

    fn command(script: &str) -> Command {
        // In a session of its own: a terminal's signals are for the test.
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", script, "guard"]);
        command
    }

    fn spawn(mut command: Command) -> Result<Self> {
        let process = command
            .stdin(Stdio::piped())
            .current_dir("/")
            .spawn()
            .context("start a guard")?;
        Ok(Self { process })
    }
}

impl Drop for Guard {
    /// The test has cleared away by itself.
    fn drop(&mut self) {
        // Already gone is fine.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
