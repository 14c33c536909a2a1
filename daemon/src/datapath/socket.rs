//! The daemon's sockets inside network namespaces.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Once,
};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use reeve_common::{LOCAL_CONGESTION_CONTROL, ONWARD_MARK};
use socket2::{Domain, Protocol, Socket, Type};

use super::netns::Netns;
use crate::config::CongestionControl;

/// Connections that wait to be accepted; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

impl Netns {
    /// A non-blocking TCP socket in this namespace for the daemon's own connections to peers.
    ///
    /// # Errors
    /// From the kernel.
    pub fn tunnel_socket(&self, domain: Domain) -> io::Result<Socket> {
        self.run(|| tcp(domain))
    }

    /// Non-blocking TCP sockets in this namespace for connections to local applications:
    /// `IP_TRANSPARENT`, and marked with `ONWARD_MARK`. [`speak_as`] says with whose address, and
    /// [`SocketStorage::deliver_to`](super::SocketStorage::deliver_to) to whom: without that they
    /// cannot be connected.
    /// `count` of them, or none: the namespace is entered once for all.
    ///
    /// # Errors
    /// From the kernel.
    pub fn onward_sockets(&self, domain: Domain, count: usize) -> io::Result<Vec<Socket>> {
        let open = || (0..count).map(|_| tcp(domain)).collect();
        let sockets: Vec<Socket> = self.run(open)?;
        for socket in &sockets {
            if domain == Domain::IPV4 {
                socket.set_ip_transparent_v4(true)?;
            } else {
                socket.set_ip_transparent_v6(true)?;
            }
            socket.set_mark(ONWARD_MARK)?;
            // A port is taken for each pair of addresses, rather than for the client's address
            // alone.
            setsockopt(socket, IpBindAddressNoPort, &true)?;
        }
        Ok(sockets)
    }

    /// Listening, non-blocking sockets for redirected connections: on every IPv4 address, since each
    /// destination has one of its own ([`reeve_common::redirect_address`]), and on `::1` (only the first
    /// where the namespace has no IPv6). The programs let in redirected connections alone.
    /// `SO_REUSEPORT`, one set per worker.
    /// What they accept inherits [`LOCAL_CONGESTION_CONTROL`]; the kernel programs set it for the
    /// other ends, and for both ends of onward connections.
    ///
    /// # Errors
    /// From the kernel.
    pub fn outbound_listeners(&self, port: u16) -> io::Result<Vec<Socket>> {
        let v4 = self.run(|| listen_for_redirected((Ipv4Addr::UNSPECIFIED, port).into()))?;
        let v6 = self.outbound_listener_v6(port)?;
        Ok([v4].into_iter().chain(v6).collect())
    }

    /// The one of [`Netns::outbound_listeners`] at `::1`; none where the namespace has no IPv6 now.
    ///
    /// # Errors
    /// From the kernel.
    pub fn outbound_listener_v6(&self, port: u16) -> io::Result<Option<Socket>> {
        match self.run(|| listen_for_redirected((Ipv6Addr::LOCALHOST, port).into())) {
            Ok(v6) => Ok(Some(v6)),
            Err(error) if has_no_inet6(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Listening, non-blocking socket for tunnels on every address: IPv4 clients appear with
    /// mapped addresses where the namespace has IPv6. `SO_REUSEPORT`.
    ///
    /// # Errors
    /// From the kernel.
    pub fn tunnel_listener(&self, port: u16) -> io::Result<Socket> {
        self.run(|| match listen((Ipv6Addr::UNSPECIFIED, port).into()) {
            Err(error) if has_no_inet6(&error) => listen((Ipv4Addr::UNSPECIFIED, port).into()),
            result => result,
        })
    }
}

/// Lets a [`Netns::tunnel_socket`] speak to `to` from an address of its namespace. Its port is chosen
/// when it connects.
///
/// # Errors
/// As of [`speak_as`]; `AddrNotAvailable` where the namespace does not have the address.
pub fn speak_from(socket: &Socket, own: IpAddr, to: SocketAddr) -> io::Result<()> {
    setsockopt(socket, IpBindAddressNoPort, &true)?;
    speak_as(socket, own, to)
}

/// Has one of [`Netns::onward_sockets`] speak to `to` with the address of `client`. Its port is chosen
/// when it connects. Needs no privilege: making the socket did.
///
/// # Errors
/// `InvalidInput` where `client` and `to` are of different families, else from the kernel.
pub fn speak_as(socket: &Socket, client: IpAddr, to: SocketAddr) -> io::Result<()> {
    if client.is_ipv4() != to.is_ipv4() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{client} cannot speak to {to}: the one is IPv4 and the other IPv6"),
        ));
    }
    socket.bind(&SocketAddr::new(client, 0).into())
}

/// Has a tunnel's socket, or what a listening one will accept, use this congestion control. Where the
/// kernel has none of that name the host's own stays, which is said once: tunnels work all the same.
pub fn control_congestion(socket: &Socket, congestion_control: CongestionControl) {
    static SAID: Once = Once::new();
    let Some(name) = congestion_control.name() else {
        return;
    };
    if let Err(error) = socket.set_tcp_congestion(name.as_bytes()) {
        SAID.call_once(|| {
            tracing::warn!(
                name,
                %error,
                "tunnels use the host's congestion control: the kernel does not give the one that \
                 `tunnel.congestionControl` names"
            );
        });
    }
}

/// A non-blocking TCP socket that sends what it is given at once: a tunnel has gathered what
/// belongs together.
fn tcp(domain: Domain) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

fn listen_for_redirected(address: SocketAddr) -> io::Result<Socket> {
    let socket = listen(address)?;
    socket.set_tcp_congestion(&LOCAL_CONGESTION_CONTROL)?;
    Ok(socket)
}

fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = tcp(Domain::for_address(address))?;
    // Connections of an earlier daemon may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if let IpAddr::V6(ip) = address.ip() {
        socket.set_only_v6(!ip.is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Whether an error says that the namespace has no IPv6: not built or switched off at boot, or no
/// such address because it is switched off on the devices.
fn has_no_inet6(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|code| [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL].contains(&code))
}
