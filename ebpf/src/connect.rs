//! `connect()`: judged, and sent through reeve where the policy wants a tunnel; `getpeername()`:
//! shows what was asked for; `getsockname()`: shows the workload's own address. `accept()` asks for
//! the peer's name too, which tells whose the connection is that a listener from elsewhere has
//! accepted.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_setsockopt},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use reeve_common::{
    Address, Direction, Hook, NAMESPACE_LISTENING, NAMESPACE_WITHOUT_V4, NAMESPACE_WITHOUT_V6,
    NO_WORKLOAD, NamespaceEntry, ONWARD_MARK, Reason, SETTINGS_ASIDE, SETTINGS_BESIDE,
    SETTINGS_JOINING, SocketTag, TAG_ALLOWED, TAG_DIRECTION, TAG_ONWARD, TAG_REDIRECTED, TAG_REEVE,
    UNKNOWN_WORKLOAD, WorkloadEntry, WorkloadId, ipv4_mapped, protocol, redirect_address,
};

use crate::{
    address::{self, field, is_loopback, is_mapped, is_unspecified, to_words},
    event::{Connection, Outcome, count_verdict, report},
    failing,
    judge::{self, is_reeve, is_unknown},
    maps::{NAMESPACES, SHOWN_ADDRESSES, Settings, has_flags, multipath, set_tag, settings, tag},
    packet::{LOOPBACK_DEVICE, is_reeves_port, port},
    sender,
};

/// The call goes on.
pub const PROCEED: i32 = 1;
/// The call fails with `EPERM`.
pub const REFUSE: i32 = 0;

pub const LOCALHOST_V6: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// `SOCK_STREAM`.
pub const STREAM: u32 = 1;
/// `SOCK_DGRAM` and `SOCK_RAW`.
const DATAGRAM: u32 = 2;
const RAW: u32 = 3;

#[cgroup_sock_addr(connect4)]
pub fn reeve_connect4(ctx: SockAddrContext) -> i32 {
    connect(ctx.sock_addr, false)
}

#[cgroup_sock_addr(connect6)]
pub fn reeve_connect6(ctx: SockAddrContext) -> i32 {
    connect(ctx.sock_addr, true)
}

#[cgroup_sock_addr(getpeername4)]
pub fn reeve_peername4(ctx: SockAddrContext) -> i32 {
    peername(ctx.sock_addr, false)
}

#[cgroup_sock_addr(getpeername6)]
pub fn reeve_peername6(ctx: SockAddrContext) -> i32 {
    peername(ctx.sock_addr, true)
}

#[cgroup_sock_addr(getsockname4)]
pub fn reeve_sockname4(ctx: SockAddrContext) -> i32 {
    sockname(ctx.sock_addr, false)
}

#[cgroup_sock_addr(getsockname6)]
pub fn reeve_sockname6(ctx: SockAddrContext) -> i32 {
    sockname(ctx.sock_addr, true)
}

/// The socket of a call; never null.
#[inline(always)]
pub fn socket(ctx: *mut bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: every socket address hook has a socket.
    unsafe { (*ctx).__bindgen_anon_1.sk }
}

/// The address that a call names.
#[inline(always)]
pub fn named_address(ctx: *mut bpf_sock_addr, inet6: bool) -> Address {
    // SAFETY: fields of the context, which is not null.
    unsafe {
        if inet6 {
            address::v6(&raw const (*ctx).user_ip6)
        } else {
            address::v4(field(&raw const (*ctx).user_ip4))
        }
    }
}

/// The port that a call names, host byte order.
#[inline(always)]
pub fn named_port(ctx: *mut bpf_sock_addr) -> u16 {
    // SAFETY: as above. The first two bytes are the port.
    u16::from_be(field(unsafe { &raw const (*ctx).user_port }) as u16)
}

/// IP protocol of the socket of a call.
#[inline(always)]
pub fn named_protocol(ctx: *mut bpf_sock_addr) -> u8 {
    // SAFETY: as above.
    field(unsafe { &raw const (*ctx).protocol }) as u8
}

#[inline(always)]
fn connect(ctx: *mut bpf_sock_addr, inet6: bool) -> i32 {
    let Some(settings) = settings() else {
        return REFUSE;
    };
    let depths = settings.cgroup_depths;
    if depths == 0 {
        return PROCEED;
    }
    let socket = socket(ctx);
    let Some(caller) = judge::caller(depths) else {
        forget(socket);
        return connect_of_stranger(ctx, inet6, &settings);
    };
    if is_reeve(&caller) {
        return connect_of_reeve(socket);
    }
    let mut connection = Connection::new(Hook::Connect);
    connection.remote = named_address(ctx, inet6);
    connection.remote_port = named_port(ctx);
    connection.protocol = named_protocol(ctx);
    connection.direction = Direction::Egress as u8;
    connection.workload = caller.workload;
    if holds_reeves_port(ctx, &settings) {
        report(&connection, Outcome::deny(Reason::ReservedPort));
        return REFUSE;
    }

    // What the socket remembered was said of another far end.
    forget(socket);
    if sends_nothing(ctx) {
        // Whoever looks up names asks so which source address the kernel would choose. What the socket
        // sends is judged when it does.
        if !adopt(socket, &caller, connection.protocol) {
            report(&connection, Outcome::deny(Reason::MapFailure));
            return REFUSE;
        }
        return PROCEED;
    }
    let source = bound_address(socket);
    // Under a stranger's address the kernel would answer the stranger.
    let from_here = judge::is_from_here(&source, caller.workload, || namespace_owner(ctx));
    let outcome = judge_connect(&mut connection, &settings, &caller, from_here);
    let Some(outcome) = outcome else {
        return PROCEED;
    };
    if !outcome.allowed() {
        report(&connection, outcome);
        return REFUSE;
    }
    if is_forged(ctx, &source, caller.workload) {
        report(&connection, Outcome::deny(Reason::ForgedSource));
        return REFUSE;
    }
    let mut remembered = SocketTag {
        remote: connection.remote,
        since: 0,
        workload: connection.workload,
        peer: connection.peer,
        rule: connection.rule,
        generation: settings.generation,
        remote_port: connection.remote_port,
        protocol: connection.protocol,
        direction: Direction::Egress as u8,
        flags: TAG_ALLOWED | TAG_DIRECTION,
    };
    // The other layout's programs redirect, and say whether there is a listener: the connection is
    // remembered as if these did.
    let aside = has_flags(SETTINGS_ASIDE);
    if outcome.through_tunnel() {
        let flags = namespace(ctx).map_or(0, |entry| entry.flags);
        if !aside && flags & NAMESPACE_LISTENING == 0 {
            report(&connection, Outcome::deny(Reason::NoListener));
            return REFUSE;
        }
        let without = if is_mapped(&connection.remote) {
            NAMESPACE_WITHOUT_V4
        } else {
            NAMESPACE_WITHOUT_V6
        };
        if flags & without != 0 {
            // The kernel finds no route, and says so. Were there one all the same, the packet would be
            // judged, and refused without a tunnel.
            if !adopt(socket, &caller, connection.protocol) {
                report(&connection, Outcome::deny(Reason::MapFailure));
                return REFUSE;
            }
            return PROCEED;
        }
        if !aside && let Some(failure) = failing::fail(&connection) {
            report(&connection, failure);
            return REFUSE;
        }
        if !leave_device(ctx) {
            report(&connection, Outcome::deny(Reason::BoundToDevice));
            return REFUSE;
        }
        remembered.flags |= TAG_REDIRECTED;
    } else if connection.protocol == protocol::TCP && is_unspecified(&source) {
        // The kernel chooses the address after this; the first packet has it, and is asked whose it is.
        remembered.generation = 0;
    }
    if !set_tag(socket, &mut remembered) {
        report(&connection, Outcome::deny(Reason::MapFailure));
        return REFUSE;
    }
    report(&connection, outcome);
    if outcome.through_tunnel() {
        let whole = multipath(socket);
        if !whole.is_null() {
            // The application asks it for its names. Without a tag it sees loopback's.
            let _ = set_tag(whole, &mut remembered);
        }
        if !aside {
            redirect(ctx, inet6, &connection, settings.outbound_port);
        }
    }
    PROCEED
}

/// Whether `connect()` only notes an address: it sends nothing on a socket of datagrams, or a raw one.
#[inline(always)]
fn sends_nothing(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: a field of the context, which is not null.
    let kind = field(unsafe { &raw const (*ctx).type_ });
    kind == DATAGRAM || kind == RAW
}

/// Whether the socket was bound to one of reeve's ports, before `bind()` was watched: a connection that
/// a workload opens towards reeve could meet it half-way.
#[inline(always)]
fn holds_reeves_port(ctx: *mut bpf_sock_addr, settings: &Settings) -> bool {
    // SAFETY: a field of the context. By type, since MPTCP takes TCP's ports.
    let kind = field(unsafe { &raw const (*ctx).type_ });
    kind == STREAM && is_reeves_port(port(socket(ctx)), settings)
}

/// A process outside of all workloads may connect to anything but reeve's outbound listener, and where
/// workloads are from any port but reeve's.
#[inline(always)]
fn connect_of_stranger(ctx: *mut bpf_sock_addr, inet6: bool, settings: &Settings) -> i32 {
    let asked = named_port(ctx);
    let holds = holds_reeves_port(ctx, settings);
    if asked != settings.outbound_port && !holds {
        return PROCEED;
    }
    let mut connection = Connection::new(Hook::Connect);
    connection.remote = named_address(ctx, inet6);
    connection.protocol = named_protocol(ctx);
    let at_listener = asked == settings.outbound_port
        && connection.protocol == protocol::TCP
        && is_loopback(&connection.remote)
        && is_listening(ctx);
    let refused = at_listener || (holds && namespace(ctx).is_some());
    if !refused {
        return PROCEED;
    }
    connection.remote_port = asked;
    connection.direction = Direction::Egress as u8;
    report(&connection, Outcome::deny(Reason::ReservedPort));
    REFUSE
}

/// What becomes of a workload's connection; none where it stays in the workload.
#[inline(always)]
fn judge_connect(
    connection: &mut Connection,
    settings: &Settings,
    caller: &WorkloadEntry,
    from_here: bool,
) -> Option<Outcome> {
    let tcp = connection.protocol == protocol::TCP;
    if from_here && is_loopback(&connection.remote) {
        // The programs that come first have refused who asked for it.
        let redirected =
            connection.remote_port == settings.outbound_port && has_flags(SETTINGS_JOINING);
        let reserved = !redirected && is_reeves_port(connection.remote_port, settings);
        return (tcp && reserved).then_some(Outcome::deny(Reason::ReservedPort));
    }
    if is_unknown(caller) {
        return Some(Outcome::deny(Reason::UnknownWorkload));
    }
    if from_here && judge::is_own(&connection.remote, connection.workload) {
        let reserved = connection.remote_port == settings.tunnel_port;
        return (tcp && reserved).then_some(Outcome::deny(Reason::ReservedPort));
    }
    let outcome = judge::judge(connection);
    if outcome.through_tunnel() && connection.remote_port == settings.tunnel_port {
        return Some(Outcome::deny(Reason::ReservedPort));
    }
    Some(outcome)
}

/// The address that a socket is bound to. Bound to none, it gets one of the namespace's own;
/// `is_loopback` takes none for one of them.
#[inline(always)]
fn bound_address(socket: *mut bpf_sock) -> Address {
    // SAFETY: fields of the hook's socket.
    unsafe {
        address::of_family(
            field(&raw const (*socket).family),
            &raw const (*socket).src_ip4,
            &raw const (*socket).src_ip6,
        )
    }
}

/// Whether the socket is bound to an address that the workload has no right to. The packets of a
/// connection that is allowed are not asked for theirs.
#[inline(always)]
fn is_forged(ctx: *mut bpf_sock_addr, source: &Address, workload: WorkloadId) -> bool {
    judge::is_forged(source, workload, || namespace_owner(ctx))
}

/// The workload that alone owns the caller's namespace.
#[inline(always)]
pub fn namespace_owner(ctx: *mut bpf_sock_addr) -> WorkloadId {
    namespace(ctx).map_or(NO_WORKLOAD, |entry| entry.workload)
}

/// What the daemon says of the caller's namespace.
#[inline(always)]
fn namespace(ctx: *mut bpf_sock_addr) -> Option<NamespaceEntry> {
    // SAFETY: `ctx` is the program's context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    // SAFETY: the entry is copied at once.
    unsafe { NAMESPACES.get(cookie) }.copied()
}

/// Whether the daemon's listeners stand in the caller's namespace.
#[inline(always)]
fn is_listening(ctx: *mut bpf_sock_addr) -> bool {
    namespace(ctx).is_some_and(|entry| entry.flags & NAMESPACE_LISTENING != 0)
}

/// Has a socket that is bound to a device (`SO_BINDTODEVICE`) be bound to none: the listener is on
/// loopback. False where the caller may not bind it to another one: that takes `CAP_NET_RAW`.
#[inline(always)]
fn leave_device(ctx: *mut bpf_sock_addr) -> bool {
    /// Of `asm-generic/socket.h`.
    const SOL_SOCKET: i32 = 1;
    const SO_BINDTOIFINDEX: i32 = 62;
    // SAFETY: a field of the hook's socket.
    let device = field(unsafe { &raw const (*socket(ctx)).bound_dev_if });
    if device == 0 || device == LOOPBACK_DEVICE {
        return true;
    }
    let mut none = 0_i32;
    // SAFETY: `ctx` is the program's context, and `none` outlives the call.
    let left = unsafe {
        bpf_setsockopt(
            ctx.cast(),
            SOL_SOCKET,
            SO_BINDTOIFINDEX,
            (&raw mut none).cast(),
            size_of::<i32>() as i32,
        )
    };
    left == 0
}

/// Sends the call to the outbound listener of the namespace. IPv6 has one loopback address for all
/// destinations.
#[inline(always)]
fn redirect(ctx: *mut bpf_sock_addr, inet6: bool, connection: &Connection, port: u16) {
    let v4 = redirect_address(&connection.remote, connection.remote_port);
    // SAFETY: these fields of the context may be written in this hook.
    unsafe {
        (*ctx).user_port = u32::from(port.to_be());
        if !inet6 {
            (*ctx).user_ip4 = u32::from_ne_bytes(v4);
            return;
        }
        let listener = if is_mapped(&connection.remote) {
            ipv4_mapped(v4)
        } else {
            LOCALHOST_V6
        };
        write_v6(&raw mut (*ctx).user_ip6, &listener);
    }
}

/// Writes an IPv6 address into a hook's context, word by word.
///
/// # Safety
///
/// `words` is a field of the context that the hook may write.
#[inline(always)]
unsafe fn write_v6(words: *mut [u32; 4], address: &Address) {
    let word: *mut u32 = words.cast();
    let address = to_words(address);
    // SAFETY: four words long.
    unsafe {
        word.write_volatile(address[0]);
        word.add(1).write_volatile(address[1]);
        word.add(2).write_volatile(address[2]);
        word.add(3).write_volatile(address[3]);
    }
}

/// The verdict that a socket remembers ends with a new `connect()`; its workload stays.
#[inline(always)]
fn forget(socket: *mut bpf_sock) {
    clear(socket);
    let whole = multipath(socket);
    if !whole.is_null() {
        clear(whole);
    }
}

#[inline(always)]
fn clear(socket: *mut bpf_sock) {
    if let Some(tag) = tag(socket) {
        tag.generation = 0;
        tag.flags = 0;
    }
}

/// Has a socket be the workload's that uses it, if it is nobody's yet: its packets are judged then
/// even if it was made elsewhere and handed over. False where the kernel has no memory for it.
#[inline(always)]
#[must_use]
pub fn adopt(socket: *mut bpf_sock, caller: &WorkloadEntry, protocol: u8) -> bool {
    let workload = if is_unknown(caller) {
        UNKNOWN_WORKLOAD
    } else {
        caller.workload
    };
    if let Some(tag) = tag(socket) {
        // None that a workload uses is reeve's, whatever its packets said.
        if tag.flags & TAG_REEVE != 0 {
            tag.flags = 0;
        }
        // Whoever was not enrolled yet may be now.
        if tag.workload == NO_WORKLOAD || tag.workload == UNKNOWN_WORKLOAD {
            tag.workload = workload;
        }
        return true;
    }
    let mut nothing = SocketTag {
        remote: [0; 16],
        since: 0,
        workload,
        peer: 0,
        rule: 0,
        generation: 0,
        remote_port: 0,
        protocol,
        direction: 0,
        flags: 0,
    };
    set_tag(socket, &mut nothing)
}

/// The same, where a call is not refused for want of memory: such a socket is judged by the cgroup that
/// made it, as ever.
#[inline(always)]
pub fn adopt_used(socket: *mut bpf_sock, protocol: u8) {
    let depths = settings().map_or(0, |settings| settings.cgroup_depths);
    if depths == 0 {
        return;
    }
    if let Some(caller) = judge::caller(depths)
        && !is_reeve(&caller)
    {
        let _ = adopt(socket, &caller, protocol);
    }
}

/// reeve's own connections are not judged. One to a local application says for which workload it is
/// meant; without that it would be taken for anybody's.
#[inline(always)]
fn connect_of_reeve(socket: *mut bpf_sock) -> i32 {
    // SAFETY: the socket of the hook.
    if field(unsafe { &raw const (*socket).mark }) != ONWARD_MARK
        || tag(socket).is_some_and(|tag| tag.flags & TAG_ONWARD != 0)
    {
        return PROCEED;
    }
    if has_flags(SETTINGS_BESIDE) && set_tag(socket, &mut sender::onward_of_other()) {
        return PROCEED;
    }
    count_verdict(Direction::Egress as u8, Outcome::deny(Reason::MapFailure));
    REFUSE
}

/// Shows a redirected socket the far end that its application asked for.
#[inline(always)]
fn peername(ctx: *mut bpf_sock_addr, inet6: bool) -> i32 {
    let socket = socket(ctx);
    let Some(tag) = tag(socket) else {
        adopt_used(socket, named_protocol(ctx));
        return PROCEED;
    };
    if tag.flags & TAG_REDIRECTED == 0 {
        return PROCEED;
    }
    // SAFETY: this field of the context may be written in this hook.
    unsafe { (*ctx).user_port = u32::from(tag.remote_port.to_be()) };
    show(ctx, inet6, &tag.remote);
    PROCEED
}

/// Shows a redirected socket an address of its workload's, where the kernel has chosen one of loopback.
/// One that the application has bound is shown as it is.
#[inline(always)]
fn sockname(ctx: *mut bpf_sock_addr, inet6: bool) -> i32 {
    let Some(tag) = tag(socket(ctx)) else {
        return PROCEED;
    };
    let named = named_address(ctx, inet6);
    if tag.flags & TAG_REDIRECTED == 0 || !is_loopback(&named) || is_unspecified(&named) {
        return PROCEED;
    }
    // SAFETY: the entry stays readable until the program ends.
    let Some(own) = (unsafe { SHOWN_ADDRESSES.get(&tag.workload) }) else {
        return PROCEED;
    };
    let own = if is_mapped(&named) { &own.v4 } else { &own.v6 };
    if !is_unspecified(own) {
        show(ctx, inet6, own);
    }
    PROCEED
}

/// Has a call that asks for an address get this one.
#[inline(always)]
fn show(ctx: *mut bpf_sock_addr, inet6: bool, address: &Address) {
    // SAFETY: these fields of the context may be written in the hooks that ask.
    unsafe {
        if inet6 {
            write_v6(&raw mut (*ctx).user_ip6, address);
        } else {
            (*ctx).user_ip4 = to_words(address)[3];
        }
    }
}
