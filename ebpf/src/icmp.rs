//! ICMP: echoes are judged, and errors by the packet that they enclose. What keeps the link going
//! is not in question.

use aya_ebpf::{
    bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes, programs::SkBuffContext,
};
use reeve_common::{Address, Direction, Hook, WorkloadId, ipv4_mapped, protocol};

use crate::{
    connect::LOCALHOST_V6,
    event::Connection,
    flow,
    judge::{is_unknown, judge},
    maps::Settings,
    packet::{Subject, flow},
    parse::{Packet, has_ports},
    segment,
};

/// ICMP types of RFC 792: errors carry the beginning of a packet.
const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP_SOURCE_QUENCH: u8 = 4;
const ICMP_TIME_EXCEEDED: u8 = 11;
const ICMP_PARAMETER_PROBLEM: u8 = 12;

/// ICMPv6 types of RFC 4443, 2710, 3810 and 4861.
const ICMPV6_LAST_ERROR: u8 = 4;
const ICMPV6_ECHO_REPLY: u8 = 129;
const MLD_QUERY: u8 = 130;
const MLD_DONE: u8 = 132;
const MLD_V2_REPORT: u8 = 143;
const NDP_FIRST: u8 = 133;
const NDP_LAST: u8 = 137;
/// Hop limits that say that a packet has not left, and does not leave, its link.
const NDP_HOPS: u8 = 255;
const MLD_HOPS: u8 = 1;

/// Bytes of an error before the packet that it encloses.
const ERROR_HEADER: u32 = 8;
/// Where an IPv4 header has its addresses.
const V4_SOURCE: u32 = 12;
const V4_DESTINATION: u32 = 16;
/// Where it names what follows it.
const V4_PROTOCOL: usize = 9;
/// First byte of IPv4's loopback addresses.
const V4_LOOPBACK: u8 = 127;
/// The offset of a fragment, in an IPv4 header's seventh and eighth byte.
const V4_FRAGMENT_OFFSET: u16 = 0x1fff;
/// Where an IPv6 header has its addresses, and its length.
const V6_SOURCE: u32 = 8;
const V6_DESTINATION: u32 = 24;
const V6_HEADER: u32 = 40;
/// Where it names what follows it.
const V6_PROTOCOL: usize = 6;

/// ICMP of either family.
#[inline(always)]
pub fn icmp(
    skb: *mut __sk_buff,
    arrives: bool,
    settings: &Settings,
    subject: &Subject,
    connection: &mut Connection,
    packet: &Packet,
) -> bool {
    let kind = packet.icmp_type;
    // The kernel speaks so. A workload's own socket does not: it may write into such messages what
    // it likes, and send them to any address.
    let kernels = arrives || subject.kernels;
    let (error, reply) = if packet.inet6 {
        let ndp = (NDP_FIRST..=NDP_LAST).contains(&kind) && packet.hops == NDP_HOPS;
        let mld = ((MLD_QUERY..=MLD_DONE).contains(&kind) || kind == MLD_V2_REPORT)
            && packet.hops == MLD_HOPS;
        if (ndp || mld) && kernels {
            return true;
        }
        (kind <= ICMPV6_LAST_ERROR, kind == ICMPV6_ECHO_REPLY)
    } else {
        let error = matches!(
            kind,
            ICMP_UNREACHABLE | ICMP_SOURCE_QUENCH | ICMP_TIME_EXCEEDED | ICMP_PARAMETER_PROBLEM
        );
        (error, kind == ICMP_ECHO_REPLY)
    };
    // Any other error is judged as the ICMP that it is.
    if error
        && kernels
        && !is_unknown(&subject.entry)
        && is_about_allowed(skb, arrives, settings, connection.workload, packet)
    {
        return true;
    }
    connection.local_port = packet.icmp_id;
    if reply {
        connection.direction = flow::opposite(connection.direction);
    }
    flow(skb, settings, subject, connection)
}

/// Whether an error encloses a packet of a connection that is allowed, and is sent to where that
/// packet came from. One that arrives is about a packet that was sent; one that the kernel sends,
/// about a packet that has arrived.
///
/// A function of its own, for the second connection not to lie on the stack while a packet that is
/// no error is judged.
#[inline(never)]
fn is_about_allowed(
    skb: *mut __sk_buff,
    arrives: bool,
    settings: &Settings,
    workload: WorkloadId,
    packet: &Packet,
) -> bool {
    let mut enclosed = Connection::new(Hook::PacketEgress);
    enclosed.workload = workload;
    let at = u32::from(packet.header) + ERROR_HEADER;
    if !read_enclosed(skb, at, packet.inet6, arrives, &mut enclosed) {
        return false;
    }
    let observed = if arrives {
        enclosed.direction = Direction::Egress as u8;
        enclosed.local == packet.destination
    } else {
        enclosed.direction = Direction::Ingress as u8;
        enclosed.remote == packet.destination
    };
    if !observed {
        return false;
    }
    if enclosed.protocol == protocol::TCP {
        let direction = enclosed.direction;
        return segment::either(&mut enclosed, direction).allowed();
    }
    flow::is_live(&mut enclosed, settings)
        // A datagram that finds no socket leaves no trace; one that is sent does.
        || (!arrives && judge(&mut enclosed).allowed())
}

/// Reads the packet in an error into the connection of which it is, as the workload sees it: its
/// source is the workload where the error arrives, its destination where the kernel sends the error.
/// IPv6's further headers are a doubt.
#[inline(never)]
fn read_enclosed(
    skb: *mut __sk_buff,
    at: u32,
    inet6: bool,
    arrives: bool,
    enclosed: &mut Connection,
) -> bool {
    let packet = SkBuffContext::new(skb);
    let Ok(start) = packet.load::<[u8; 10]>(at as usize) else {
        return false;
    };
    let version = if inet6 { 6 } else { 4 };
    if start[0] >> 4 != version {
        return false;
    }
    let (source, destination) = if arrives {
        (&mut enclosed.local, &mut enclosed.remote)
    } else {
        (&mut enclosed.remote, &mut enclosed.local)
    };
    let length = if inet6 {
        enclosed.protocol = start[6];
        if !load_v6(skb, at + V6_SOURCE, source) || !load_v6(skb, at + V6_DESTINATION, destination)
        {
            return false;
        }
        V6_HEADER
    } else {
        enclosed.protocol = start[9];
        let is_first = u16::from_be_bytes([start[6], start[7]]) & V4_FRAGMENT_OFFSET == 0;
        if !is_first
            || !load_v4(skb, at + V4_SOURCE, source)
            || !load_v4(skb, at + V4_DESTINATION, destination)
        {
            return false;
        }
        u32::from(start[0] & 0xf) * 4
    };
    let Ok(header) = packet.load::<[u8; 8]>((at + length) as usize) else {
        return false;
    };
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    match enclosed.protocol {
        protocol::ICMP | protocol::ICMPV6 => enclosed.local_port = word(4),
        protocol if has_ports(protocol) => {
            let (from, to) = (word(0), word(2));
            (enclosed.local_port, enclosed.remote_port) =
                if arrives { (from, to) } else { (to, from) };
        }
        _ => {}
    }
    true
}

#[inline(always)]
fn load_v6(skb: *mut __sk_buff, at: u32, address: &mut Address) -> bool {
    // SAFETY: `skb` is the program's context, and sixteen bytes are what an address has.
    unsafe { bpf_skb_load_bytes(skb.cast(), at, address.as_mut_ptr().cast(), 16) == 0 }
}

#[inline(always)]
fn load_v4(skb: *mut __sk_buff, at: u32, address: &mut Address) -> bool {
    *address = ipv4_mapped([0; 4]);
    // SAFETY: as above; the last four bytes are IPv4's.
    unsafe { bpf_skb_load_bytes(skb.cast(), at, address[12..].as_mut_ptr().cast(), 4) == 0 }
}

/// Whether the kernel answers a packet to a loopback address by way of another device, under that
/// address or by an error: whoever has sent it has claimed an address from elsewhere. For namespaces that
/// workloads share, where the kernel's packets are no workload's.
#[inline(never)]
pub fn is_leak(skb: *mut __sk_buff) -> bool {
    let packet = SkBuffContext::new(skb);
    let Ok(first) = packet.load::<u8>(0) else {
        return true;
    };
    if first >> 4 == 4 {
        let loopback = |at: u32| {
            packet
                .load::<u8>(at as usize)
                .is_ok_and(|byte| byte == V4_LOOPBACK)
        };
        let enclosed = u32::from(first & 0xf) * 4 + ERROR_HEADER;
        let icmp = packet
            .load::<u8>(V4_PROTOCOL)
            .is_ok_and(|number| number == protocol::ICMP);
        return loopback(V4_SOURCE) || (icmp && loopback(enclosed + V4_DESTINATION));
    }
    let mut address = [0; 16];
    let mut loopback = |at: u32| load_v6(skb, at, &mut address) && address == LOCALHOST_V6;
    let icmp = packet
        .load::<u8>(V6_PROTOCOL)
        .is_ok_and(|number| number == protocol::ICMPV6);
    loopback(V6_SOURCE) || (icmp && loopback(V6_HEADER + ERROR_HEADER + V6_DESTINATION))
}
