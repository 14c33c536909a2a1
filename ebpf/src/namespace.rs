//! The network namespace of a packet's socket, the workload that owns it, and whether the socket is the
//! kernel's own.
//!
//! Linux 6.16 and later tell it to a packet's program. On older kernels the program reads it from
//! the kernel's own structures: it is the same number, for every socket, the kernel's own and those
//! from before the enrolment among them. Where the programs may not read kernel memory either, the
//! packet's address stands for the namespace.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{bpf_get_netns_cookie, bpf_probe_read_kernel, generated::bpf_skb_load_bytes},
};
use reeve_common::{
    Address, IPV4_MAPPED_PREFIX, NO_WORKLOAD, NamespaceSource, UNKNOWN_WORKLOAD, WorkloadId,
};

use crate::{
    address::field,
    judge,
    maps::{
        COOKIE_OFFSET, KERNEL_SOCKET_MASK, KERNEL_SOCKET_OFFSET, NAMESPACE_SOURCE, NAMESPACES,
        NETWORK_OFFSET, SOCKET_OFFSET,
    },
};

/// linux/if_ether.h, as a packet's `protocol` has it.
const ETH_P_IPV6: u16 = 0x86dd;

const HELPER: u8 = NamespaceSource::Helper as u8;
const KERNEL_MEMORY: u8 = NamespaceSource::KernelMemory as u8;

/// No workload is in the namespace: beyond every [`WorkloadId`].
const ABSENT: u64 = u64::MAX;

/// Whether any workload is in the namespace of a packet's socket.
#[inline(always)]
pub fn is_known(skb: *mut __sk_buff, arrives: bool) -> bool {
    find(skb, arrives) != ABSENT
}

/// The workload that alone owns the namespace of a packet's socket, [`NO_WORKLOAD`] where none does.
/// A namespace that cannot be read is [`UNKNOWN_WORKLOAD`]'s, to which everything is refused.
#[inline(always)]
pub fn owner(skb: *mut __sk_buff, arrives: bool) -> WorkloadId {
    match find(skb, arrives) {
        ABSENT => NO_WORKLOAD,
        owner => owner as WorkloadId,
    }
}

/// The owner, or [`ABSENT`].
///
/// The source is constant for the verifier: it drops the other branches, and with them the
/// helpers that this kernel may lack. A function of its own, for what it reads not to lie on the
/// stack while the packet is judged.
#[inline(never)]
fn find(skb: *mut __sk_buff, arrives: bool) -> u64 {
    let cookie = match NAMESPACE_SOURCE.load() {
        // SAFETY: `skb` is the program's context.
        HELPER => unsafe { bpf_get_netns_cookie(skb.cast()) },
        KERNEL_MEMORY => match read_cookie(skb) {
            Ok(cookie) => cookie,
            Err(_) => return UNKNOWN_WORKLOAD.into(),
        },
        _ => {
            return address(skb, arrives)
                .and_then(|own| judge::workload_at(&own))
                .map_or(ABSENT, u64::from);
        }
    };
    // SAFETY: one word of the entry is copied at once.
    unsafe { NAMESPACES.get(cookie) }.map_or(ABSENT, |entry| entry.workload.into())
}

/// `skb->sk->__sk_common.skc_net.net->net_cookie`. The kernel has put the socket for which the
/// program runs into `skb->sk`.
#[inline(always)]
fn read_cookie(skb: *mut __sk_buff) -> Result<u64, i32> {
    let at = |structure: *const u8, offset: u32| structure.wrapping_add(offset as usize);
    // SAFETY: the helper reads any address, and fails where nothing is mapped.
    unsafe {
        let socket: *const u8 =
            bpf_probe_read_kernel(at(skb.cast_const().cast(), SOCKET_OFFSET.load()).cast())?;
        let network: *const u8 = bpf_probe_read_kernel(at(socket, NETWORK_OFFSET.load()).cast())?;
        bpf_probe_read_kernel(at(network, COOKIE_OFFSET.load()).cast())
    }
}

/// Whether a packet's socket is one of the kernel's own, which no process has opened. `otherwise` where
/// that cannot be read.
#[inline(never)]
pub fn is_kernels(skb: *mut __sk_buff, otherwise: bool) -> bool {
    let mask = KERNEL_SOCKET_MASK.load();
    if mask == 0 {
        return otherwise;
    }
    let at = |structure: *const u8, offset: u32| structure.wrapping_add(offset as usize);
    // SAFETY: as in `read_cookie`.
    let read = unsafe {
        bpf_probe_read_kernel(at(skb.cast_const().cast(), SOCKET_OFFSET.load()).cast())
            .and_then(|socket| bpf_probe_read_kernel(at(socket, KERNEL_SOCKET_OFFSET.load())))
    };
    read.is_ok_and(|byte: u8| byte & mask != 0)
}

/// The address of the packet's own end: the source of one that leaves, the destination of one
/// that arrives.
#[inline(always)]
fn address(skb: *mut __sk_buff, arrives: bool) -> Option<Address> {
    // SAFETY: a field of the context.
    let inet6 = field(unsafe { &raw const (*skb).protocol }) == u32::from(ETH_P_IPV6.to_be());
    let mut address = [0; 16];
    if inet6 {
        load(skb, if arrives { 24 } else { 8 }, &mut address)?;
    } else {
        address[..12].copy_from_slice(&IPV4_MAPPED_PREFIX);
        load(skb, if arrives { 16 } else { 12 }, &mut address[12..])?;
    }
    Some(address)
}

#[inline(always)]
fn load(skb: *mut __sk_buff, offset: u32, into: &mut [u8]) -> Option<()> {
    // SAFETY: `skb` is the program's context, and the helper writes as many bytes as there are.
    let failed = unsafe {
        bpf_skb_load_bytes(
            skb.cast(),
            offset,
            into.as_mut_ptr().cast(),
            into.len() as u32,
        )
    };
    (failed == 0).then_some(())
}
