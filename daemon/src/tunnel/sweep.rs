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
    link::{Link, Order},
    worker::Worker,
};

/// Exactness of every time-out that is looked after here.
const TICK: Duration = Duration::from_secs(1);
/// So many times as long as it has left, a tunnel was not proven again, and takes no more streams.
const UNPROVEN: u32 = 3;

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
    worker.failing.sweep();
    let wall_clock = SystemTime::now();
    // The wall clock at every tick: a clock that was set makes no certificate live longer.
    worker.links.for_each(|link| {
        // A bundle may have changed between the handshake and the tunnel's first change.
        look_after(worker, link, wall_clock);
        let left = link.not_after().duration_since(wall_clock);
        retire_in_time(worker, link, left.unwrap_or_default(), now);
        let limit = worker.timeouts.outdated;
        if limit != Duration::ZERO && link.outdated(now) >= Some(limit) {
            link.close(Reason::CertificateReplaced);
        }
        if link.ends.role == Role::Server {
            sweep_server(worker, link, now);
        }
    });
    worker.pool.sweep(worker, now);
    worker.pool.prove(worker, wall_clock);
    worker.stop_closed();
    sweep_connections(worker, now);
    worker.stash.tidy();
}

/// A client's tunnel that can be proven again waits for that, and a server's for its client: told to
/// open no more streams, the client could not ask for a proof either.
fn retire_in_time(worker: &Worker, link: &Link, left: Duration, now: Instant) {
    let (_, age) = link.proofs(now);
    let drain = worker.timeouts.drain;
    match (link.is_provable(), link.ends.role) {
        (false, _) if expires_soon(left, age, drain) => link.retire(),
        // A proof is asked for at half of the time, and has some of it.
        (true, Role::Client) if expires_soon(left, age / UNPROVEN, drain) => link.pause(),
        _ => {}
    }
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
fn check_identities(worker: &Rc<Worker>) {
    let now = SystemTime::now();
    worker.links.for_each(|link| look_after(worker, link, now));
    worker.pool.renew(worker);
    worker.pool.prove(worker, now);
    worker.stop_closed();
}

/// Judges a tunnel again, and retires it where its own certificate was replaced, or has it proven
/// again.
fn look_after(worker: &Worker, link: &Link, now: SystemTime) {
    if let Some(svid) = judge(worker, link, now)
        && svid.generation != link.by().generation
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
    let by = link.by();
    let used = svid
        .as_ref()
        .filter(|svid| svid.generation == by.generation);
    let own = used.map_or(by.own_not_after, |svid| svid.not_after);
    if own < now {
        link.close(Reason::CertificateExpired);
        return None;
    }
    let (Some(svid), Some(bundles)) = (svid, identities.trust_of(&ends.own)) else {
        link.close(Reason::NoCertificate);
        return None;
    };
    let accepted = link.accepted_until(&bundles).filter(|until| *until >= now);
    let peer = match accepted.map_or_else(|| verify_peer(&bundles, link, now), Ok) {
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

/// Until when the peer's chain is good. What proved the tunnel before must not have been revoked
/// meanwhile.
fn verify_peer(
    bundles: &TrustBundles,
    link: &Link,
    now: SystemTime,
) -> Result<SystemTime, RejectReason> {
    let (by, peer) = (link.by(), &link.ends.peer);
    let (leaf, intermediates) = by.chain.split_first().ok_or(RejectReason::Malformed)?;
    let verified = verify_chain(bundles, leaf, intermediates, now)?;
    if verified.id != *peer {
        return Err(RejectReason::WrongIdentity);
    }
    let revoked = |used| bundles.revoke(peer.trust_domain(), used);
    if link.used(now).iter().any(revoked) {
        return Err(RejectReason::Revoked);
    }
    Ok(verified.not_after)
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
