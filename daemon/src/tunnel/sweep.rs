//! Housekeeping of a worker: what needs no exact time, once a second and for all at once, so that
//! no connection carries a timer.

use std::{
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use reeve_common::Reason;
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    identity::{RejectReason, Svid, TrustBundles, verify_chain},
    telemetry::Role,
};

use super::{
    link::{Ends, Link, Order},
    worker::Worker,
};

/// Exactness of every time-out that is looked after here.
const TICK: Duration = Duration::from_secs(1);

/// Sweeps once a second, and when an identity or a trust bundle has changed.
pub(super) async fn run(worker: Rc<Worker>) {
    let mut changes = worker.shared.identities.changes();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => sweep(&worker),
            changed = changes.changed() => {
                if changed.is_err() {
                    // The store is gone: the daemon is ending.
                    return;
                }
                check_identities(&worker);
            }
        }
    }
}

fn sweep(worker: &Rc<Worker>) {
    let now = Instant::now();
    let wall_clock = SystemTime::now();
    // The wall clock at every tick: a clock that was set makes no certificate live longer.
    worker.links.for_each(|link| {
        // A bundle may have changed between the handshake and the tunnel's first change.
        look_after(worker, link, wall_clock);
        let left = link.not_after().duration_since(wall_clock);
        if expires_soon(
            left.unwrap_or_default(),
            link.age(now),
            worker.timeouts.drain,
        ) {
            link.retire();
        }
        if link.outdated(now) >= Some(worker.timeouts.outdated) {
            link.close(Reason::CertificateReplaced);
        }
        if link.ends.role == Role::Server {
            sweep_server(worker, link, now);
        }
    });
    worker.pool.sweep(worker, now);
    worker.stop_closed();
    sweep_connections(worker, now);
    worker.stash.tidy();
}

/// Whether a tunnel whose certificates have this much left is to take no more streams, so that
/// those it has can end by themselves. A peer may keep a tunnel for as long as it has certificates,
/// as ztunnel does; the next tunnel is opened with renewed ones. Never before half of the time that
/// the tunnel had: where a peer does not renew, each next one lives half as long, and not a moment.
fn expires_soon(left: Duration, age: Duration, drain: Duration) -> bool {
    left <= drain && left <= age
}

/// The client's tunnels are the pool's to look after. The server's grace is longer by a drain: it
/// is the client that knows best when a tunnel is of no more use.
fn sweep_server(worker: &Worker, link: &Link, now: Instant) {
    let limits = &worker.timeouts;
    let idle = link.idle(now).unwrap_or_default();
    match link.order() {
        Order::Serve if !link.has_served() && idle >= limits.request => link.retire(),
        Order::Serve if idle >= limits.tunnel_idle + limits.drain => link.retire(),
        Order::Retire if idle >= limits.drain => link.close(Reason::Timeout),
        _ => {}
    }
}

fn sweep_connections(worker: &Worker, now: Instant) {
    let mut stalled: HashMap<*const Link, usize> = HashMap::new();
    worker.connections.for_each(|connection| {
        if connection.sweep(worker, now) {
            *stalled.entry(Rc::as_ptr(connection.link())).or_default() += 1;
        }
    });
    worker.links.for_each(|link| {
        link.set_stalled(stalled.get(&Rc::as_ptr(link)).copied().unwrap_or_default());
    });
}

/// Judges every tunnel again by the certificates that are in force now.
fn check_identities(worker: &Worker) {
    let now = SystemTime::now();
    worker.links.for_each(|link| look_after(worker, link, now));
    worker.pool.retire_outdated(&worker.shared.identities);
    worker.stop_closed();
}

/// Judges a tunnel again, and retires it where its own certificate was replaced.
fn look_after(worker: &Worker, link: &Link, now: SystemTime) {
    if let Some(svid) = judge(worker, link, now)
        && svid.generation != link.ends.generation
    {
        link.outdate(Instant::now());
    }
}

/// Judges a tunnel by the certificates of both ends, and ends it where one does not count. What was
/// judged by the same bundles is not looked at twice while it lasts: a change to one identity is to
/// cost nothing to the tunnels of the others. Gives the own certificate in force.
pub(super) fn judge(worker: &Worker, link: &Link, now: SystemTime) -> Option<Arc<Svid>> {
    let identities = &worker.shared.identities;
    let ends = &link.ends;
    let svid = identities.current(&ends.own);
    let used = svid
        .as_ref()
        .filter(|svid| svid.generation == ends.generation);
    let own = used.map_or(ends.own_not_after, |svid| svid.not_after);
    if own < now {
        link.close(Reason::CertificateExpired);
        return None;
    }
    let (Some(svid), Some(bundles)) = (svid, identities.trust_of(&ends.own)) else {
        link.close(Reason::NoCertificate);
        return None;
    };
    let accepted = link.accepted_until(&bundles).filter(|until| *until >= now);
    let peer = match accepted.map_or_else(|| verify_peer(&bundles, ends, now), Ok) {
        Ok(until) => until,
        Err(reason) => {
            link.close(reason.closing_reason());
            return None;
        }
    };
    link.accepted(bundles, peer);
    link.expires(peer.min(own));
    Some(svid)
}

/// Until when the peer's chain is good.
fn verify_peer(
    bundles: &TrustBundles,
    ends: &Ends,
    now: SystemTime,
) -> Result<SystemTime, RejectReason> {
    let (leaf, intermediates) = ends.chain.split_first().ok_or(RejectReason::Malformed)?;
    let verified = verify_chain(bundles, leaf, intermediates, now)?;
    if verified.id == ends.peer {
        Ok(verified.not_after)
    } else {
        Err(RejectReason::WrongIdentity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_retires_a_drain_before_its_certificates_expire_and_not_before_half_of_its_time() {
        let seconds = Duration::from_secs;
        let drain = seconds(30);
        // Opened with an hour to go.
        assert!(!expires_soon(seconds(31), seconds(3569), drain));
        assert!(expires_soon(seconds(30), seconds(3570), drain));
        // Opened with 20 seconds to go.
        assert!(!expires_soon(seconds(11), seconds(9), drain));
        assert!(expires_soon(seconds(10), seconds(10), drain));
    }
}
