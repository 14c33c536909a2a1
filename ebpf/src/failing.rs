//! Destinations behind a tunnel that could not be reached a moment ago. A redirected `connect()` always
//! finds reeve's listener, so that it would succeed for a far end that is down; here it fails at once, as it
//! does without reeve.

use aya_ebpf::helpers::{bpf_ktime_get_ns, generated::bpf_set_retval};
use reeve_common::{
    FAILING_FORGOTTEN_NANOSECONDS, FAILING_TRIAL_NANOSECONDS, FailingEntry, FailingKey,
};

use crate::{
    event::{Connection, Outcome},
    maps::FAILING,
};

/// `MAX_ERRNO`.
const LARGEST_ERROR: u32 = 4095;

/// Has the call fail with its error if connections of the workload to its destination have just failed.
/// Gives what is told of it.
#[inline(always)]
pub fn fail(connection: &Connection) -> Option<Outcome> {
    let key = FailingKey {
        remote: connection.remote,
        workload: connection.workload,
        remote_port: connection.remote_port,
        reserved: 0,
    };
    let entry = FAILING.get_ptr_mut(&key)?;
    // SAFETY: asking for the time has no condition.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the entry stays readable until the program ends.
    let FailingEntry {
        until,
        trial_until,
        error,
        reason,
    } = unsafe { *entry };
    if until == 0 || now > until.saturating_add(FAILING_FORGOTTEN_NANOSECONDS) {
        return None;
    }
    if now >= until && now >= trial_until {
        // This one tries. Two processors that come here at once let two of them try.
        // SAFETY: as above.
        unsafe { (*entry).trial_until = now + FAILING_TRIAL_NANOSECONDS };
        return None;
    }
    // Linux 7 wants to see that it is an error.
    let error = error & LARGEST_ERROR;
    // SAFETY: setting the call's error has no condition.
    unsafe { bpf_set_retval(-(error as i32)) };
    // A reason alone: refused.
    Some(Outcome::from_number(reason & u32::from(u8::MAX)))
}
