//! Counts the frames of a peer that carry nothing: HTTP/2 answers PING and SETTINGS, and reads
//! whatever else it is sent, for ever and as fast as it can.

use std::time::{Duration, Instant};

/// Bytes before the payload of a frame (RFC 9113, section 4.1).
const HEAD: usize = 9;
/// What a client sends before its first frame (section 3.4).
const PREFACE: usize = 24;
/// Application bytes that pay for one frame: a receiver that gives back its window in the smallest
/// sensible pieces needs no more.
const BYTES_PER_FRAME: usize = 1 << 10;
/// The time in which a limit's frames may come.
const WHILE: Duration = Duration::from_secs(1);

/// Types of frames (section 6) that a connection needs for itself.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;

/// Follows what a peer sends.
#[derive(Debug)]
pub(super) struct FrameMeter {
    /// Frames that carry nothing, within [`WHILE`].
    limit: usize,
    head: [u8; HEAD],
    /// Bytes of `head` that are there.
    have: usize,
    /// Bytes until the next frame's head.
    skip: usize,
    /// Frames that carried nothing, since `since`.
    spent: usize,
    /// Frames that were paid for, since `since`.
    earned: usize,
    /// Bytes that were carried and have not paid for a frame yet.
    carried: usize,
    since: Instant,
}

// === impl FrameMeter ===

impl FrameMeter {
    /// Of a client, which begins with a preface.
    pub(super) fn of_client(limit: usize) -> Self {
        Self {
            skip: PREFACE,
            ..Self::of_server(limit)
        }
    }

    /// Of a server.
    pub(super) fn of_server(limit: usize) -> Self {
        Self {
            limit,
            head: [0; HEAD],
            have: 0,
            skip: 0,
            spent: 0,
            earned: 0,
            carried: 0,
            since: Instant::now(),
        }
    }

    /// Looks at what the peer has sent. False: it has sent too many frames that carry nothing.
    pub(super) fn received(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return true;
            }
            let more = (HEAD - self.have).min(bytes.len());
            self.head[self.have..self.have + more].copy_from_slice(&bytes[..more]);
            self.have += more;
            bytes = &bytes[more..];
            if self.have == HEAD {
                self.have = 0;
                if !self.frame() {
                    return false;
                }
            }
        }
    }

    /// This many bytes are sent to the peer.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.carried += bytes;
    }

    fn frame(&mut self) -> bool {
        let [high, middle, low, kind, ..] = self.head;
        self.skip = u32::from_be_bytes([0, high, middle, low]) as usize;
        match kind {
            DATA => self.carried += self.skip,
            // One frame to end what it begins.
            HEADERS => self.earned += 1,
            // HTTP/2 bounds these itself, by the size of a header list.
            CONTINUATION => {}
            _ => self.spent += 1,
        }
        self.spent < self.limit || self.is_within()
    }

    /// Settles what is owed. Seldom needed, and the clock is asked for only here.
    fn is_within(&mut self) -> bool {
        self.earned += self.carried / BYTES_PER_FRAME;
        self.carried %= BYTES_PER_FRAME;
        let paid = self.earned.min(self.spent);
        self.spent -= paid;
        // What was carried in a good hour is no leave for a flood.
        self.earned = (self.earned - paid).min(self.limit);
        if self.spent >= self.limit && self.since.elapsed() >= WHILE {
            self.spent = 0;
            self.since = Instant::now();
        }
        self.spent < self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let mut frame = u32::try_from(payload).unwrap().to_be_bytes()[1..].to_vec();
        frame.push(kind);
        frame.resize(HEAD + payload, 0);
        frame
    }

    #[test]
    fn frames_that_carry_nothing_are_counted_however_they_are_cut() {
        let mut meter = FrameMeter::of_client(10);
        let mut sent = vec![PING; PREFACE];
        for _ in 0..9 {
            // What looks like PINGs inside of a payload is none.
            sent.extend(frame(DATA, 0x64));
            let payload = sent.len() - 0x64;
            sent[payload..].fill(PING);
            sent.extend(frame(PING, 8));
        }
        assert!(sent.chunks(1).all(|byte| meter.received(byte)));
        let flood = frame(PING, 8).repeat(2);
        assert!(!flood.chunks(5).all(|part| meter.received(part)));
    }

    #[test]
    fn what_is_carried_pays_for_frames() {
        let mut meter = FrameMeter::of_server(10);
        for _ in 0..1000 {
            assert!(meter.received(&frame(DATA, 1 << 10)));
            meter.sent(1 << 10);
            assert!(meter.received(&frame(WINDOW_UPDATE, 4).repeat(2)));
        }
        // But not for ever.
        assert!(!meter.received(&frame(PING, 8).repeat(100)));
    }

    #[test]
    fn what_was_carried_in_a_good_hour_is_no_leave_for_a_flood() {
        let mut meter = FrameMeter::of_server(10);
        meter.sent(1 << 30);
        assert!((0..1000).all(|_| meter.received(&frame(HEADERS, 0))));
        assert!(!meter.received(&frame(PING, 8).repeat(40)));
    }

    #[test]
    fn as_many_may_come_again_after_a_while() {
        let mut meter = FrameMeter::of_server(10);
        assert!(meter.received(&frame(PING, 8).repeat(9)));
        assert!(!meter.received(&frame(PING, 8)));
        meter.since -= WHILE;
        assert!(meter.received(&frame(PING, 8).repeat(9)));
    }
}
