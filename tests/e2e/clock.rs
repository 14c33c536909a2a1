//! A wall clock that is moved under a running daemon, by hours: what is valid is judged by the
//! clock as it is. The daemon is the real one, whose C library tells it another time.

use std::time::{Duration, Instant};

use harness::{WallClock, certs::Issued, eventually};

use crate::opposite::{CLIENT, Guarded};

#[test]
fn a_clock_that_jumps_ahead_ends_what_has_expired_and_renews() {
    let moved = Moved::start();
    let guarded = &moved.guarded;
    let tunnel = guarded
        .client(&moved.short)
        .tunnel(guarded.tunnel_port())
        .unwrap();
    assert_eq!(tunnel.connect(&guarded.authority()).unwrap().status, 200);
    moved.to("+5h");
    eventually("the tunnel has ended", || tunnel.ended());
    closed(guarded, "certificate_expired");
    // Its own certificate had expired as well.
    moved.serves();
    // Who has nothing newer is refused.
    let again = guarded.client(&moved.short).tunnel(guarded.tunnel_port());
    again.unwrap_err();
    eventually("it is counted", || guarded.handshakes("validity") == 1.0);
    // And when the clock is set right, all is as before.
    moved.to("+0");
    moved.serves();
    guarded
        .client(&moved.short)
        .tunnel(guarded.tunnel_port())
        .unwrap();
}

#[test]
fn a_clock_that_jumps_back_believes_nothing_that_is_not_valid_yet_and_heals() {
    let moved = Moved::start();
    let guarded = &moved.guarded;
    // What the daemon has made of an hour before is not valid yet, and is made anew.
    moved.to("-5h");
    moved.serves();
    let again = guarded.client(&moved.short).tunnel(guarded.tunnel_port());
    again.unwrap_err();
    eventually("it is counted", || guarded.handshakes("validity") == 1.0);
    moved.to("+0");
    moved.serves();
}

#[test]
fn a_daemon_notices_at_once_that_the_clock_was_set() {
    use nix::time::{ClockId, clock_gettime, clock_settime};
    let guarded = Guarded::start();
    let steps = || guarded.daemon.logged(&["the wall clock was set"]).len();
    let before = steps();
    // To what it says: a step of less than a microsecond, and a step all the same.
    let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap();
    clock_settime(ClockId::CLOCK_REALTIME, now).unwrap();
    let set = Instant::now();
    eventually("the step is noticed", || steps() > before);
    assert!(
        set.elapsed() < Duration::from_secs(2),
        "{:?}",
        set.elapsed()
    );
}

/// A daemon whose clock is moved.
struct Moved {
    guarded: Guarded,
    clock: WallClock,
    /// Certificates of the client: for an hour, and for days on both sides of now.
    short: Issued,
    long: Issued,
}

impl Moved {
    fn start() -> Self {
        let mut clock = None;
        let guarded = Guarded::with(|reeve| {
            // The authority is not new.
            let (reeve, its) = WallClock::of(reeve, "-10d");
            clock = Some(its);
            reeve
        });
        let lasting = |hours: i64| {
            guarded.root.leaf_with(CLIENT, |params| {
                let now = time::OffsetDateTime::now_utc();
                params.not_before = now - time::Duration::hours(hours);
                params.not_after = now + time::Duration::hours(hours);
            })
        };
        let moved = Self {
            short: lasting(1),
            long: lasting(48),
            guarded,
            clock: clock.unwrap(),
        };
        moved.to("+0");
        moved.serves();
        moved
    }

    /// Moves the clock to so much before or after the real time.
    fn to(&self, offset: &str) {
        self.clock.set(offset);
    }

    /// Fails the test unless a client is served whose certificate is valid at any of these times.
    #[track_caller]
    fn serves(&self) {
        let guarded = &self.guarded;
        eventually("it serves", || {
            let client = guarded.client(&self.long);
            let tunnel = client.tunnel(guarded.tunnel_port());
            let stream = tunnel.and_then(|tunnel| tunnel.connect(&guarded.authority()));
            stream.is_ok_and(|stream| stream.status == 200)
        });
    }
}

#[track_caller]
fn closed(guarded: &Guarded, reason: &str) {
    let labels = [("role", "server"), ("reason", reason)];
    guarded
        .daemon
        .wait_for_metric("reeve_tunnels_closed_total", &labels, 1.0);
}
