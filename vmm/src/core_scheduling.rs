//! CPU cores that a pod shares with nobody at a time: its threads and processes
//! have a cookie of their own, and the node's kernel (Linux 5.14,
//! CONFIG_SCHED_CORE) runs no two cookies on the hyperthreads of one core at
//! once. Whoever has none counts as one cookie, the rest of the node.

use rustix::io::Errno;
use rustix::process::getpid;
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};
use vmm_client::{Confinement, has_hyperthreads};

use crate::confinement::{Lacking, go_without};

/// Gives this process, and what it starts from now on, a new cookie. Fails where
/// cores have hyperthreads, the node's kernel has no cookies, and that is not to
/// be done without. To be called with the node's /sys.
pub fn take_cookie(wanted: Confinement) -> Result<(), Lacking> {
    let whole = CoreSchedulingScope::ThreadGroup;
    let taken = create_core_scheduling_cookie(getpid(), whole);
    settle(taken, has_hyperthreads(), wanted)
}

fn settle(
    taken: rustix::io::Result<()>,
    has_hyperthreads: bool,
    wanted: Confinement,
) -> Result<(), Lacking> {
    match taken {
        Ok(()) => Ok(()),
        Err(error) if error == Errno::NODEV || !has_hyperthreads => {
            tracing::info!("no hyperthreads are in use on this node: nobody shares a core");
            Ok(())
        }
        Err(error) => go_without(
            wanted,
            format!("the node's kernel has no core scheduling ({error})"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::Pid;
    use rustix::thread::core_scheduling_cookie;

    use super::*;

    #[test]
    fn cores_without_hyperthreads_are_shared_by_nobody_anyway() {
        for wanted in [Confinement::BestEffort, Confinement::Required] {
            settle(Ok(()), true, wanted).unwrap();
            settle(Err(Errno::NODEV), true, wanted).unwrap();
            settle(Err(Errno::INVAL), false, wanted).unwrap();
        }
        settle(Err(Errno::INVAL), true, Confinement::BestEffort).unwrap();
        let refused = settle(Err(Errno::INVAL), true, Confinement::Required).unwrap_err();
        assert!(refused.to_string().contains("core scheduling"));
    }

    #[test]
    fn what_has_taken_a_cookie_hands_it_on() {
        let cookie = |pid| core_scheduling_cookie(pid, CoreSchedulingScope::Thread);
        let Ok(before) = cookie(getpid()) else {
            // This kernel has none, or no hyperthreads are in use.
            return take_cookie(Confinement::BestEffort).unwrap();
        };
        take_cookie(Confinement::Required).unwrap();
        let ours = cookie(getpid()).unwrap();
        assert_ne!(ours, before);
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let of_child = cookie(Pid::from_child(&child));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of_child, Ok(ours));
    }
}
