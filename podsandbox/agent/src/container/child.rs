//! The way of a new process from `clone3` to `execve`.
//!
//! Runs in the child, in a copy of the agent's memory: it carries out a
//! [`Plan`] and must not allocate, lock or panic. Every failure goes to the
//! parent as one packet that names the step; success closes the socket by
//! close-on-exec.

use std::convert::Infallible;
use std::ffi::{CStr, c_int};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, fstat, mknod};
use nix::unistd::{chdir, chown, fchdir, mkdir, pivot_root, setsid, write};

use super::plan::{
    Capabilities, DeviceNode, Entry, Failure, Identity, MESSAGE_LEN, Message, MountKind, MountStep,
    Plan, Program, RootSetup, Stdio, Step,
};
use crate::sys::{self, CapSets, MountAttr};

type Result<T> = std::result::Result<T, Failure>;

/// Where the agent keeps an empty directory for a new root to sit on while it
/// is entered.
pub const PIVOT: &CStr = c"/run/drupe/pivot";

/// Exit code of a child that could not exec; the parent knows more by then.
const SETUP_FAILED: c_int = 127;

/// Highest capability this agent knows (CAP_CHECKPOINT_RESTORE).
pub const LAST_CAPABILITY: u32 = 40;

trait At<T> {
    fn at(self, step: Step, index: usize) -> Result<T>;
}

impl<T> At<T> for std::result::Result<T, Errno> {
    fn at(self, step: Step, index: usize) -> Result<T> {
        self.map_err(|errno| Failure {
            step,
            index: index as u32,
            errno,
        })
    }
}

/// Carries out `plan`; never returns.
pub fn run(plan: &Plan) -> ! {
    let Err(failure) = execute(plan);
    // The one descriptor beside 0 to 2 that stays open until `execve`.
    // Nobody is left to tell when the parent is gone.
    let _ = write(&plan.channel, &Message::Failed(failure).encode());
    // SAFETY: ends the process without running the parent's exit handlers.
    unsafe { libc::_exit(SETUP_FAILED) }
}

fn execute(plan: &Plan) -> Result<Infallible> {
    reset_signals();
    // Until `execve` this is a copy of the agent's memory, with what it knows
    // of other containers, in sight of this container's processes.
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Session, 1)?;
    setsid().at(Step::Session, 0)?;
    let identity = &plan.identity;
    if let Some(score) = &identity.oom_score_adj {
        // Lowering it needs CAP_SYS_RESOURCE, which PID 1 of a guest has.
        write_file(c"/proc/self/oom_score_adj", score).at(Step::OomScore, 0)?;
    }
    match &plan.entry {
        Entry::Create(root) => enter_root(root, matches!(plan.stdio, Stdio::Terminal { .. }))?,
        Entry::Join { pidfd, namespaces } => {
            sys::setns(pidfd.as_raw_fd(), *namespaces).at(Step::Join, 0)?;
        }
    }
    let terminal = match &plan.stdio {
        Stdio::Files(files) => {
            for (number, file) in files.iter().enumerate() {
                duplicate(file.as_raw_fd(), number as RawFd).at(Step::Stdio, number)?;
            }
            None
        }
        Stdio::Terminal { rows, columns } => Some(open_terminal(identity.uid, *rows, *columns)?),
    };
    if let Entry::Create(root) = &plan.entry {
        restrict_root(root)?;
    }
    set_limits(identity)?;
    enter_cwd(identity)?;
    become_user(identity)?;
    close_others(
        plan.channel.as_raw_fd(),
        terminal.as_ref().map(AsRawFd::as_raw_fd),
    )
    .at(Step::Exec, 0)?;
    if plan.wait {
        wait_for_start(plan, terminal)?;
    }
    drop_privileges(identity)?;
    exec(&plan.program)
}

/// The agent ignores SIGPIPE as every Rust program does, and `execve` keeps
/// what is ignored.
fn reset_signals() {
    // SAFETY: sets default dispositions and an empty mask of this process.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Closes the agent's descriptors: a process that waits to be started would
/// hold up the mounts and connections of other containers.
fn close_others(channel: RawFd, terminal: Option<RawFd>) -> sys::Result<()> {
    let terminal = terminal.unwrap_or(channel);
    let mut first = 3;
    for keep in [channel.min(terminal), channel.max(terminal)] {
        if keep > first {
            sys::close_range(first, keep - 1)?;
        }
        first = first.max(keep + 1);
    }
    sys::close_range(first, RawFd::MAX)
}

fn enter_root(root: &RootSetup, terminal: bool) -> Result<()> {
    if root.cgroup_namespace {
        unshare(CloneFlags::CLONE_NEWCGROUP).at(Step::CgroupNamespace, 0)?;
    }
    // Nothing that happens to mounts here may reach the agent's namespace.
    mount(
        None::<&CStr>,
        c"/",
        None::<&CStr>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&CStr>,
    )
    .at(Step::Propagation, 0)?;
    sys::move_mount(root.tree.as_raw_fd(), PIVOT).at(Step::Root, 0)?;
    fchdir(&root.tree).at(Step::Root, 1)?;
    // pivot_root(2), "pivot_root(".", ".")": no directory for the old root.
    pivot_root(c".", c".").at(Step::Root, 2)?;
    umount2(c".", MntFlags::MNT_DETACH).at(Step::Root, 3)?;
    chdir(c"/").at(Step::Root, 4)?;

    // SAFETY: sets this process's umask.
    unsafe { libc::umask(0) };
    for (index, step) in root.mounts.iter().enumerate() {
        mount_one(step).at(Step::Mount, index)?;
    }
    for (index, device) in root.devices.iter().enumerate() {
        make_device(device).at(Step::Device, index)?;
    }
    for (index, (target, path)) in root.symlinks.iter().enumerate() {
        match nix::unistd::symlinkat(target.as_c_str(), nix::fcntl::AT_FDCWD, path.as_c_str()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno).at(Step::Symlink, index),
        }
    }
    if terminal {
        make_file(c"/dev/console").at(Step::Terminal, 0)?;
    }
    Ok(())
}

fn mount_one(step: &MountStep) -> sys::Result<()> {
    match attach(step) {
        Err(Errno::ENOENT) => {
            if step.directory {
                make_directories(&step.target, 0o755)?;
            } else {
                make_parent(&step.target)?;
                make_file(&step.target)?;
            }
            attach(step)
        }
        result => result,
    }
}

fn attach(step: &MountStep) -> sys::Result<()> {
    match &step.kind {
        MountKind::Tree(tree) => sys::move_mount(tree.as_raw_fd(), &step.target),
        MountKind::New {
            fs,
            source,
            flags,
            data,
            attr,
        } => {
            let data = (!data.is_empty()).then_some(data.as_c_str());
            mount(
                Some(source.as_c_str()),
                step.target.as_c_str(),
                Some(fs.as_c_str()),
                *flags,
                data,
            )?;
            if attr.is_empty() {
                return Ok(());
            }
            sys::mount_setattr(libc::AT_FDCWD, &step.target, true, *attr)
        }
    }
}

/// `mkdir -p`, without allocating.
fn make_directories(path: &CStr, mode: u32) -> sys::Result<()> {
    let bytes = path.to_bytes();
    let mut buffer = [0u8; libc::PATH_MAX as usize];
    if bytes.len() >= buffer.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    for end in 1..=bytes.len() {
        if end < bytes.len() && bytes[end] != b'/' {
            continue;
        }
        buffer[..end].copy_from_slice(&bytes[..end]);
        buffer[end] = 0;
        let prefix = CStr::from_bytes_with_nul(&buffer[..=end]).map_err(|_| Errno::EINVAL)?;
        match mkdir(prefix, Mode::from_bits_truncate(mode)) {
            // A read-only file system says so even where the directory exists.
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(Errno::EROFS) if end < bytes.len() => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn make_parent(path: &CStr) -> sys::Result<()> {
    let bytes = path.to_bytes();
    let Some(slash) = bytes
        .iter()
        .rposition(|&b| b == b'/')
        .filter(|&slash| slash > 0)
    else {
        return Ok(());
    };
    let mut buffer = [0u8; libc::PATH_MAX as usize];
    let target = buffer.get_mut(..=slash).ok_or(Errno::ENAMETOOLONG)?;
    target[..slash].copy_from_slice(&bytes[..slash]);
    let parent = CStr::from_bytes_with_nul(target).map_err(|_| Errno::EINVAL)?;
    make_directories(parent, 0o755)
}

fn make_file(path: &CStr) -> sys::Result<()> {
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    open(path, flags, Mode::from_bits_truncate(0o644)).map(drop)
}

fn make_device(device: &DeviceNode) -> sys::Result<()> {
    let kind = SFlag::from_bits_truncate(device.mode & libc::S_IFMT);
    let mode = Mode::from_bits_truncate(device.mode & 0o7777);
    let result = match mknod(device.path.as_c_str(), kind, mode, device.device) {
        Err(Errno::ENOENT) => {
            make_parent(&device.path)?;
            mknod(device.path.as_c_str(), kind, mode, device.device)
        }
        result => result,
    };
    match result {
        Ok(()) => {}
        // An image may bring its own /dev without a mount over it.
        Err(Errno::EEXIST) => return Ok(()),
        Err(errno) => return Err(errno),
    }
    if device.uid != 0 || device.gid != 0 {
        chown(
            device.path.as_c_str(),
            Some(device.uid.into()),
            Some(device.gid.into()),
        )?;
    }
    Ok(())
}

/// What closes the root once everything in it was made.
fn restrict_root(root: &RootSetup) -> Result<()> {
    for (index, (path, value)) in root.sysctls.iter().enumerate() {
        write_file(path, value).at(Step::Sysctl, index)?;
    }
    for (index, path) in root.readonly.iter().enumerate() {
        make_readonly(path).at(Step::ReadOnly, index)?;
    }
    mask(root)?;
    if root.readonly_root {
        let attr = MountAttr {
            set: libc::MOUNT_ATTR_RDONLY,
            ..MountAttr::default()
        };
        sys::mount_setattr(libc::AT_FDCWD, c"/", false, attr).at(Step::ReadOnly, usize::MAX)?;
    }
    Ok(())
}

fn make_readonly(path: &CStr) -> sys::Result<()> {
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    match mount(Some(path), path, None::<&CStr>, bind, None::<&CStr>) {
        Ok(()) => {}
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        Err(errno) => return Err(errno),
    }
    let attr = MountAttr {
        set: libc::MOUNT_ATTR_RDONLY,
        ..MountAttr::default()
    };
    sys::mount_setattr(libc::AT_FDCWD, path, true, attr)
}

/// Covers files with /dev/null and directories with an empty read-only tmpfs.
fn mask(root: &RootSetup) -> Result<()> {
    if root.masked.is_empty() {
        return Ok(());
    }
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let null = open(c"/dev/null", flags, Mode::empty()).at(Step::Mask, 0)?;
    // A volume at /dev could have put something else there, to be bound over
    // /proc/kcore and the like.
    let stat = fstat(&null).at(Step::Mask, 0)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || stat.st_rdev != libc::makedev(1, 3) {
        return Err(Errno::ENXIO).at(Step::Mask, 0);
    }
    for (index, path) in root.masked.iter().enumerate() {
        let tree = match sys::clone_mount(borrow(&null), c"", false) {
            Ok(tree) => tree,
            Err(errno) => return Err(errno).at(Step::Mask, index),
        };
        match sys::move_mount(tree.as_raw_fd(), path) {
            Ok(()) | Err(Errno::ENOENT) => continue,
            // The target is a directory.
            Err(Errno::ENOTDIR | Errno::EISDIR | Errno::EINVAL) => {}
            Err(errno) => return Err(errno).at(Step::Mask, index),
        }
        match mount(
            Some(c"tmpfs"),
            path.as_c_str(),
            Some(c"tmpfs"),
            MsFlags::MS_RDONLY,
            Some(c"size=0k,nr_inodes=1"),
        ) {
            // ENOTDIR: a file on the way to it, so nothing to mask.
            Ok(()) | Err(Errno::ENOTDIR | Errno::ENOENT) => {}
            Err(errno) => return Err(errno).at(Step::Mask, index),
        }
    }
    Ok(())
}

fn borrow(fd: &std::os::fd::OwnedFd) -> BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(fd)
}

/// Opens a terminal of the container's own devpts, makes it the controlling
/// one and /dev/console, and returns its master.
fn open_terminal(uid: u32, rows: u16, columns: u16) -> Result<std::os::fd::OwnedFd> {
    let fail = |errno| Failure {
        step: Step::Terminal,
        index: 0,
        errno,
    };
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = open(c"/dev/ptmx", flags, Mode::empty()).map_err(fail)?;
    let mut number: c_int = 0;
    let unlock: c_int = 0;
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: each request reads or writes the one variable given, of the type
    // that ioctl_tty(2) states.
    unsafe {
        Errno::result(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCSPTLCK,
            &raw const unlock,
        ))
        .map_err(fail)?;
        Errno::result(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTN,
            &raw mut number,
        ))
        .map_err(fail)?;
        Errno::result(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCSWINSZ,
            &raw const size,
        ))
        .map_err(fail)?;
    }
    let mut buffer = [0u8; 32];
    let path = terminal_path(&mut buffer, number.unsigned_abs());
    let slave = open(path, flags, Mode::empty()).map_err(fail)?;
    chown(path, Some(uid.into()), None).map_err(fail)?;
    mount(
        Some(path),
        c"/dev/console",
        None::<&CStr>,
        MsFlags::MS_BIND,
        None::<&CStr>,
    )
    .map_err(fail)?;
    // SAFETY: TIOCSCTTY takes an integer.
    Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) }).map_err(fail)?;
    for number in 0..3 {
        duplicate(slave.as_raw_fd(), number).map_err(fail)?;
    }
    Ok(master)
}

/// `/dev/pts/NUMBER`, without allocating.
fn terminal_path(buffer: &mut [u8; 32], number: u32) -> &CStr {
    const PREFIX: &[u8] = b"/dev/pts/";
    buffer[..PREFIX.len()].copy_from_slice(PREFIX);
    let digits = number.checked_ilog10().map_or(1, |log| log as usize + 1);
    let end = PREFIX.len() + digits;
    let mut rest = number;
    for byte in buffer[PREFIX.len()..end].iter_mut().rev() {
        *byte = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    buffer[end] = 0;
    CStr::from_bytes_until_nul(buffer).unwrap_or(c"/dev/pts/0")
}

/// `dup2` that also works, and clears close-on-exec, when both are the same.
fn duplicate(from: RawFd, to: RawFd) -> sys::Result<()> {
    let result = if from == to {
        // SAFETY: takes integers and closes nothing.
        unsafe { libc::fcntl(to, libc::F_SETFD, 0) }
    } else {
        // SAFETY: takes integers; 0 to 2 are owned by nothing in this process.
        unsafe { libc::dup2(from, to) }
    };
    Errno::result(result).map(drop)
}

fn set_limits(identity: &Identity) -> Result<()> {
    for (index, limit) in identity.rlimits.iter().enumerate() {
        let value = libc::rlimit {
            rlim_cur: limit.soft,
            rlim_max: limit.hard,
        };
        // SAFETY: reads `value`, which lives.
        let result = unsafe { libc::setrlimit(limit.resource, &raw const value) };
        Errno::result(result).map(drop).at(Step::Rlimit, index)?;
    }
    Ok(())
}

/// An image's working directory that does not exist is made, as every runtime
/// does.
fn enter_cwd(identity: &Identity) -> Result<()> {
    let cwd = identity.cwd.as_c_str();
    match chdir(cwd) {
        Err(Errno::ENOENT) => {
            make_directories(cwd, 0o755).at(Step::Cwd, 0)?;
            chdir(cwd).at(Step::Cwd, 0)
        }
        result => result.at(Step::Cwd, 0),
    }
}

/// Takes the user's ids, with all capabilities kept for the steps that follow.
fn become_user(identity: &Identity) -> Result<()> {
    // SAFETY: sets this process's umask.
    unsafe { libc::umask(identity.umask.unwrap_or(0o022)) };
    drop_bounding_set(identity.capabilities)?;
    if identity.uid != 0 {
        sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).at(Step::User, 0)?;
    }
    // The system calls, not the libc functions: those tell every thread.
    // SAFETY: reads `groups`, which lives, and takes integers.
    unsafe {
        let groups = &identity.groups;
        Errno::result(libc::syscall(
            libc::SYS_setgroups,
            groups.len(),
            groups.as_ptr(),
        ))
        .at(Step::Groups, 0)?;
        let (uid, gid) = (identity.uid, identity.gid);
        if gid != 0 {
            Errno::result(libc::syscall(libc::SYS_setresgid, gid, gid, gid)).at(Step::User, 1)?;
        }
        if uid != 0 {
            Errno::result(libc::syscall(libc::SYS_setresuid, uid, uid, uid)).at(Step::User, 2)?;
        }
    }
    Ok(())
}

fn drop_bounding_set(capabilities: Capabilities) -> Result<()> {
    for capability in 0..=LAST_CAPABILITY {
        if capabilities.bounding & (1 << capability) == 0 {
            match sys::prctl(libc::PR_CAPBSET_DROP, u64::from(capability), 0) {
                // A kernel that does not know the capability.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno).at(Step::CapabilityBounds, capability as usize),
            }
        }
    }
    Ok(())
}

/// The last steps, in the one order that works: a filter without
/// no_new_privs needs CAP_SYS_ADMIN, and nothing after it may need a call that
/// the filter refuses, beyond `capset`, `prctl` and `execve`.
fn drop_privileges(identity: &Identity) -> Result<()> {
    if identity.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).at(Step::NoNewPrivileges, 0)?;
        set_capabilities(identity)?;
        install_filter(identity)
    } else {
        if identity.seccomp.is_some() && identity.uid != 0 {
            // setresuid has emptied the effective set, KEEPCAPS only kept the
            // permitted one.
            let all = u64::MAX >> (63 - LAST_CAPABILITY);
            let sets = CapSets {
                effective: all,
                permitted: all,
                inheritable: 0,
            };
            sys::capset(sets).at(Step::Capabilities, 0)?;
        }
        install_filter(identity)?;
        set_capabilities(identity)
    }
}

fn install_filter(identity: &Identity) -> Result<()> {
    match &identity.seccomp {
        Some(filter) => sys::seccomp_filter(&filter.program, filter.flags).at(Step::Seccomp, 0),
        None => Ok(()),
    }
}

fn set_capabilities(identity: &Identity) -> Result<()> {
    let capabilities = identity.capabilities;
    let sets = CapSets {
        effective: capabilities.effective,
        permitted: capabilities.permitted,
        inheritable: capabilities.inheritable,
    };
    sys::capset(sets).at(Step::Capabilities, 1)?;
    for capability in 0..=LAST_CAPABILITY {
        if capabilities.ambient & (1 << capability) != 0 {
            let raise = libc::PR_CAP_AMBIENT_RAISE as u64;
            sys::prctl(libc::PR_CAP_AMBIENT, raise, u64::from(capability))
                .at(Step::Capabilities, 2)?;
        }
    }
    Ok(())
}

/// Tells the parent that all is set up, the terminal's master beside it, and
/// waits for its byte. The parent's death ends the wait and the process.
fn wait_for_start(plan: &Plan, terminal: Option<std::os::fd::OwnedFd>) -> Result<()> {
    send_ready(
        plan.channel.as_raw_fd(),
        terminal.as_ref().map(AsRawFd::as_raw_fd),
    )
    .at(Step::Wait, 0)?;
    drop(terminal);
    let mut byte = [0u8; 1];
    match nix::unistd::read(&plan.channel, &mut byte) {
        Ok(1) => Ok(()),
        Ok(_) => Err(Errno::ECANCELED).at(Step::Wait, 1),
        Err(errno) => Err(errno).at(Step::Wait, 1),
    }
}

#[repr(C, align(8))]
struct ControlBuffer([u8; 32]);

fn send_ready(channel: RawFd, terminal: Option<RawFd>) -> sys::Result<()> {
    let bytes: [u8; MESSAGE_LEN] = Message::Ready.encode();
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut control = ControlBuffer([0; 32]);
    // SAFETY: `msghdr` is plain data, for which zero is valid. The control
    // buffer is aligned for a header and holds one descriptor
    // (CMSG_SPACE(4) = 24); everything pointed at outlives the call.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        if let Some(fd) = terminal {
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
        }
        Errno::result(libc::sendmsg(channel, &raw const message, 0)).map(drop)
    }
}

/// Tries each path as `execvp` does: one that is missing or not executable
/// does not end the search.
fn exec(program: &Program) -> Result<Infallible> {
    let mut error = Errno::ENOENT;
    for candidate in &program.candidates {
        // SAFETY: both arrays end with null and hold pointers to C strings
        // that live until the process image is replaced.
        unsafe {
            libc::execve(
                candidate.as_ptr(),
                program.argv.as_ptr(),
                program.envp.as_ptr(),
            );
        }
        match Errno::last() {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => error = Errno::EACCES,
            errno => {
                error = errno;
                break;
            }
        }
    }
    // A script or program that is there but whose interpreter is not.
    let there = |path: &&std::ffi::CString| {
        // SAFETY: a C string that lives.
        error == Errno::ENOENT && unsafe { libc::access(path.as_ptr(), libc::F_OK) } == 0
    };
    if program.candidates.iter().any(|path| there(&path)) {
        error = Errno::ELIBACC;
    }
    Err(error).at(Step::Exec, 0)
}

fn write_file(path: &CStr, value: &CStr) -> sys::Result<()> {
    let file = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(&file, value.to_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_paths_are_written_without_allocating() {
        for number in [0, 7, 10, 4095, u32::MAX] {
            let mut buffer = [0; 32];
            let path = terminal_path(&mut buffer, number);
            assert_eq!(path.to_str().unwrap(), format!("/dev/pts/{number}"));
        }
    }

    #[test]
    fn directories_are_made_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = std::ffi::CString::new(format!("{}/a/b/c", dir.path().display())).unwrap();
        make_directories(&path, 0o755).unwrap();
        make_directories(&path, 0o755).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
        let file = std::ffi::CString::new(format!("{}/x/y/file", dir.path().display())).unwrap();
        make_parent(&file).unwrap();
        make_file(&file).unwrap();
        assert!(dir.path().join("x/y/file").is_file());
    }
}
