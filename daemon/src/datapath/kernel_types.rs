//! Where fields lie in the running kernel's own structures, by its type information (BTF).

use std::{fs, io, ops::ControlFlow};

/// The kernel's type information.
const FILE: &str = "/sys/kernel/btf/vmlinux";

/// First bytes of it, as this machine writes them.
const MAGIC: u16 = 0xeb9f;
/// Bytes of a type without what follows it, of a member, and of the header as far as it is read.
const TYPE: usize = 12;
const MEMBER: usize = 12;
const HEADER: usize = 24;

/// Kinds of types, from `linux/btf.h`.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const ENUM64: u32 = 19;
    pub(super) const LAST: u32 = ENUM64;
}

/// The types of a kernel.
pub(super) struct KernelTypes {
    bytes: Vec<u8>,
    /// Where each type begins; the first has the number 1.
    types: Vec<usize>,
    /// Where the names begin.
    names: usize,
}

/// One type: its name, kind, number of members, and whether they may be bit fields.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    kind: u32,
    members: usize,
    has_bit_fields: bool,
    /// The type that this one is another name of.
    target: u32,
}

/// A member of a structure.
struct Member {
    /// Offset in bits.
    bits: u32,
    /// Its bits, 0 where it is no bit field.
    size: u32,
    /// Its type.
    of: u32,
}

// === impl KernelTypes ===

impl KernelTypes {
    /// Those of the running kernel.
    pub(super) fn of_running_kernel() -> io::Result<Self> {
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "it is not whole");
        Self::parse(fs::read(FILE)?).ok_or_else(malformed)
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        let magic = bytes.get(..2)?.try_into().ok()?;
        if u16::from_ne_bytes(magic) != MAGIC || bytes.len() < HEADER {
            return None;
        }
        let header = word(&bytes, 4)? as usize;
        let start = header.checked_add(word(&bytes, 8)? as usize)?;
        let end = start.checked_add(word(&bytes, 12)? as usize)?;
        let names = header.checked_add(word(&bytes, 16)? as usize)?;
        let mut types = Vec::new();
        let mut at = start;
        while at < end {
            types.push(at);
            at += TYPE + trailing(Type::read(&bytes, at)?)?;
        }
        Some(Self {
            bytes,
            types,
            names,
        })
    }

    /// Offset in bytes of the field that the names of `path` lead to, one within the other, from
    /// the start of a structure. None where there is no such field, or it is a bit field.
    pub(super) fn offset(&self, structure: &str, path: &[&str]) -> Option<u32> {
        let mut within = self.structure(structure)?;
        let mut offset = 0;
        for name in path {
            let member = self.member(within, name, 0)?;
            let is_whole = member.size == 0 && member.bits % 8 == 0;
            offset += is_whole.then_some(member.bits / 8)?;
            within = self.resolve(member.of)?;
        }
        Some(offset)
    }

    /// Where a field of one bit lies: its byte, from the start of a structure, and its place there.
    pub(super) fn bit(&self, structure: &str, name: &str) -> Option<(u32, u8)> {
        let member = self.member(self.structure(structure)?, name, 0)?;
        (member.size == 1).then_some((member.bits / 8, 1 << (member.bits % 8)))
    }

    fn structure(&self, name: &str) -> Option<Type> {
        let is_it = |at: &usize| {
            let found = Type::read(&self.bytes, *at)?;
            (found.kind == kind::STRUCT && self.is_named(found.name, name)).then_some(found)
        };
        self.types.iter().find_map(is_it)
    }

    /// A member, those of members without a name among them.
    fn member(&self, within: Type, name: &str, depth: u32) -> Option<Member> {
        /// Far more than any structure of the kernel nests.
        const DEEPEST: u32 = 16;
        if !matches!(within.kind, kind::STRUCT | kind::UNION) || depth > DEEPEST {
            return None;
        }
        let found = (0..within.members).try_for_each(|number| {
            let at = within.at + TYPE + number * MEMBER;
            let read = |offset| word(&self.bytes, at + offset);
            let (Some(called), Some(of), Some(bits)) = (read(0), read(4), read(8)) else {
                return ControlFlow::Break(None);
            };
            // The upper byte is then the size of a bit field.
            let (bits, size) = match within.has_bit_fields {
                true => (bits & 0xff_ffff, bits >> 24),
                false => (bits, 0),
            };
            if called == 0 {
                let inner = self.resolve(of);
                let inner = inner.and_then(|inner| self.member(inner, name, depth + 1));
                match inner {
                    Some(mut inner) => {
                        inner.bits += bits;
                        ControlFlow::Break(Some(inner))
                    }
                    None => ControlFlow::Continue(()),
                }
            } else if self.is_named(called, name) {
                ControlFlow::Break(Some(Member { bits, size, of }))
            } else {
                ControlFlow::Continue(())
            }
        });
        found.break_value().flatten()
    }

    /// A type without its other names and qualifiers.
    fn resolve(&self, mut number: u32) -> Option<Type> {
        // Each step leads to another type, unless they are malformed.
        for _ in 0..self.types.len() {
            let at = *self.types.get((number as usize).checked_sub(1)?)?;
            let found = Type::read(&self.bytes, at)?;
            match found.kind {
                kind::TYPEDEF | kind::CONST | kind::VOLATILE => number = found.target,
                _ => return Some(found),
            }
        }
        None
    }

    fn is_named(&self, name: u32, expected: &str) -> bool {
        let at = self.names + name as usize;
        let end = at + expected.len();
        self.bytes.get(at..end) == Some(expected.as_bytes()) && self.bytes.get(end) == Some(&0)
    }
}

impl Type {
    fn read(bytes: &[u8], at: usize) -> Option<Self> {
        let info = word(bytes, at + 4)?;
        Some(Self {
            at,
            name: word(bytes, at)?,
            kind: info >> 24 & 0x1f,
            members: (info & 0xffff) as usize,
            has_bit_fields: info >> 31 != 0,
            target: word(bytes, at + 8)?,
        })
    }
}

/// Bytes behind a type that belong to it. None for a kind that is not known.
fn trailing(of: Type) -> Option<usize> {
    Some(match of.kind {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => of.members * MEMBER,
        kind::ENUM | kind::FUNC_PROTO => of.members * 8,
        1..=kind::LAST => 0,
        _ => return None,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::KernelTypes;

    /// Fields whose places `linux/bpf.h` and decades of the kernel's binary interface fix.
    #[test]
    fn fields_lie_where_the_interface_of_the_kernel_says() {
        let types = KernelTypes::of_running_kernel().unwrap();
        assert_eq!(types.offset("iphdr", &["saddr"]), Some(12));
        assert_eq!(types.offset("tcphdr", &["dest"]), Some(2));
        assert_eq!(types.offset("sockaddr_in6", &["sin6_addr"]), Some(8));
        // Within a member without a name, and behind another name of a type.
        assert_eq!(types.offset("in6_addr", &["in6_u", "u6_addr32"]), Some(0));
        let whole = types.offset("sock", &["__sk_common", "skc_net", "net"]);
        let part = types.offset("sock_common", &["skc_net"]);
        assert_eq!(whole, part);
        assert_eq!(types.bit("tcphdr", "fin"), Some((13, 1)));
        assert_eq!(types.bit("tcphdr", "ack"), Some((13, 16)));
        assert!(types.bit("sock", "sk_kern_sock").is_some());
        assert!(types.offset("sk_buff", &["sk"]).is_some());
        assert!(types.offset("net", &["net_cookie"]).is_some());
    }

    #[test]
    fn what_is_not_there_has_no_offset() {
        let types = KernelTypes::of_running_kernel().unwrap();
        assert_eq!(types.offset("no_such_structure", &["field"]), None);
        assert_eq!(types.offset("iphdr", &["no_such_field"]), None);
        assert_eq!(types.offset("iphdr", &["saddr", "within"]), None);
        // A bit field, of more than one bit.
        assert_eq!(types.offset("iphdr", &["version"]), None);
        assert_eq!(types.bit("iphdr", "version"), None);
        assert_eq!(types.bit("tcphdr", "dest"), None);
    }

    #[test]
    fn bytes_that_are_no_type_information_are_refused() {
        for length in 0..64 {
            assert!(KernelTypes::parse(vec![0; length]).is_none());
        }
        let whole = std::fs::read(super::FILE).unwrap();
        for length in [0, 1, 8, 24, whole.len() / 3] {
            assert!(KernelTypes::parse(whole[..length].to_vec()).is_none());
        }
    }
}
