//! The addresses of the host's network, for as long as they count as the node's
//! (`node.hostAddresses`).

use std::{collections::BTreeSet, io, net::IpAddr, pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt};
use nix::ifaddrs::getifaddrs;
use rtnetlink::MulticastGroup;
use tokio::{task::JoinHandle, time::sleep};

/// Between two looks that nothing caused: the kernel tells of changes, and may lose word of some.
const POLL: Duration = Duration::from_secs(30);

/// What the daemon's own network namespace has for addresses.
#[derive(Default)]
pub(super) struct HostAddresses {
    current: Arc<[IpAddr]>,
    wanted: bool,
    /// None where the kernel did not take the question.
    word: Option<Word>,
}

/// Word of the kernel that addresses have changed.
struct Word {
    messages: Pin<Box<dyn Stream<Item = ()> + Send>>,
    connection: JoinHandle<()>,
}

// === impl HostAddresses ===

impl HostAddresses {
    /// Follows the addresses from now on, or has none any more.
    pub(super) fn follow(&mut self, wanted: bool) {
        if !wanted {
            *self = Self::default();
            return;
        }
        self.wanted = true;
        self.ask();
        self.read();
    }

    /// Those of now.
    pub(super) fn current(&self) -> Arc<[IpAddr]> {
        self.current.clone()
    }

    /// Comes back when there are others. May be given up at any time.
    pub(super) async fn changed(&mut self) {
        while self.wanted {
            let told = async {
                match &mut self.word {
                    Some(word) => word.messages.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                told = told => if told.is_none() {
                    self.word = None;
                },
                () = sleep(POLL) => self.ask(),
            }
            if self.read() {
                return;
            }
        }
        std::future::pending().await
    }

    fn ask(&mut self) {
        if self.word.is_some() {
            return;
        }
        match Word::ask() {
            Ok(word) => self.word = Some(word),
            Err(error) => tracing::warn!(
                %error,
                every = %humantime::format_duration(POLL),
                "the kernel does not tell of changed addresses; they are looked at now and then"
            ),
        }
    }

    /// Whether there are others.
    fn read(&mut self) -> bool {
        match addresses() {
            Ok(new) if *new != *self.current => {
                tracing::info!(addresses = ?new, "addresses of the node");
                self.current = new;
                true
            }
            Ok(_) => false,
            Err(error) => {
                tracing::error!(%error, "the addresses of the node cannot be read");
                false
            }
        }
    }
}

// === impl Word ===

impl Word {
    fn ask() -> io::Result<Self> {
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)?;
        Ok(Self {
            messages: Box::pin(messages.map(drop)),
            connection: tokio::spawn(connection),
        })
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Those that are this host's alone: not loopback, and not of a link, where any neighbour can have
/// the same.
fn addresses() -> io::Result<Arc<[IpAddr]>> {
    let found: BTreeSet<IpAddr> = getifaddrs()?
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| address.ip().into());
            v4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
        })
        .filter(|ip| match ip {
            IpAddr::V4(ip) => !(ip.is_loopback() || ip.is_link_local() || ip.is_unspecified()),
            IpAddr::V6(ip) => {
                !(ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified())
            }
        })
        .collect();
    Ok(found.into_iter().collect())
}
