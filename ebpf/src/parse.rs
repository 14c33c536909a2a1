//! A packet's headers, as far as a verdict needs them.

use aya_ebpf::{
    bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes, programs::SkBuffContext,
};
use reeve_common::{Address, ipv4_mapped, protocol};

use crate::address::{field, is_mapped};

/// What a packet says of itself. Without padding, as [`crate::event::Connection`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Packet {
    /// Where it comes from.
    pub source: Address,
    /// Where it goes.
    pub destination: Address,
    /// TCP's sequence number.
    pub sequence: u32,
    /// Source port, host byte order; 0 where the protocol has none.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// TCP's flags.
    pub tcp_flags: u8,
    /// ICMP's type.
    pub icmp_type: u8,
    /// Time to live, or hop limit.
    pub hops: u8,
    /// Identifier of an ICMP echo.
    pub icmp_id: u16,
    /// Where the protocol's own header begins.
    pub header: u16,
    /// Whether it is IPv6.
    pub inet6: bool,
    /// Whether a TCP segment carries anything behind its header.
    pub payload: bool,
    /// Whether it names a route of its own, and so has another far end than its header says.
    pub routed: bool,
    /// Nothing.
    pub reserved: u8,
}

const _: () = assert!(size_of::<Packet>() == 52, "padding");

/// TCP's flags.
pub const FIN: u8 = 1 << 0;
pub const SYN: u8 = 1 << 1;
pub const RST: u8 = 1 << 2;
pub const ACK: u8 = 1 << 4;

/// IPv6 extension headers.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// IPv4's header without options, its longest, and what lies between.
const V4_HEADER: usize = 20;
const V4_LONGEST: usize = 60;
const V4_OPTIONS: usize = V4_LONGEST - V4_HEADER;
/// IPv4 options (RFC 791): the end of them, one byte of nothing, and routes of the sender's own.
const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;
/// First byte of an IPv4 header without options.
pub const V4_PLAIN: u8 = 0x45;
/// Where an IPv6 header names what follows it.
pub const V6_NEXT_HEADER: usize = 6;

/// Protocols whose header begins with two ports, beside TCP, UDP and SCTP.
const DCCP: u8 = 33;
const UDP_LITE: u8 = 136;

/// Headers behind IPv6's own that are looked at, the protocol's among them.
const MAX_EXTENSION_HEADERS: u32 = 8;

/// "More fragments" and the fragment's offset, in an IPv4 header's seventh and eighth byte.
const V4_FRAGMENT: u16 = 0x3fff;
/// The same in an IPv6 fragment header's third and fourth byte.
const V6_FRAGMENT: u16 = 0xfff9;

impl Packet {
    /// Nothing yet.
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            source: [0; 16],
            destination: [0; 16],
            sequence: 0,
            source_port: 0,
            destination_port: 0,
            protocol: 0,
            tcp_flags: 0,
            icmp_type: 0,
            hops: 0,
            icmp_id: 0,
            header: 0,
            inet6: false,
            payload: false,
            routed: false,
            reserved: 0,
        }
    }
}

/// Whether a packet is IPv6, by what its device or its socket says and not by what it says of
/// itself: a raw socket of IPv4 can write any version into its header.
#[inline(always)]
fn is_inet6(skb: *mut __sk_buff) -> bool {
    /// `linux/if_ether.h`.
    const ETH_P_IPV6: u16 = 0x86dd;
    // SAFETY: a field of the context.
    field(unsafe { &raw const (*skb).protocol }) == u32::from(ETH_P_IPV6.to_be())
}

/// Whether nothing stands between a TCP packet's first header and TCP's own: no option and no
/// further header, in which a route could be named. Where that cannot be seen, it is not so.
#[inline(always)]
pub fn is_plain(ctx: &SkBuffContext) -> bool {
    let skb = ctx.skb.skb;
    // SAFETY: fields of the context, which the kernel gives as addresses of the packet.
    let (data, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    if data + V6_NEXT_HEADER + 1 > end {
        return false;
    }
    // SAFETY: the packet is longer than that.
    let (first, next) = unsafe {
        (
            *(data as *const u8),
            *((data + V6_NEXT_HEADER) as *const u8),
        )
    };
    first == V4_PLAIN || (first >> 4 == 6 && next == protocol::TCP)
}

/// Reads a packet's headers. False: truncated, a fragment, more headers than allowed, a version
/// that is not its device's, or addresses of one version in a packet of the other.
///
/// A function of its own, for its buffers not to lie on the stack while the packet is judged; and
/// verified by itself, like [`crate::judge::judge`].
#[inline(always)]
pub fn parse(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    // SAFETY: `skb` is the program's context, and a reference is never null.
    unsafe { reeve_parse(skb, packet) != 0 }
}

/// # Safety
///
/// `skb` is the program's context, and `packet` null or may be written.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn reeve_parse(skb: *mut __sk_buff, packet: *mut Packet) -> u32 {
    // SAFETY: as the caller promises.
    match unsafe { packet.as_mut() } {
        Some(packet) => u32::from(parse_headers(&SkBuffContext::new(skb), packet).is_some()),
        None => 0,
    }
}

#[inline(always)]
fn parse_headers(ctx: &SkBuffContext, packet: &mut Packet) -> Option<()> {
    let version: u8 = ctx.load(0).ok()?;
    packet.inet6 = is_inet6(ctx.skb.skb);
    let offset = match (version >> 4, packet.inet6) {
        (4, false) => parse_v4(ctx, packet)?,
        (6, true) => parse_v6(ctx, packet)?,
        _ => return None,
    };
    packet.header = offset as u16;
    match packet.protocol {
        protocol::TCP => {
            let header: [u8; 14] = ctx.load(offset).ok()?;
            ports(packet, &[header[0], header[1], header[2], header[3]]);
            packet.sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            packet.tcp_flags = header[13];
            let end = offset + usize::from(header[12] >> 4) * 4;
            packet.payload = ctx.len() as usize > end;
        }
        other if has_ports(other) => {
            let header: [u8; 8] = ctx.load(offset).ok()?;
            ports(packet, &[header[0], header[1], header[2], header[3]]);
        }
        protocol::ICMP | protocol::ICMPV6 => {
            let header: [u8; 8] = ctx.load(offset).ok()?;
            packet.icmp_type = header[0];
            packet.icmp_id = u16::from_be_bytes([header[4], header[5]]);
        }
        _ => {}
    }
    Some(())
}

/// Whether a protocol's header begins with two ports.
#[inline(always)]
pub fn has_ports(protocol: u8) -> bool {
    matches!(
        protocol,
        protocol::TCP | protocol::UDP | protocol::SCTP | DCCP | UDP_LITE
    )
}

#[inline(always)]
fn ports(packet: &mut Packet, header: &[u8; 4]) {
    packet.source_port = u16::from_be_bytes([header[0], header[1]]);
    packet.destination_port = u16::from_be_bytes([header[2], header[3]]);
}

#[inline(always)]
fn parse_v4(ctx: &SkBuffContext, packet: &mut Packet) -> Option<usize> {
    let header: [u8; 20] = ctx.load(0).ok()?;
    if u16::from_be_bytes([header[6], header[7]]) & V4_FRAGMENT != 0 {
        return None;
    }
    packet.hops = header[8];
    packet.protocol = header[9];
    packet.source = ipv4_mapped([header[12], header[13], header[14], header[15]]);
    packet.destination = ipv4_mapped([header[16], header[17], header[18], header[19]]);
    let length = usize::from(header[0] & 0xf) * 4;
    if length > V4_HEADER {
        packet.routed = names_route(ctx.skb.skb, length as u32)?;
    }
    (length >= V4_HEADER).then_some(length)
}

/// Whether an IPv4 header of this length holds a source route. None: it cannot be read.
///
/// A function of its own, for its buffer not to lie on the stack with the caller's.
#[inline(never)]
fn names_route(skb: *mut __sk_buff, header: u32) -> Option<bool> {
    let length = header.wrapping_sub(V4_HEADER as u32);
    if length == 0 || length > V4_OPTIONS as u32 {
        return None;
    }
    // One byte more than there are options, for the length of an option that begins in the last.
    let mut words = [0_u64; V4_OPTIONS / 8 + 1];
    for word in &mut words {
        // Not a call of `memset`, whose frame would lie on the deepest stack there is.
        // SAFETY: a word of this function's own.
        unsafe { core::ptr::from_mut(word).write_volatile(0) };
    }
    // SAFETY: as many bytes either way, of which any are a value.
    let options: &mut [u8; (V4_OPTIONS / 8 + 1) * 8] = unsafe { &mut *(&raw mut words).cast() };
    // SAFETY: `options` has room for `length` bytes.
    let read = unsafe {
        bpf_skb_load_bytes(
            skb.cast(),
            V4_HEADER as u32,
            options.as_mut_ptr().cast(),
            length,
        )
    };
    if read != 0 {
        return None;
    }
    let mut next = 0;
    let mut at = 0;
    // Byte by byte, and not from option to option: so the verifier knows where a byte is read.
    while at < V4_OPTIONS {
        if at == next {
            match options[at] {
                END_OF_OPTIONS => return Some(false),
                LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE => return Some(true),
                NO_OPERATION => next = at + 1,
                _ => {
                    let length = usize::from(options[at + 1]);
                    if length < 2 {
                        return None;
                    }
                    next = at + length;
                }
            }
        }
        at += 1;
    }
    Some(false)
}

/// Whether an IPv6 packet has an address of IPv4's in IPv6's notation. On the wire there are none
/// (RFC 4942): it would be judged as IPv4's, and goes elsewhere.
///
/// A function of its own, for the addresses' words not to lie on the stack with the headers.
#[inline(never)]
fn is_mixed(packet: &Packet) -> bool {
    is_mapped(&packet.source) || is_mapped(&packet.destination)
}

#[inline(always)]
fn parse_v6(ctx: &SkBuffContext, packet: &mut Packet) -> Option<usize> {
    packet.source = ctx.load(8).ok()?;
    packet.destination = ctx.load(24).ok()?;
    if is_mixed(packet) {
        return None;
    }
    let fixed: [u8; 2] = ctx.load(6).ok()?;
    packet.hops = fixed[1];
    let mut next = fixed[0];
    let mut offset = 40_usize;
    let mut headers = 0;
    while headers < MAX_EXTENSION_HEADERS {
        let length = match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | FRAGMENT | AUTHENTICATION => {
                let start: [u8; 4] = ctx.load(offset).ok()?;
                let kind = next;
                next = start[0];
                match kind {
                    // A whole packet may have a fragment header (RFC 6946).
                    FRAGMENT if u16::from_be_bytes([start[2], start[3]]) & V6_FRAGMENT != 0 => {
                        return None;
                    }
                    FRAGMENT => 8,
                    // Once the last of its stops is reached, it says nothing any more.
                    ROUTING if start[3] != 0 => {
                        packet.routed = true;
                        (usize::from(start[1]) + 1) * 8
                    }
                    AUTHENTICATION => (usize::from(start[1]) + 2) * 4,
                    _ => (usize::from(start[1]) + 1) * 8,
                }
            }
            other => {
                packet.protocol = other;
                return Some(offset);
            }
        };
        offset += length;
        headers += 1;
    }
    None
}
