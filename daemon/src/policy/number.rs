//! Numbers that depend on what is numbered and on nothing else.
//!
//! The kernel's maps outlive the daemon and are changed entry by entry. With numbers made of the
//! content, an entry that is already there means the same after a change of policy or a restart,
//! and a record with a rule's number is still read right.

use std::collections::HashSet;

/// FNV-1a with 64 bits: the same on every machine and in every version, unlike the hashers of the
/// standard library. Nobody but the author of the policies chooses what is hashed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fingerprint(u64);

/// Gives each fingerprint a number other than 0. Of two that would get the same, the greater
/// fingerprint gets the next one that is free.
pub(super) fn numbers(fingerprints: &[u64]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..fingerprints.len()).collect();
    order.sort_by_key(|index| fingerprints.get(*index));
    let mut taken = HashSet::from([0]);
    let mut numbers = vec![0; fingerprints.len()];
    for index in order {
        let fingerprint = fingerprints.get(index).copied().unwrap_or_default();
        let folded = fingerprint ^ (fingerprint >> 32);
        let mut number = u32::try_from(folded & u64::from(u32::MAX)).unwrap_or_default();
        while !taken.insert(number) {
            number = number.wrapping_add(1);
        }
        if let Some(place) = numbers.get_mut(index) {
            *place = number;
        }
    }
    numbers
}

// === impl Fingerprint ===

impl Fingerprint {
    pub(super) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn of(text: &str) -> u64 {
        let mut fingerprint = Self::new();
        fingerprint.add(text.as_bytes());
        fingerprint.0
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub(super) fn finish(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_does_not_depend_on_its_neighbours_or_their_order() {
        let names = ["a", "b", "c"].map(Fingerprint::of);
        let [a, b, c] = numbers(&names)[..] else {
            panic!("three numbers");
        };
        assert_eq!(numbers(&[names[2], names[0]]), [c, a]);
        assert_eq!(numbers(&[names[1]]), [b]);
        // The published value of FNV-1a for "a".
        assert_eq!(Fingerprint::of("a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn no_two_get_the_same_and_none_gets_zero() {
        let numbers = numbers(&[7, 7, 7 << 32, 0]);
        let different: HashSet<_> = numbers.iter().collect();
        assert_eq!(different.len(), 4);
        assert!(!numbers.contains(&0));
    }
}
