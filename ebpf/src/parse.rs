//! A packet's headers, as far as a verdict needs them.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};
use reeve_common::{Address, ipv4_mapped, protocol};

/// What a packet says of itself.
#[derive(Clone, Copy)]
pub struct Packet {
    /// Where it comes from.
    pub source: Address,
    /// Where it goes.
    pub destination: Address,
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
    /// Whether it is IPv6.
    pub inet6: bool,
    /// Whether a TCP segment carries anything behind its header.
    pub payload: bool,
}

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

/// Protocols whose header begins with two ports, beside TCP, UDP and SCTP.
const DCCP: u8 = 33;
const UDP_LITE: u8 = 136;

/// Extension headers that a packet may have: twice what RFC 8200 recommends at most.
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
            source_port: 0,
            destination_port: 0,
            protocol: 0,
            tcp_flags: 0,
            icmp_type: 0,
            hops: 0,
            icmp_id: 0,
            inet6: false,
            payload: false,
        }
    }
}

/// Reads a packet's headers. False: truncated, a fragment, or more headers than allowed.
///
/// A function of its own, for its buffers not to lie on the stack while the packet is judged.
#[inline(never)]
pub fn parse(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    parse_headers(&SkBuffContext::new(skb), packet).is_some()
}

#[inline(always)]
fn parse_headers(ctx: &SkBuffContext, packet: &mut Packet) -> Option<()> {
    let version: u8 = ctx.load(0).ok()?;
    packet.inet6 = version >> 4 == 6;
    let offset = match version >> 4 {
        4 => parse_v4(ctx, packet)?,
        6 => parse_v6(ctx, packet)?,
        _ => return None,
    };
    match packet.protocol {
        protocol::TCP => {
            let header: [u8; 14] = ctx.load(offset).ok()?;
            ports(packet, &[header[0], header[1], header[2], header[3]]);
            packet.tcp_flags = header[13];
            let end = offset + usize::from(header[12] >> 4) * 4;
            packet.payload = ctx.len() as usize > end;
        }
        protocol::UDP | protocol::SCTP | DCCP | UDP_LITE => {
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
    (length >= 20).then_some(length)
}

#[inline(always)]
fn parse_v6(ctx: &SkBuffContext, packet: &mut Packet) -> Option<usize> {
    packet.source = ctx.load(8).ok()?;
    packet.destination = ctx.load(24).ok()?;
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
