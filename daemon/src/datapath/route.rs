//! Routes inside a workload's namespace, so that an application's replies to a client elsewhere
//! come back to the daemon, which spoke to it with that client's address.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
};

use futures_util::StreamExt as _;
use reeve_common::{ONWARD_MARK, ONWARD_ROUTE_TABLE};
use rtnetlink::{
    Error as NetlinkError, Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use super::{Error, netns::Netns};

/// Has replies on an accepted connection carry the mark that the connection's packets had, of
/// either family; and the same for what the kernel answers where nobody accepts.
const KEEP_MARK: [&str; 3] = [
    "sys/net/ipv4/tcp_fwmark_accept",
    "sys/net/ipv4/fwmark_reflect",
    "sys/net/ipv6/fwmark_reflect",
];

/// The loopback device's index, in every namespace.
const LOOPBACK_DEVICE: u32 = 1;

/// Where reeve's rule stands: directly behind the kernel's own of the table `local`. Rules of others, as
/// those by source addresses, would take replies elsewhere; one that is added without a priority gets the
/// same and comes behind it.
const PRIORITY: u32 = 0;

/// Makes the namespace ready for connections to local applications, and gives what was not as it has to
/// be. Its settings are those that a thread inside sees below `proc`.
pub(super) async fn prepare(netns: &Netns, proc: &Path) -> Result<Vec<String>, Error> {
    let mut mended = netns
        .run(|| {
            let mut mended = Vec::new();
            for setting in KEEP_MARK {
                if switch_on(&proc.join(setting))? {
                    mended.push(setting.trim_start_matches("sys/").replace('/', "."));
                }
            }
            Ok(mended)
        })
        .map_err(Error::in_namespace(
            netns,
            "set tcp_fwmark_accept and fwmark_reflect (sysctl)",
        ))?;
    // The socket stays in the namespace in which it was made.
    let (connection, handle, _) = netns
        .run(rtnetlink::new_connection)
        .map_err(Error::in_namespace(netns, "open a netlink socket"))?;
    let connection = tokio::spawn(connection);
    let result = async {
        mended.extend(route(&handle, AddressFamily::Inet).await?);
        match route(&handle, AddressFamily::Inet6).await {
            Err(error) if has_no_inet6(&error) => {}
            result => mended.extend(result?),
        }
        Ok(mended)
    }
    .await
    .map_err(Error::in_namespace(
        netns,
        "route marked packets to the loopback device",
    ));
    connection.abort();
    result
}

/// Whether the namespace's settings are as [`prepare`] makes them, of which the kernel tells nobody.
pub(super) fn is_set(netns: &Netns, proc: &Path) -> io::Result<bool> {
    netns.run(|| {
        for setting in KEEP_MARK {
            if !is_on(&proc.join(setting))? {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

/// Takes back what [`prepare`] routed. True where there was anything.
pub(super) async fn take_back(netns: &Netns) -> Result<bool, Error> {
    let (connection, handle, _) = netns
        .run(rtnetlink::new_connection)
        .map_err(Error::in_namespace(netns, "open a netlink socket"))?;
    let connection = tokio::spawn(connection);
    let result = async {
        let mut found = false;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            match unroute(&handle, family).await {
                Err(error) if has_no_inet6(&error) => {}
                result => found |= result?,
            }
        }
        Ok(found)
    }
    .await
    .map_err(Error::in_namespace(
        netns,
        "remove the routing of marked packets",
    ));
    connection.abort();
    result
}

/// `ip rule del fwmark MARK lookup TABLE` and `ip route del local default dev lo table TABLE`.
async fn unroute(handle: &Handle, family: AddressFamily) -> io::Result<bool> {
    let mut found = false;
    for priority in priorities(handle, family).await? {
        found |= remove(handle, family, priority).await?;
    }
    let route = default_to_loopback(family);
    let route = was_there(handle.route().del(route).execute().await)?;
    Ok(found || route)
}

/// The priorities of the rules that are there for the mark, those of earlier reeves as well.
async fn priorities(handle: &Handle, family: AddressFamily) -> io::Result<Vec<u32>> {
    let version = match family {
        AddressFamily::Inet => IpVersion::V4,
        _ => IpVersion::V6,
    };
    let mut rules = handle.rule().get(version).execute();
    let mut found = Vec::new();
    while let Some(rule) = rules.next().await {
        let rule = rule.map_err(io_error)?;
        let has = |attribute| rule.attributes.contains(&attribute);
        if has(RuleAttribute::FwMark(ONWARD_MARK)) && has(RuleAttribute::Table(ONWARD_ROUTE_TABLE))
        {
            let priority = |attribute: &RuleAttribute| match attribute {
                RuleAttribute::Priority(priority) => Some(*priority),
                _ => None,
            };
            found.push(
                rule.attributes
                    .iter()
                    .find_map(priority)
                    .unwrap_or_default(),
            );
        }
    }
    Ok(found)
}

async fn remove(handle: &Handle, family: AddressFamily, priority: u32) -> io::Result<bool> {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = RuleAction::ToTable;
    rule.attributes.push(RuleAttribute::FwMark(ONWARD_MARK));
    rule.attributes
        .push(RuleAttribute::Table(ONWARD_ROUTE_TABLE));
    rule.attributes.push(RuleAttribute::Priority(priority));
    was_there(handle.rule().del(rule).execute().await)
}

/// Switches a kernel setting on. True where it was off.
fn switch_on(path: &Path) -> io::Result<bool> {
    let off = !is_on(path)?;
    if off {
        fs::write(path, "1")?;
    }
    Ok(off)
}

/// Whether a kernel setting is on. One that is missing is IPv6's, where the kernel has none.
fn is_on(path: &Path) -> io::Result<bool> {
    match fs::read_to_string(path) {
        Ok(value) => Ok(value.trim() == "1"),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                && path.components().any(|part| part.as_os_str() == "ipv6") =>
        {
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// `ip rule add fwmark MARK lookup TABLE priority PRIORITY` and `ip route add local default dev lo
/// table TABLE`; and no other rule for the mark. Gives what was missing.
async fn route(handle: &Handle, family: AddressFamily) -> io::Result<Vec<String>> {
    let mut added = Vec::new();
    let mut priorities = priorities(handle, family).await?;
    if let Some(place) = priorities.iter().position(|one| *one == PRIORITY) {
        priorities.remove(place);
    } else {
        let rule = handle
            .rule()
            .add()
            .fw_mark(ONWARD_MARK)
            .table_id(ONWARD_ROUTE_TABLE)
            .priority(PRIORITY)
            .action(RuleAction::ToTable);
        let rule = if family == AddressFamily::Inet {
            rule.v4().execute().await
        } else {
            rule.v6().execute().await
        };
        if was_missing(rule)? {
            added.push(format!("the rule for marked packets ({family:?})"));
        }
    }
    for priority in priorities {
        remove(handle, family, priority).await?;
    }
    let route = default_to_loopback(family);
    if was_missing(handle.route().add(route).execute().await)? {
        added.push(format!("the route of marked packets ({family:?})"));
    }
    Ok(added)
}

fn default_to_loopback(family: AddressFamily) -> RouteMessage {
    if family == AddressFamily::Inet {
        to_loopback(RouteMessageBuilder::<Ipv4Addr>::new())
    } else {
        to_loopback(RouteMessageBuilder::<Ipv6Addr>::new())
    }
}

fn to_loopback<T>(route: RouteMessageBuilder<T>) -> RouteMessage {
    route
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(LOOPBACK_DEVICE)
        .table_id(ONWARD_ROUTE_TABLE)
        .build()
}

/// What is there already is what was wanted.
fn was_missing(result: Result<(), NetlinkError>) -> io::Result<bool> {
    match result.map_err(io_error) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// What is not there needs no removal.
fn was_there(result: Result<(), NetlinkError>) -> io::Result<bool> {
    match result.map_err(io_error) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error().is_some_and(is_absent) => Ok(false),
        Err(error) => Err(error),
    }
}

/// ENOENT of a rule, ESRCH of a route.
fn is_absent(code: i32) -> bool {
    [libc::ENOENT, libc::ESRCH].contains(&code)
}

fn io_error(error: NetlinkError) -> io::Error {
    match error {
        NetlinkError::NetlinkError(message) => message.to_io(),
        error => io::Error::other(error),
    }
}

/// Whether an error says that the namespace has no IPv6: not built, switched off at boot, or
/// switched off on the device.
fn has_no_inet6(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| {
        [
            libc::EAFNOSUPPORT,
            libc::EOPNOTSUPP,
            libc::ENODEV,
            libc::EACCES,
        ]
        .contains(&code)
    })
}
