//! TCP segments of sockets that remember no verdict of this generation.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_NOEXIST},
    helpers::generated::bpf_get_socket_cookie,
};
use reeve_common::{
    Direction, Hook, Reason, TAG_ALLOWED, TAG_DIRECTION, TAG_TUNNELLED, ToldKey, protocol,
};

use crate::{
    event::{Connection, Outcome, report},
    flow,
    judge::{is_unknown, judge},
    maps::{ARRIVING, Settings, TOLD, tag},
    packet::{Subject, is_on_loopback, port, remember},
    parse::{ACK, FIN, Packet, RST, SYN},
    sender,
};

/// A raw socket speaks TCP or UDP: refused, and told once for each socket and generation. The
/// kernel's own raw sockets answer for connections that have no socket any more, and what they send
/// has nothing in it.
#[inline(always)]
pub fn raw(
    connection: &Connection,
    packet: &Packet,
    settings: &Settings,
    subject: &Subject,
) -> bool {
    let flags = packet.tcp_flags & (FIN | SYN | RST | ACK);
    let bare = packet.protocol == protocol::TCP
        && !packet.payload
        && (flags == ACK || flags & !ACK == RST);
    if subject.kernels && bare {
        return true;
    }
    let outcome = Outcome::deny(Reason::RawSocket);
    let told = tag(subject.socket)
        .is_some_and(|tag| tag.generation == settings.generation && tag.flags & TAG_ALLOWED == 0);
    if !told {
        report(connection, outcome);
        // Not remembered: told again at the next packet.
        let _ = remember(subject.socket, connection, settings.generation, 0);
    }
    false
}

/// TCP, of a socket that remembers nothing of this generation.
///
/// A function of its own: what it needs does not lie on the stack while a flow is judged.
#[inline(never)]
pub fn tcp(
    skb: *mut __sk_buff,
    settings: &Settings,
    subject: &Subject,
    connection: &mut Connection,
    packet: &Packet,
) -> bool {
    if packet.tcp_flags & RST != 0 {
        return true;
    }
    if subject.listening {
        if connection.hook == Hook::PacketIngress as u8 {
            return tcp_arriving(settings, subject, connection);
        }
        connection.direction = Direction::Ingress as u8;
        connection.local_port = port(subject.socket);
        // Whose source was translated has come by another device, and so does the answer leave.
        return is_on_loopback(skb)
            || answers(settings, connection)
            || let_in(subject, connection).allowed();
    }
    let (flags_before, direction_before, generation_before) = match tag(subject.socket) {
        Some(tag) if tag.protocol == protocol::TCP => (tag.flags, tag.direction, tag.generation),
        _ => (0, 0, 0),
    };
    if flags_before & TAG_TUNNELLED != 0 && is_on_loopback(skb) {
        // Established on another processor, after this one had asked for the tag and before it asked for
        // the entry.
        return true;
    }
    if flags_before == 0 && sender::is_end_of_other(skb, subject.socket) {
        // Established before these programs looked. Not remembered: the next packet takes this way again.
        let flags = TAG_ALLOWED | TAG_DIRECTION | TAG_TUNNELLED;
        let _ = remember(subject.socket, connection, settings.generation, flags);
        return true;
    }
    let is_known = flags_before & TAG_DIRECTION != 0;
    // Nobody has to be told again, whatever has changed since.
    let was_refused = generation_before != 0 && flags_before & TAG_ALLOWED == 0;
    let opening = packet.tcp_flags & (SYN | ACK) == SYN;
    let observed = connection.direction;
    let outcome = if is_unknown(&subject.entry) {
        Outcome::deny(Reason::UnknownWorkload)
    } else if is_known {
        connection.direction = direction_before;
        plaintext(connection)
    } else if opening {
        plaintext(connection)
    } else {
        either(connection, observed)
    };
    let allowed = outcome.allowed();
    let mut flags = if allowed {
        TAG_ALLOWED | TAG_DIRECTION
    } else {
        0
    };
    let was_allowed = is_known && flags_before & TAG_ALLOWED != 0;
    if is_known {
        flags |= TAG_DIRECTION;
    }
    if !remember(subject.socket, connection, settings.generation, flags) {
        report(connection, Outcome::deny(Reason::MapFailure));
        return false;
    }
    let is_news = !is_known || was_allowed != allowed;
    let is_told = !allowed && (was_refused || (!opening && !tells(skb, settings.generation)));
    if is_news && !is_told {
        let revoked = was_allowed && !allowed;
        report(
            connection,
            if revoked {
                Outcome::deny(Reason::Revoked)
            } else {
                outcome
            },
        );
    }
    allowed
}

/// Whether it is for this program to tell that a packet's socket is refused: the daemon, which may
/// be about to end it, has not.
#[inline(never)]
fn tells(skb: *mut __sk_buff, generation: u32) -> bool {
    /// `EEXIST` of `asm-generic/errno-base.h`.
    const FILED: i32 = -17;
    let key = ToldKey {
        // SAFETY: `skb` is the program's context.
        cookie: unsafe { bpf_get_socket_cookie(skb.cast()) },
        generation,
        reserved: 0,
    };
    TOLD.insert(&key, 0, u64::from(BPF_NOEXIST)) != Err(FILED)
}

/// A packet for a listening socket: an opening, or the last of a handshake.
#[inline(always)]
fn tcp_arriving(settings: &Settings, subject: &Subject, connection: &mut Connection) -> bool {
    let outcome = let_in(subject, connection);
    if !outcome.allowed() {
        return false;
    }
    if let Some(arriving) = ARRIVING.get_ptr_mut(0) {
        // Field by field: the value does not lie on the stack first.
        // SAFETY: the value is this processor's.
        unsafe {
            (*arriving).key.local = connection.local;
            (*arriving).key.remote = connection.remote;
            (*arriving).key.local_port = connection.local_port;
            (*arriving).key.remote_port = connection.remote_port;
            (*arriving).key.workload = connection.workload;
            (*arriving).key.protocol = protocol::TCP;
            (*arriving).peer = connection.peer;
            (*arriving).rule = connection.rule;
            (*arriving).generation = settings.generation;
            (*arriving).dry_run_rule = connection.dry_run_rule;
            (*arriving).dry_run = connection.dry_run;
            (*arriving).reason = outcome.reason();
            (*arriving).tunnelled = 0;
        }
    }
    true
}

/// Whether what a listening socket sends is for who has just been let in by it. The answer to a
/// packet whose source was translated leaves for another: for the one who really sent it.
#[inline(always)]
fn answers(settings: &Settings, connection: &Connection) -> bool {
    let Some(arriving) = ARRIVING.get_ptr(0) else {
        return false;
    };
    // SAFETY: the value is this processor's, and the answer is sent while the packet that asks is
    // looked at.
    unsafe {
        (*arriving).generation == settings.generation
            && (*arriving).key.workload == connection.workload
            && (*arriving).key.remote == connection.remote
            && (*arriving).key.remote_port == connection.remote_port
    }
}

/// Judges a connection to a listening socket, and tells of a refusal.
#[inline(always)]
fn let_in(subject: &Subject, connection: &mut Connection) -> Outcome {
    let outcome = if is_unknown(&subject.entry) {
        Outcome::deny(Reason::UnknownWorkload)
    } else {
        judge(connection)
    };
    if !outcome.allowed() {
        report(connection, outcome);
    }
    outcome
}

/// Judges TCP that goes as plaintext; a far end behind a tunnel does not get it.
#[inline(always)]
pub fn plaintext(connection: &mut Connection) -> Outcome {
    let outcome = judge(connection);
    if outcome.through_tunnel() {
        return Outcome::deny(Reason::TunnelBypassed);
    }
    outcome
}

/// Judges an established connection of which nobody saw the beginning: either direction will do.
#[inline(always)]
pub fn either(connection: &mut Connection, observed: u8) -> Outcome {
    connection.direction = flow::opposite(observed);
    let other = plaintext(connection);
    if other.allowed() {
        return other;
    }
    connection.direction = observed;
    let outcome = plaintext(connection);
    if outcome.allowed() || !outcome.is(Reason::NoPolicy) {
        return outcome;
    }
    // The more telling of the two.
    other
}
