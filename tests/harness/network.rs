//! A network: a bridge in a namespace of its own, to which nodes and workloads are joined.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use crate::{Capture, Netns, Place, run::Run};

/// The addresses of one member of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// In 10.77.0.0/16.
    pub v4: Ipv4Addr,
    /// In fd00:77::/64.
    pub v6: Ipv6Addr,
}

impl Addresses {
    fn numbered(number: u16) -> Self {
        let [high, low] = number.to_be_bytes();
        Self {
            v4: Ipv4Addr::new(10, 77, high, low),
            v6: Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, number),
        }
    }

    fn number(&self) -> u16 {
        let [.., number] = self.v6.segments();
        number
    }

    /// Both.
    #[must_use]
    pub fn both(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// This port at the IPv4 address.
    #[must_use]
    pub fn port4(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// This port at the IPv6 address.
    #[must_use]
    pub fn port6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }
}

/// A network of its own: nothing on it reaches the machine, and the other way round.
#[derive(Clone, Debug)]
pub struct Network {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    place: Place,
    joined: AtomicU16,
    trust: PathBuf,
}

impl Network {
    /// A network without members.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes something")]
    pub fn new() -> Self {
        let run = Run::this();
        let place = Place::new(
            Some(Arc::new(Netns::new())),
            Arc::new(run.cgroup("network")),
        );
        // Snooping would hold back neighbour discovery until somebody asked for it.
        place.ip(&[
            "link add wire type bridge mcast_snooping 0",
            "link set wire up",
        ]);
        Self {
            inner: Arc::new(Inner {
                place,
                joined: AtomicU16::new(0),
                // Made by the first daemon, for nobody else to read.
                trust: run.folder("trust").join("ca"),
            }),
        }
    }

    /// Where the nodes of this network keep the certificate authority that they share.
    #[must_use]
    pub fn trust(&self) -> &Path {
        &self.inner.trust
    }

    /// Gives a namespace an interface `eth0` on this network, with addresses of its own.
    pub(crate) fn join(&self, member: &Place) -> Joined {
        let number = self.inner.joined.fetch_add(1, Ordering::Relaxed) + 1;
        self.join_at(member, Addresses::numbered(number))
    }

    /// Gives a namespace an interface with addresses that nobody has any more.
    pub(crate) fn join_at(&self, member: &Place, addresses: Addresses) -> Joined {
        let port = Run::this().unique("port");
        let [high, low] = addresses.number().to_be_bytes();
        let wire = self.inner.place.netns().expect("a network has a namespace");
        let Addresses { v4, v6 } = addresses;
        member.ip(&[
            &format!(
                // Who has the address has the same hardware address: what others remember of
                // it stays right when the address moves.
                "link add eth0 address 02:77:00:00:{high:02x}:{low:02x} \
                 type veth peer name {port} netns {}",
                wire.path().display()
            ),
            "link set lo up",
            "link set eth0 up",
            &format!("addr add {v4}/16 dev eth0"),
            // A test need not wait for duplicate address detection.
            &format!("addr add {v6}/64 dev eth0 nodad"),
        ]);
        self.inner
            .place
            .ip(&[&format!("link set {port} master wire up")]);
        Joined { addresses, port }
    }

    /// Takes away a member's interface.
    pub(crate) fn leave(&self, joined: &Joined) {
        self.inner.place.ip(&[&format!("link del {}", joined.port)]);
    }

    /// Sets a member's interface `up` or `down`, at the bridge's end.
    pub(crate) fn set_port(&self, port: &str, state: &str) {
        self.inner.place.ip(&[&format!("link set {port} {state}")]);
    }

    /// Whether a member's interface is there: it goes with the member's namespace.
    pub(crate) fn has_port(&self, port: &str) -> bool {
        let show = ["ip", "-o", "link", "show", port];
        self.inner.place.exec(show).status.success()
    }

    /// Captures what passes the network's port of one member.
    pub(crate) fn capture(&self, port: &str) -> Capture {
        Capture::start(self.inner.place.clone(), port)
    }
}

/// How a member is joined.
#[derive(Clone, Debug)]
pub(crate) struct Joined {
    pub(crate) addresses: Addresses,
    /// Name of the bridge's interface that leads to it.
    pub(crate) port: String,
}
