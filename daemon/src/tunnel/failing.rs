//! Destinations to which a workload's connections have just failed, so that its next `connect()` fails at
//! once (`ebpf/src/failing.rs`): by what failed here, until a connection stands again.

use std::{
    collections::HashMap,
    io,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use reeve_common::{FAILING_FORGOTTEN_NANOSECONDS, FailingEntry, FailingKey, Origin, WorkloadId};

use super::{TunnelError, error::Stage};
use crate::{
    datapath::{Sockets, monotonic_nanoseconds},
    telemetry::HandshakeReason,
};

/// For how long calls fail after the first connection that has.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Each further failure doubles it up to this: whoever comes back is not missed for longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// From then on a destination counts as one that has not failed.
const FORGOTTEN: Duration = Duration::from_nanos(FAILING_FORGOTTEN_NANOSECONDS);
/// Destinations of a workload that are remembered: one that tries many costs no other anything. Of more than
/// that connections are reset, as the first of each is.
const MOST: usize = 256;

/// What fails, for all workers.
pub(super) struct Failing {
    sockets: Sockets,
    noted: Mutex<HashMap<WorkloadId, HashMap<FailingKey, Noted>>>,
    /// Whether anything is noted: connections need not look otherwise.
    any: AtomicBool,
}

/// It stays until the programs, too, take the destination for one that has not failed.
#[derive(Clone, Copy)]
struct Noted {
    until: Instant,
    pause: Duration,
}

// === impl Failing ===

impl Failing {
    pub(super) fn new(sockets: Sockets) -> Self {
        Self {
            sockets,
            noted: Mutex::default(),
            any: AtomicBool::new(false),
        }
    }

    /// Notes that a connection has failed, where the far end is the cause.
    pub(super) fn failed(&self, origin: &Origin, error: &TunnelError) {
        let Some(number) = as_of_connect(error) else {
            return;
        };
        let now = Instant::now();
        let mut noted = self.noted();
        let key = key(origin);
        let of_workload = noted.entry(origin.workload).or_default();
        let last = of_workload.get(&key).copied();
        let last = last.filter(|last| now < last.until + FORGOTTEN);
        // Others that began before the first has failed tell nothing new.
        if last.is_some_and(|last| now < last.until) {
            return;
        }
        if last.is_none() && of_workload.len() >= MOST {
            of_workload.retain(|_, noted| now < noted.until + FORGOTTEN);
            if of_workload.len() >= MOST {
                return;
            }
        }
        let pause = last.map_or(FIRST_PAUSE, |last| (last.pause * 2).min(LONGEST_PAUSE));
        let until = now + pause;
        of_workload.insert(key, Noted { until, pause });
        self.any.store(true, Ordering::Relaxed);
        // In the lock: what is told last is what holds.
        let pause = u64::try_from(pause.as_nanos()).unwrap_or_default();
        self.sockets.set_failing(
            key,
            FailingEntry {
                until: monotonic_nanoseconds() + pause,
                trial_until: 0,
                error: number.unsigned_abs(),
                reason: error.reason() as u32,
            },
        );
    }

    /// Notes that a connection stands.
    pub(super) fn stands(&self, origin: &Origin) {
        if !self.any.load(Ordering::Relaxed) {
            return;
        }
        let mut noted = self.noted();
        let Some(of_workload) = noted.get_mut(&origin.workload) else {
            return;
        };
        let key = key(origin);
        if of_workload.remove(&key).is_some() {
            self.sockets.set_failing(key, FailingEntry::default());
        }
        if of_workload.is_empty() {
            noted.remove(&origin.workload);
        }
        if noted.is_empty() {
            self.any.store(false, Ordering::Relaxed);
        }
    }

    /// Forgets what has failed long ago.
    pub(super) fn sweep(&self) {
        if !self.any.load(Ordering::Relaxed) {
            return;
        }
        let now = Instant::now();
        let mut noted = self.noted();
        noted.retain(|_, of_workload| {
            of_workload.retain(|_, noted| now < noted.until + FORGOTTEN);
            !of_workload.is_empty()
        });
        if noted.is_empty() {
            self.any.store(false, Ordering::Relaxed);
        }
    }

    fn noted(&self) -> MutexGuard<'_, HashMap<WorkloadId, HashMap<FailingKey, Noted>>> {
        // Each change of it is whole.
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(origin: &Origin) -> FailingKey {
    FailingKey {
        remote: origin.address,
        workload: origin.workload,
        remote_port: origin.port,
        reserved: 0,
    }
}

/// The error that `connect()` would give without a tunnel; none where it would give none, or where this
/// node is the cause.
fn as_of_connect(error: &TunnelError) -> Option<i32> {
    match error {
        TunnelError::Connect { source, .. } => match source.kind() {
            io::ErrorKind::ConnectionRefused => Some(libc::ECONNREFUSED),
            io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::TimedOut => Some(libc::EHOSTUNREACH),
            // As of an address that this socket could not be bound to.
            _ => None,
        },
        TunnelError::Handshake {
            reason: HandshakeReason::NoOwnCertificate | HandshakeReason::Limit,
            ..
        } => None,
        TunnelError::Handshake { .. }
        | TunnelError::Timeout {
            stage: Stage::Connect | Stage::Handshake,
            ..
        } => Some(libc::EHOSTUNREACH),
        TunnelError::Answer {
            status: 503, said, ..
        } => match said.as_deref() {
            // Other implementations say nothing, and do not answer so for a want of their own.
            None => Some(libc::ECONNREFUSED),
            Some(said) if !said.starts_with("application_unreachable") => None,
            Some(said) if said.ends_with("unreachable") => Some(libc::EHOSTUNREACH),
            Some(_) => Some(libc::ECONNREFUSED),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// A workload's failures at so many ports.
    fn fail(failing: &Failing, workload: WorkloadId, ports: std::ops::Range<u16>) {
        let error = TunnelError::Answer {
            to: ([192, 0, 2, 1], 15008).into(),
            status: 503,
            said: None,
        };
        for port in ports {
            let origin = Origin {
                workload,
                port,
                ..Origin::default()
            };
            failing.failed(&origin, &error);
        }
    }

    #[test]
    fn who_fails_everywhere_takes_no_other_workloads_place_and_keeps_its_own() {
        let failing = Failing::new(crate::tunnel::tests::rig::sockets());
        fail(&failing, 1, 1..5000);
        fail(&failing, 2, 1..2);
        let noted = failing.noted();
        assert_eq!((noted[&1].len(), noted[&2].len()), (MOST, 1));
        drop(noted);
        // What is there is renewed though there is room for no more.
        std::thread::sleep(FIRST_PAUSE);
        fail(&failing, 1, 1..2);
        let key = FailingKey {
            workload: 1,
            remote_port: 1,
            ..FailingKey::default()
        };
        assert_eq!(failing.noted()[&1][&key].pause, FIRST_PAUSE * 2);
        failing.sweep();
        assert_eq!(failing.noted()[&1].len(), MOST, "it is not long ago");
    }

    #[test]
    fn what_the_far_application_said_is_what_connect_says() {
        let answer = |status, said: Option<&str>| {
            as_of_connect(&TunnelError::Answer {
                to: ([192, 0, 2, 1], 15008).into(),
                status,
                said: said.map(Arc::from),
            })
        };
        let refused = Some("application_unreachable: connection refused");
        assert_eq!(answer(503, refused), Some(libc::ECONNREFUSED));
        let no_way = Some("application_unreachable: host unreachable");
        assert_eq!(answer(503, no_way), Some(libc::EHOSTUNREACH));
        assert_eq!(answer(503, None), Some(libc::ECONNREFUSED));
        // Its node's cause, or the policy's.
        assert_eq!(answer(503, Some("limit")), None);
        assert_eq!(answer(503, Some("shutdown")), None);
        assert_eq!(answer(401, None), None);
    }
}
