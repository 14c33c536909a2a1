//! Filters of system calls. What is refused fails with EPERM: a filter that is wrong shall cost
//! one operation, not the daemon.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::refusal;

/// Makes a filter.
pub(super) type Make = fn() -> Result<SeccompFilter, seccompiler::BackendError>;

/// `BPF_MAP_LOOKUP_ELEM`: reading the original destination of a connection.
const BPF_READ: u64 = 1;

/// Applies a filter to this thread and all that it will start.
pub(super) fn apply(make: Make) -> Result<(), String> {
    let program: BpfProgram = make()
        .and_then(TryInto::try_into)
        .map_err(|error| error.to_string())?;
    seccompiler::apply_filter(&program).map_err(|error| refusal::explain_cause("seccomp", &error))
}

/// What no thread of the daemon ever does. A list of what is refused rather than of what is
/// allowed: what decides has the privileges to get round any list.
pub(super) fn never() -> Result<SeccompFilter, seccompiler::BackendError> {
    let calls = [
        // Other programs, and other processes' memory.
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kcmp,
        libc::SYS_pidfd_getfd,
        libc::SYS_process_madvise,
        // The kernel itself, and the machine.
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_acct,
        libc::SYS_quotactl,
        libc::SYS_syslog,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        // The clock.
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_clock_adjtime,
        libc::SYS_adjtimex,
        // Other roots, and files by number.
        libc::SYS_chroot,
        libc::SYS_pivot_root,
        libc::SYS_open_by_handle_at,
        libc::SYS_fanotify_init,
        // Ways in which kernels were broken before, none of which is of use here.
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_personality,
        libc::SYS_vmsplice,
        // Other users.
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setreuid,
        libc::SYS_setregid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setgroups,
    ];
    filter(all(&calls), SeccompAction::Allow, DENIED)
}

/// What is left to a thread that reads what strangers send: its open sockets, the event loop,
/// memory, time and random numbers.
pub(super) fn exposed() -> Result<SeccompFilter, seccompiler::BackendError> {
    let calls = [
        // Sockets that are there. New ones are handed over open.
        libc::SYS_accept4,
        libc::SYS_bind,
        libc::SYS_connect,
        libc::SYS_listen,
        libc::SYS_shutdown,
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_close,
        libc::SYS_fcntl,
        libc::SYS_ioctl,
        libc::SYS_fstat,
        libc::SYS_dup,
        libc::SYS_dup3,
        // The event loop.
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_ppoll,
        libc::SYS_eventfd2,
        // Memory.
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_brk,
        // Time, random numbers, other threads.
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_gettimeofday,
        libc::SYS_nanosleep,
        libc::SYS_getrandom,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_geteuid,
        libc::SYS_getuid,
        // The thread's own end, and a panic's.
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_restart_syscall,
        libc::SYS_sigaltstack,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    let mut rules = all(&calls);
    #[cfg(target_arch = "x86_64")]
    rules.extend(all(&[libc::SYS_epoll_wait, libc::SYS_poll]));
    let first_is = |value: u64| {
        let is = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
        SeccompRule::new(vec![is])
    };
    rules.insert(libc::SYS_bpf, vec![first_is(BPF_READ)?]);
    // Signals go to this process only, as `abort` sends them.
    rules.insert(libc::SYS_tgkill, vec![first_is(std::process::id().into())?]);
    filter(rules, DENIED, SeccompAction::Allow)
}

const DENIED: SeccompAction = SeccompAction::Errno(libc::EPERM as u32);

/// Rules that match these calls whatever their arguments are.
fn all(calls: &[i64]) -> BTreeMap<i64, Vec<SeccompRule>> {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<SeccompFilter, seccompiler::BackendError> {
    let machine = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, otherwise, matched, machine)
}
