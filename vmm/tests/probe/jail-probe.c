/*
 * Stands in for a program that has been taken over: tries what that would try
 * and says what came of it, a line each.
 *
 *   probe NAME OUTCOME     0, an errno's number, or "signal N"
 *   probes COUNT
 *
 * `seal=fd:N` among its arguments is done first, as by the guest's kernel of
 * the uml machine: the filter is read from the descriptor and installed, and a
 * byte is written back. `unsealed` leaves that out. `only=NAME` tries that alone
 * and exits with 3 if it fails. It needs no file and no library.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/perf_event.h>
#include <linux/seccomp.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef __NR_memfd_secret
#define __NR_memfd_secret 447
#endif
#ifndef __NR_fchmodat2
#define __NR_fchmodat2 452
#endif

static int count;
static int failures;
static const char *only;
static const char *name;
static int isolated;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
	char line[128];
	va_list args;
	va_start(args, format);
	int length = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	/* What is left of a line is a test's failure. */
	if (write(1, line, length) != length)
		_exit(9);
}

/* In a child where there can be one, so that what succeeds changes nothing. */
static int begin(const char *what)
{
	int status;

	if (only && strcmp(only, what) != 0)
		return 0;
	name = what;
	count++;
	long child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	isolated = child >= 0;
	errno = 0;
	if (child <= 0)
		return 1;
	while (waitpid(child, &status, __WALL) < 0 && errno == EINTR)
		;
	failures += status != 0;
	if (WIFSIGNALED(status))
		say("probe %s signal %d\n", name, WTERMSIG(status));
	else
		say("probe %s %d\n", name, WEXITSTATUS(status));
	return 0;
}

static void end(long result)
{
	int outcome = result < 0 ? errno : 0;

	if (isolated)
		_exit(outcome);
	failures += outcome != 0;
	say("probe %s %d\n", name, outcome);
}

#define TRY(what, call) do { if (begin(what)) end(call); } while (0)

static long connect_unix(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	size_t length = strlen(path);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	if (fd < 0)
		return fd;
	memcpy(address.sun_path, path, length);
	/* An abstract name begins with a zero, written here as an @. */
	if (path[0] == '@')
		address.sun_path[0] = '\0';
	return connect(fd, (struct sockaddr *) &address,
		       offsetof(struct sockaddr_un, sun_path) + length + (path[0] != '@'));
}

static long connect_vsock(void)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = 2, .svm_port = 1,
	};
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK, 0);

	return fd < 0 ? fd : connect(fd, (struct sockaddr *) &address, sizeof(address));
}

static long read_of(const char *path)
{
	char byte;
	int fd = open(path, O_RDONLY | O_NONBLOCK);

	if (fd < 0)
		return fd;
	long n = read(fd, &byte, 1);
	close(fd);
	return n;
}

static long device_node(void)
{
	long made = mknod("/tmp/node", S_IFCHR | 0666, 0x105);

	return made < 0 ? made : open("/tmp/node", O_RDONLY);
}

static long vm_readv(pid_t pid)
{
	char byte;
	struct iovec here = { &byte, 1 }, there = { (void *) 0x400000, 1 };

	return syscall(SYS_process_vm_readv, pid, &here, 1, &there, 1, 0);
}

static long vm_writev(pid_t pid)
{
	char byte = 0;
	struct iovec here = { &byte, 1 }, there = { (void *) 0x400000, 1 };

	return syscall(SYS_process_vm_writev, pid, &here, 1, &there, 1, 0);
}

static long take_fd(pid_t pid)
{
	int pidfd = syscall(SYS_pidfd_open, pid, 0);

	return pidfd < 0 ? pidfd : syscall(SYS_pidfd_getfd, pidfd, 0, 0);
}

static long bpf_map(void)
{
	union bpf_attr attributes;

	memset(&attributes, 0, sizeof(attributes));
	attributes.map_type = BPF_MAP_TYPE_ARRAY;
	attributes.key_size = attributes.value_size = 4;
	attributes.max_entries = 1;
	return syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof(attributes));
}

static long perf(void)
{
	struct perf_event_attr attributes;

	memset(&attributes, 0, sizeof(attributes));
	attributes.type = PERF_TYPE_SOFTWARE;
	attributes.size = sizeof(attributes);
	attributes.exclude_kernel = 1;
	return syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0);
}

static long io_uring(void)
{
	char parameters[120];

	memset(parameters, 0, sizeof(parameters));
	return syscall(SYS_io_uring_setup, 1, parameters);
}

static long handle(void)
{
	struct { struct file_handle head; char rest[128]; } file;
	int mount;

	memset(&file, 0, sizeof(file));
	file.head.handle_bytes = 128;
	return name_to_handle_at(AT_FDCWD, "/", &file.head, &mount, 0);
}

static long by_handle(void)
{
	struct { struct file_handle head; char rest[128]; } file;

	memset(&file, 0, sizeof(file));
	file.head.handle_bytes = 8;
	file.head.handle_type = 1;
	return open_by_handle_at(AT_FDCWD, &file.head, O_RDONLY);
}

static long drop_caps(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2];

	memset(data, 0xff, sizeof(data));
	return syscall(SYS_capset, &header, data);
}

static long limit(pid_t pid)
{
	struct rlimit64 wanted = { 1 << 20, 1 << 20 };

	return syscall(SYS_prlimit64, pid, RLIMIT_NOFILE, &wanted, NULL);
}

static long fifo(void)
{
	struct sched_param parameters = { .sched_priority = 1 };

	return syscall(SYS_sched_setscheduler, 0, SCHED_FIFO, &parameters);
}

static long set_clock(void)
{
	struct timespec now = { .tv_sec = 1 };

	return syscall(SYS_clock_settime, CLOCK_REALTIME, &now);
}

static long other_filter(unsigned long flags)
{
	struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = { 1, &allow };

	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static long thread_of_own(void)
{
	static char stack[4096];
	/* As pthread_create asks for it; exits at once. */
	return syscall(SYS_clone, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND |
		       CLONE_THREAD | CLONE_SYSVSEM, stack, 0, 0, 0) == 0 ? syscall(SYS_exit, 0)
									 : (errno ? -1 : 0);
}

static long clone3(unsigned long long flags)
{
	unsigned long long arguments[11] = { flags, 0, 0, 0, SIGCHLD };
	long child = syscall(SYS_clone3, arguments, sizeof(arguments));

	if (child == 0)
		_exit(0);
	return child;
}

/* Calls of another architecture, which have other numbers. */
static long by_int80(long number)
{
#ifdef __x86_64__
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(number)
			 : "memory", "r8", "r9", "r10", "r11");
	if (result < 0) {
		errno = -result;
		return -1;
	}
	return result;
#else
	(void) number;
	errno = EPERM;
	return -1;
#endif
}

#define X32 0x40000000

static void files(void)
{
	TRY("open a volume", open("/shared", O_RDONLY | O_DIRECTORY));
	TRY("open a file of a volume", open("/shared/volume/file", O_RDWR));
	TRY("create in a volume", open("/shared/volume/new", O_CREAT | O_WRONLY, 0600));
	TRY("open a device of the node", open("/shared/volume/device", O_RDWR));
	TRY("make a device node", device_node());
	TRY("mknodat", mknodat(AT_FDCWD, "/tmp/x", S_IFBLK | 0600, 0x800));
	TRY("write into /run", open("/run/x", O_CREAT | O_WRONLY, 0600));
	TRY("write into /tmp", open("/tmp/x", O_CREAT | O_WRONLY, 0600));
	TRY("openat2", syscall(SYS_openat2, AT_FDCWD, "/", (unsigned long long[3]){ 0 }, 24));
	TRY("mkdir", mkdir("/tmp/directory", 0700));
	TRY("symlink", symlink("/", "/tmp/link"));
	TRY("link", link("/proc/self/exe", "/tmp/hard"));
	TRY("rename", rename("/run/0", "/run/1"));
	TRY("unlink", unlink("/run/0"));
	TRY("rmdir", rmdir("/tmp"));
	TRY("chmod", chmod("/shared", 0777));
	TRY("fchmod", fchmod(0, 0777));
	TRY("fchmodat2", syscall(__NR_fchmodat2, AT_FDCWD, "/tmp", 0777, 0));
	TRY("chown", chown("/tmp", 0, 0));
	TRY("truncate", truncate("/run/0", 0));
	TRY("setxattr", syscall(SYS_setxattr, "/tmp", "user.x", "x", 1, 0));
	TRY("stat", syscall(SYS_newfstatat, AT_FDCWD, "/", (char[256]){ 0 }, 0));
	TRY("statx", syscall(SYS_statx, AT_FDCWD, "/", 0, 0, (char[256]){ 0 }));
	TRY("readlink", readlink("/proc/self/exe", (char[64]){ 0 }, 64));
	TRY("name_to_handle_at", handle());
	TRY("open_by_handle_at", by_handle());
	TRY("inotify", syscall(SYS_inotify_init1, 0));
	TRY("fanotify", syscall(SYS_fanotify_init, 0, O_RDONLY));
	TRY("execve", execve("/shared/volume/file", (char *[]){ "x", NULL }, NULL));
	/* By a path all the same: what it names is not seen by a filter. */
	TRY("execveat of a file that is missing",
	    syscall(SYS_execveat, AT_FDCWD, "/missing", (char *[]){ "x", NULL }, NULL, AT_EMPTY_PATH));
	TRY("execveat without a descriptor",
	    syscall(SYS_execveat, AT_FDCWD, "/missing", (char *[]){ "x", NULL }, NULL, 0));
	TRY("memfd_create", memfd_create("x", 0));
	TRY("memfd_secret", syscall(__NR_memfd_secret, 0));
}

static void proc(void)
{
	TRY("read /proc/1/mem", read_of("/proc/1/mem"));
	TRY("read /proc/1/maps", read_of("/proc/1/maps"));
	TRY("read /proc/1/environ", read_of("/proc/1/environ"));
	TRY("list /proc/1/fd", open("/proc/1/fd", O_RDONLY | O_DIRECTORY));
	TRY("read /proc/kcore", read_of("/proc/kcore"));
	TRY("read /proc/kallsyms", read_of("/proc/kallsyms"));
	TRY("read /proc/keys", read_of("/proc/keys"));
	TRY("read /proc/mounts", read_of("/proc/self/mountinfo"));
	TRY("write core_pattern", open("/proc/sys/kernel/core_pattern", O_WRONLY));
	TRY("write oom_score_adj", open("/proc/self/oom_score_adj", O_WRONLY));
	TRY("reopen standard input", open("/proc/self/fd/0", O_RDWR));
	TRY("reopen the console", open("/proc/self/fd/1", O_RDONLY | O_NONBLOCK));
}

static void namespaces(void)
{
	TRY("unshare user", unshare(CLONE_NEWUSER));
	TRY("unshare user and net", unshare(CLONE_NEWUSER | CLONE_NEWNET));
	TRY("unshare mount", unshare(CLONE_NEWNS));
	TRY("unshare pid", unshare(CLONE_NEWPID));
	TRY("unshare files", unshare(CLONE_FILES));
	TRY("setns", setns(0, 0));
	TRY("clone user", syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0) == 0
	    ? syscall(SYS_exit, 0) : (errno ? -1 : 0));
	TRY("clone user as a stub",
	    syscall(SYS_clone, CLONE_VFORK | CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0) == 0
	    ? syscall(SYS_exit, 0) : (errno ? -1 : 0));
	TRY("clone a process", syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) == 0
	    ? syscall(SYS_exit, 0) : (errno ? -1 : 0));
	TRY("clone a thread", thread_of_own());
#ifdef SYS_fork
	TRY("fork", syscall(SYS_fork) == 0 ? syscall(SYS_exit, 0) : (errno ? -1 : 0));
#endif
	TRY("clone3", clone3(0));
	TRY("clone3 user", clone3(CLONE_NEWUSER));
	TRY("mount", mount("x", "/tmp", "tmpfs", 0, NULL));
	TRY("umount", umount2("/shared", MNT_DETACH));
	TRY("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
	TRY("move_mount", syscall(SYS_move_mount, AT_FDCWD, "/tmp", AT_FDCWD, "/run", 0));
	TRY("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
	TRY("mount_setattr", syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, (char[32]){ 0 }, 32));
	TRY("pivot_root", syscall(SYS_pivot_root, "/", "/tmp"));
	TRY("chroot", chroot("/tmp"));
	TRY("sethostname", sethostname("x", 1));
}

static void sockets(void)
{
	TRY("socket inet", socket(AF_INET, SOCK_DGRAM, 0));
	TRY("socket inet6", socket(AF_INET6, SOCK_STREAM, 0));
	TRY("socket packet", socket(AF_PACKET, SOCK_RAW, 0));
	TRY("socket netlink route", socket(AF_NETLINK, SOCK_RAW, 0));
	TRY("socket netlink audit", socket(AF_NETLINK, SOCK_RAW, 9));
	TRY("socket netlink netfilter", socket(AF_NETLINK, SOCK_RAW, 12));
	TRY("socket netlink uevent", socket(AF_NETLINK, SOCK_RAW, 15));
	TRY("socket vsock", connect_vsock());
	TRY("socket alg", socket(AF_ALG, SOCK_SEQPACKET, 0));
	TRY("socket tipc", socket(AF_TIPC, SOCK_SEQPACKET, 0));
	TRY("socket bluetooth", socket(AF_BLUETOOTH, SOCK_RAW, 0));
	TRY("socket xdp", socket(AF_XDP, SOCK_RAW, 0));
	TRY("socket unix", socket(AF_UNIX, SOCK_STREAM, 0));
	TRY("connect to an abstract name", connect_unix("@/tmp/.X11-unix/X0"));
	TRY("connect to the daemon", connect_unix("/run/drupe/drupe.sock"));
	TRY("connect to a device", connect_unix("/run/0"));
	TRY("bind", bind(0, (struct sockaddr *) &(struct sockaddr_un){ AF_UNIX, "/tmp/s" }, 10));
	TRY("listen", listen(0, 1));
	TRY("accept", accept(0, NULL, NULL));
	TRY("socketpair unix datagram", socketpair(AF_UNIX, SOCK_DGRAM, 0, (int[2]){ 0 }));
	TRY("socketpair tipc", socketpair(AF_TIPC, SOCK_STREAM, 0, (int[2]){ 0 }));
}

static void processes(void)
{
	int self = getpid();

	TRY("ptrace attach the monitor", ptrace(PTRACE_ATTACH, 1, 0, 0));
	TRY("ptrace seize the monitor", ptrace(PTRACE_SEIZE, 1, 0, 0));
	TRY("ptrace peek", (errno = 0, ptrace(PTRACE_PEEKDATA, 1, 0x400000, 0), errno ? -1 : 0));
	TRY("process_vm_readv the monitor", vm_readv(1));
	TRY("process_vm_writev the monitor", vm_writev(1));
	TRY("pidfd_getfd of the monitor", take_fd(1));
	TRY("kcmp", syscall(SYS_kcmp, self, 1, 0, 0, 0));
	TRY("kill a process outside", kill(self + 100000, 0));
	TRY("limits of the monitor", limit(1));
	TRY("limits of its own", limit(0));
	TRY("sched fifo", fifo());
	TRY("nice -20", setpriority(PRIO_PROCESS, 0, -20));
	TRY("ioprio", syscall(SYS_ioprio_set, 1, 0, 1 << 13));
	TRY("process_madvise", syscall(SYS_process_madvise, -1, NULL, 0, 0, 0));
	TRY("setuid 0", setuid(0));
	TRY("setgid 0", setgid(0));
	TRY("setresuid 0", setresuid(0, 0, 0));
	TRY("setgroups", syscall(SYS_setgroups, 0, NULL));
	TRY("capset", drop_caps());
	TRY("prctl dumpable", prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
	TRY("prctl ptracer", prctl(PR_SET_PTRACER, -1, 0, 0, 0));
	TRY("prctl seccomp", prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0));
	TRY("prctl securebits", prctl(PR_SET_SECUREBITS, 0, 0, 0, 0));
	TRY("prctl mm", prctl(PR_SET_MM, PR_SET_MM_BRK, 0, 0, 0));
	TRY("prctl speculation", prctl(PR_SET_SPECULATION_CTRL, 0, 0, 0, 0));
	TRY("personality", personality(0xffffffff));
	TRY("a filter with a listener", other_filter(SECCOMP_FILTER_FLAG_NEW_LISTENER));
	TRY("a filter without the others", other_filter(0));
#ifdef __x86_64__
	TRY("arch_prctl of state components", syscall(SYS_arch_prctl, 0x1023, 18));
	TRY("iopl", syscall(SYS_iopl, 3));
	TRY("ioperm", syscall(SYS_ioperm, 0x60, 1, 1));
	TRY("modify_ldt", syscall(SYS_modify_ldt, 0, (char[64]){ 0 }, 64));
#endif
	TRY("32-bit call", by_int80(20));
	TRY("x32 call", syscall(X32 | SYS_getpid));
}

static void kernel(void)
{
	TRY("bpf", bpf_map());
	TRY("perf_event_open", perf());
	TRY("userfaultfd", syscall(SYS_userfaultfd, 1));
	TRY("io_uring", io_uring());
	TRY("io_setup", syscall(SYS_io_setup, 1, (unsigned long[1]){ 0 }));
	TRY("keyctl session", syscall(SYS_keyctl, 1, NULL));
	TRY("keyctl user keyring", syscall(SYS_keyctl, 6, -4, NULL, 0));
	TRY("add_key", syscall(SYS_add_key, "user", "x", "x", 1, -2));
	TRY("request_key", syscall(SYS_request_key, "user", "x", NULL, -2));
	TRY("quotactl", syscall(SYS_quotactl, 0, NULL, 0, NULL));
	TRY("reboot", syscall(SYS_reboot, 0xfee1dead, 672274793, 0, NULL));
	TRY("init_module", syscall(SYS_init_module, NULL, 0, ""));
	TRY("finit_module", syscall(SYS_finit_module, 0, "", 0));
	TRY("kexec_load", syscall(SYS_kexec_load, 0, 0, NULL, 0));
	TRY("swapon", syscall(SYS_swapon, "/tmp/x", 0));
	TRY("acct", syscall(SYS_acct, NULL));
	TRY("syslog", syscall(SYS_syslog, 2, (char[16]){ 0 }, 16));
	TRY("clock_settime", set_clock());
	TRY("adjtimex", syscall(SYS_adjtimex, NULL));
	TRY("mlockall", mlockall(MCL_CURRENT));
	TRY("mbind", syscall(SYS_mbind, NULL, 0, 0, NULL, 0, 0));
	TRY("move_pages", syscall(SYS_move_pages, 0, 0, NULL, NULL, NULL, 0));
	TRY("shmget", syscall(SYS_shmget, 0, 4096, 0600));
	TRY("msgget", syscall(SYS_msgget, 0, 0600));
	TRY("mq_open", syscall(SYS_mq_open, "x", O_CREAT, 0600, NULL));
	TRY("splice", syscall(SYS_splice, 0, NULL, 1, NULL, 1, 0));
	TRY("landlock", syscall(SYS_landlock_create_ruleset, NULL, 0, 1));
	TRY("ioctl TIOCSTI", ioctl(0, TIOCSTI, "x"));
	TRY("ioctl FIONREAD", ioctl(0, FIONREAD, (int[1]){ 0 }));
	TRY("fcntl F_SETLEASE", fcntl(1, F_SETLEASE, F_UNLCK));
	TRY("fcntl F_SETPIPE_SZ", fcntl(1, F_SETPIPE_SZ, 1 << 20));
	TRY("mmap huge pages", (long) mmap(NULL, 2 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS |
					   MAP_HUGETLB, -1, 0) == -1 ? -1 : 0);
	TRY("mmap locked", (long) mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS |
				       MAP_LOCKED, -1, 0) == -1 ? -1 : 0);
	TRY("mprotect", mprotect((void *) ((long) &count & -4096L), 4096, PROT_READ | PROT_WRITE));
	TRY("mremap", (long) mremap((void *) ((long) &count & -4096L), 4096, 4096, 0) == -1 ? -1 : 0);
	TRY("no call at all", syscall(1000));
}

/* What the role is for stays open, or the rest proves nothing. */
static void open_ones(void)
{
	TRY("getpid", syscall(SYS_getpid));
	TRY("anonymous memory", (long) mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
					    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == -1 ? -1 : 0);
	TRY("socketpair unix stream", socketpair(AF_UNIX, SOCK_STREAM, 0, (int[2]){ 0 }));
	TRY("getrandom", syscall(SYS_getrandom, (char[8]){ 0 }, 8, 0));
}

static int seal(int fd)
{
	static struct sock_filter filter[BPF_MAXINSNS];
	struct sock_fprog program = { .filter = filter };
	size_t size = 0;
	ssize_t n;

	do {
		n = read(fd, (char *) filter + size, sizeof(filter) - size);
		if (n < 0)
			return -1;
		size += n;
	} while (n > 0);
	program.len = size / sizeof(filter[0]);
	if (program.len == 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return -1;
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0)
		return -1;
	return write(fd, "", 1) == 1 ? 0 : -1;
}

int main(int argc, char **argv)
{
	int fd = -1;

	for (int i = 1; i < argc; i++) {
		if (strncmp(argv[i], "seal=fd:", 8) == 0)
			fd = atoi(argv[i] + 8);
		if (strncmp(argv[i], "only=", 5) == 0)
			only = argv[i] + 5;
	}
	for (int i = 1; i < argc; i++)
		if (strcmp(argv[i], "unsealed") == 0)
			fd = -1;
	if (fd >= 0 && seal(fd) < 0) {
		say("cannot seal: %d\n", errno);
		return 1;
	}
	open_ones();
	files();
	proc();
	namespaces();
	sockets();
	processes();
	kernel();
	say("probes %d\n", count);
	return only && failures ? 3 : 0;
}
