//! Why a wall does not stand: the kernel has none, or something that reeve was started under
//! refuses the call.

use std::{error::Error, io};

/// `LANDLOCK_CREATE_RULESET_VERSION`: asks which Landlock there is, and makes nothing.
const WHICH_VERSION: libc::c_ulong = 1;

/// What a system call's error means, and what to do.
pub(super) fn explain(call: &str, error: &io::Error) -> String {
    let meaning = match error.raw_os_error() {
        // The kernel itself gives neither for a call that it has: reeve may not gain privileges.
        Some(libc::EPERM | libc::EACCES) => {
            "not by the kernel, which has it, but by a filter of system calls that reeve was started \
             under: allow it in the unit's `SystemCallFilter=` or the container's seccomp profile"
        }
        Some(libc::ENOSYS) => {
            "the kernel does not have it, or a container's seccomp profile says so"
        }
        Some(libc::EOPNOTSUPP) => {
            "the kernel has it switched off: add `landlock` to the kernel parameter `lsm=`"
        }
        _ => "the kernel has it not, or not in this way",
    };
    format!("{call} is refused ({error}), {meaning}")
}

/// The same for an error that has the system call's own among its causes.
pub(super) fn explain_cause(call: &str, error: &(dyn Error + 'static)) -> String {
    let mut cause = Some(error);
    while let Some(found) = cause {
        if let Some(found) = found.downcast_ref::<io::Error>() {
            return explain(call, found);
        }
        cause = found.source();
    }
    error.to_string()
}

/// Why there is no Landlock.
pub(super) fn no_landlock() -> String {
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: without attributes, and with this flag, nothing is read or made.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, WHICH_VERSION) };
    match version {
        0.. => "Landlock is there and lacks what is asked of it".to_owned(),
        _ => explain("landlock_create_ruleset", &io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_above_is_told_from_a_kernel_that_lacks_the_call() {
        let said = |code| explain("seccomp", &io::Error::from_raw_os_error(code));
        assert!(
            said(libc::EPERM).contains("SystemCallFilter="),
            "{}",
            said(libc::EPERM)
        );
        assert!(said(libc::ENOSYS).contains("the kernel does not have it"));
        assert!(said(libc::EOPNOTSUPP).contains("lsm="));
        let inner = io::Error::from_raw_os_error(libc::EPERM);
        let wrapped = io::Error::other(inner);
        assert!(explain_cause("seccomp", &wrapped).contains("seccomp is refused"));
    }
}
