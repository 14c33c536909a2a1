//! Addresses as the hooks give them.
//!
//! The verifier allows a hook's context to be read in words only, at offsets that are known when
//! the program is built. So every read is a volatile one, which the compiler neither merges with
//! its neighbour nor moves behind a branch, and addresses are put together from words.

use core::ptr::read_volatile;

use reeve_common::Address;

/// `AF_INET6`; everything else that reaches a program is IPv4.
pub const FAMILY_INET6: u32 = 10;

/// The third word of an IPv4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

/// Reads a field of a hook's context.
#[inline(always)]
pub fn field<T: Copy>(field: *const T) -> T {
    // SAFETY: the caller names a field of the context that the kernel passed to the program.
    unsafe { read_volatile(field) }
}

/// An IPv4 address in network byte order.
#[inline(always)]
pub fn v4(word: u32) -> Address {
    from_words([0, 0, MAPPED, word])
}

/// An IPv6 address in network byte order.
#[inline(always)]
pub fn v6(address: *const [u32; 4]) -> Address {
    from_words(read_words(address))
}

/// Whichever the socket's family says: hooks for both families hold both.
#[inline(always)]
pub fn of_family(family: u32, v4: *const u32, v6: *const [u32; 4]) -> Address {
    let v4 = field(v4);
    let v6 = read_words(v6);
    from_words(if family == FAMILY_INET6 {
        v6
    } else {
        [0, 0, MAPPED, v4]
    })
}

#[inline(always)]
fn read_words(address: *const [u32; 4]) -> [u32; 4] {
    let word: *const u32 = address.cast();
    // SAFETY: four words long.
    unsafe {
        [
            field(word),
            field(word.add(1)),
            field(word.add(2)),
            field(word.add(3)),
        ]
    }
}

#[inline(always)]
fn from_words(words: [u32; 4]) -> Address {
    // SAFETY: sixteen bytes either way, in the order of memory.
    unsafe { core::mem::transmute(words) }
}

/// The words of an address, in network byte order.
#[inline(always)]
pub fn to_words(address: &Address) -> [u32; 4] {
    // SAFETY: as above.
    unsafe { core::mem::transmute(*address) }
}

/// Whether this is an IPv4-mapped address.
#[inline(always)]
pub fn is_mapped(address: &Address) -> bool {
    let words = to_words(address);
    words[0] == 0 && words[1] == 0 && words[2] == MAPPED
}

/// Whether this never leaves the machine: 127.0.0.0/8 and `::1`, and what Linux takes for them as
/// a destination, 0.0.0.0 and `::`.
#[inline(always)]
pub fn is_loopback(address: &Address) -> bool {
    let words = to_words(address);
    if words[0] != 0 || words[1] != 0 {
        return false;
    }
    let last = u32::from_be(words[3]);
    match words[2] {
        0 => last <= 1,
        MAPPED => last >> 24 == 127 || last == 0,
        _ => false,
    }
}

/// Whether this is no address at all: 0.0.0.0 or `::`.
#[inline(always)]
pub fn is_unspecified(address: &Address) -> bool {
    let words = to_words(address);
    words[0] == 0 && words[1] == 0 && words[3] == 0 && (words[2] == 0 || words[2] == MAPPED)
}
