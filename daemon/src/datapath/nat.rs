//! Rules of a network namespace that give a source address to what arrives (SNAT in `INPUT`): the
//! kernel keeps nothing of the true one, so that no program can judge it. The daemon can only warn.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Datapath, Error,
    diag::message::{find, word},
    netlink::{DUMP, Netlink, REQUEST},
    netns::Netns,
};

/// `NETLINK_NETFILTER`, and the messages of nftables in it (`linux/netfilter/nf_tables.h`).
const NETFILTER: i32 = 12;
const NFTABLES: u16 = 10 << 8;
const GET_CHAIN: u16 = NFTABLES | 4;
const NEW_CHAIN: u16 = NFTABLES | 3;
/// Family, version and resource before the attributes; of every family.
const FAMILY_HEADER: [u8; 4] = [0; 4];
/// Attributes of a chain.
const TABLE: u16 = 1;
const NAME: u16 = 3;
const HOOK: u16 = 4;
const USES: u16 = 6;
const KIND: u16 = 7;
/// Attribute of a hook.
const HOOK_NUMBER: u16 = 1;
/// `NF_INET_LOCAL_IN`.
const LOCAL_IN: u32 = 1;

/// Names of the tables that the older iptables has, by family, and how it is asked about one.
const OLDER: [(&str, Domain, i32, i32); 2] = [
    (
        "/proc/thread-self/net/ip_tables_names",
        Domain::IPV4,
        libc::SOL_IP,
        255,
    ),
    (
        "/proc/thread-self/net/ip6_tables_names",
        Domain::IPV6,
        libc::SOL_IPV6,
        255,
    ),
];
/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`.
const GET_INFO: i32 = 64;

/// `struct ipt_getinfo` of `linux/netfilter_ipv4/ip_tables.h`, IPv6's alike.
#[repr(C)]
struct TableInfo {
    name: [u8; 32],
    valid_hooks: u32,
    /// Where each hook's first rule lies, and where its policy does.
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    entries: u32,
    size: u32,
}

impl Datapath {
    /// Chains of a namespace whose rules may give what arrives another source address than it came
    /// with: programs judge by that address. Blocks.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn source_translations(&self, netns: &Netns) -> Result<Vec<String>, Error> {
        let mut chains = Vec::new();
        match nftables(netns, &mut chains) {
            // The kernel has no nftables.
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {}
            result => result.map_err(Error::in_namespace(netns, "list the chains of nftables"))?,
        }
        older_tables(netns, &mut chains).map_err(Error::in_namespace(
            netns,
            "look into the tables of iptables",
        ))?;
        Ok(chains)
    }
}

fn nftables(netns: &Netns, chains: &mut Vec<String>) -> io::Result<()> {
    let mut netlink = Netlink::open(netns, NETFILTER)?;
    let dump = REQUEST | DUMP;
    netlink.ask(GET_CHAIN, dump, &FAMILY_HEADER, NEW_CHAIN, |answer| {
        chains.extend(answer.get(FAMILY_HEADER.len()..).and_then(translating));
    })
}

/// The name of a chain that has rules and translates sources of what arrives.
fn translating(attributes: &[u8]) -> Option<String> {
    let text = |kind| {
        let value = find(attributes, kind)?;
        let end = value.iter().position(|byte| *byte == 0);
        Some(String::from_utf8_lossy(value.get(..end.unwrap_or(value.len()))?).into_owned())
    };
    let number = |value: &[u8]| word(value, 0).map(u32::from_be);
    let at_input = number(find(find(attributes, HOOK)?, HOOK_NUMBER)?)? == LOCAL_IN;
    let has_rules = find(attributes, USES).and_then(number) != Some(0);
    (at_input && has_rules && text(KIND)? == "nat")
        .then(|| Some(format!("{} {}", text(TABLE)?, text(NAME)?)))?
}

fn older_tables(netns: &Netns, chains: &mut Vec<String>) -> io::Result<()> {
    for (names, domain, level, protocol) in OLDER {
        let info = netns.run(|| {
            // Asking about a table that is not there would make it.
            let names = fs::read_to_string(names).unwrap_or_default();
            if !names.lines().any(|name| name == "nat") {
                return Ok(None);
            }
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)))?;
            table_info(&socket.into(), level).map(Some)
        })?;
        if let Some(info) = info
            && info.hook_entry[LOCAL_IN as usize] != info.underflow[LOCAL_IN as usize]
        {
            let program = if domain == Domain::IPV4 {
                "iptables-legacy"
            } else {
                "ip6tables-legacy"
            };
            chains.push(format!("{program} nat INPUT"));
        }
    }
    Ok(())
}

fn table_info(socket: &OwnedFd, level: i32) -> io::Result<TableInfo> {
    let mut name = [0; 32];
    name[..3].copy_from_slice(b"nat");
    let mut info = TableInfo {
        name,
        valid_hooks: 0,
        hook_entry: [0; 5],
        underflow: [0; 5],
        entries: 0,
        size: 0,
    };
    let mut length = size_of::<TableInfo>() as libc::socklen_t;
    // SAFETY: `info` is as long as is said, and made of integers alone.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            GET_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if done == 0 {
        Ok(info)
    } else {
        Err(io::Error::last_os_error())
    }
}
