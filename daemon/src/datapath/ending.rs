//! Ends what is under way and no longer allowed: connections by their sockets, flows by their
//! entries; and what others listen with where reeve is to.

use std::{io, os::fd::AsFd};

use aya::maps::MapError;
use reeve_common::{FLOW_IDLE_NANOSECONDS, Flow, FlowSlot, ToldKey, protocol};

use super::{Datapath, Error, Listener, LiveSocket, diag::Diagnosis, lock, netns::Netns, sys};

impl Datapath {
    /// Ends the connections of a namespace that `is_over` says are. TCP's other ends get a reset,
    /// and the applications an error. Gives those that were ended here, and not by themselves
    /// meanwhile. Blocks.
    ///
    /// # Errors
    ///
    /// From the kernel; its `sock_diag` may lack the ending (`CONFIG_INET_DIAG_DESTROY`). Packets
    /// of connections that are not allowed are refused all the same.
    pub fn end_connections(
        &self,
        netns: &Netns,
        mut is_over: impl FnMut(&LiveSocket) -> bool,
    ) -> Result<Vec<LiveSocket>, Error> {
        let mut diagnosis =
            Diagnosis::open(netns).map_err(Error::in_namespace(netns, "open a netlink socket"))?;
        let mut sockets = diagnosis
            .sockets(self.tags.as_fd())
            .map_err(Error::in_namespace(netns, "list the sockets (sock_diag)"))?;
        sockets.retain(&mut is_over);
        let mut ended = Vec::with_capacity(sockets.len());
        for socket in sockets {
            if diagnosis
                .destroy(&socket)
                .map_err(Error::in_namespace(netns, "end a connection (sock_diag)"))?
            {
                ended.push(socket);
            }
        }
        Ok(ended)
    }

    /// Closes the TCP sockets of a namespace that listen on one of reeve's ports, or are connected from
    /// one, and that `is_foreign` says are somebody else's by the cgroup in which they were made; no
    /// program knows them for reeve's. Gives the listeners that were closed.
    /// Their ports stay taken for as long as their sockets are held: where reeve's cannot be bound
    /// beside them, the one who holds them has to let go. Blocks.
    ///
    /// # Errors
    ///
    /// As of [`Datapath::end_connections`]. Whoever listens there still gets nothing of a tunnel.
    pub fn close_listeners(
        &self,
        netns: &Netns,
        mut is_foreign: impl FnMut(u64) -> bool,
    ) -> Result<Vec<Listener>, Error> {
        let mut diagnosis =
            Diagnosis::open(netns).map_err(Error::in_namespace(netns, "open a netlink socket"))?;
        let mut closed = Vec::new();
        let ports = [self.settings.ports.outbound, self.settings.ports.tunnel];
        for port in ports {
            let listeners = diagnosis
                .listeners(port, self.tags.as_fd())
                .map_err(Error::in_namespace(netns, "list the listeners (sock_diag)"))?;
            for listener in &listeners {
                if listener.of_reeve || !is_foreign(listener.cgroup) {
                    continue;
                }
                let same = |other: &&Listener| other.local == listener.local;
                let sharing = listeners.iter().filter(same).count();
                if diagnosis
                    .close(listener, sharing)
                    .map_err(Error::in_namespace(netns, "close a listener (sock_diag)"))?
                {
                    closed.push(listener.clone());
                }
            }
        }
        self.end_connections(netns, |socket| {
            socket.protocol == protocol::TCP
                && ports.contains(&socket.local.port())
                && !socket.remembered.is_some_and(|tag| tag.of_reeve)
                && is_foreign(socket.cgroup)
        })?;
        Ok(closed)
    }

    /// Whether it is for the caller to tell that a socket's connection is refused in a generation:
    /// no program has. True once for each socket and generation.
    #[must_use]
    pub fn tells(&self, socket: &LiveSocket, generation: u32) -> bool {
        /// `BPF_NOEXIST` of `linux/bpf.h`.
        const NEW_ONLY: u64 = 1;
        let key = ToldKey {
            cookie: socket.cookie,
            generation,
            reserved: 0,
        };
        match lock(&self.told).insert(key, 0, NEW_ONLY) {
            Err(MapError::SyscallError(error)) => {
                error.io_error.kind() != io::ErrorKind::AlreadyExists
            }
            _ => true,
        }
    }

    /// Forgets the flows, connections without a handshake, that `is_over` says are no longer
    /// allowed, and gives those that no program has forgotten meanwhile. Walks the map: for a
    /// change of policy, not for every packet. Blocks.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn end_flows(
        &self,
        mut is_over: impl FnMut(&FlowSlot, &Flow) -> bool,
    ) -> Result<Vec<(FlowSlot, Flow)>, Error> {
        let over: Vec<FlowSlot> = self
            .flows
            .0
            .iter()
            // A walk that entries are removed from meanwhile may come to its end early.
            .map_while(Result::ok)
            .filter(|(key, entry)| is_over(key, entry))
            .map(|(key, _)| key)
            .collect();
        let mut ended = Vec::with_capacity(over.len());
        for key in over {
            let taken = sys::take(self.revoked.as_fd(), &key).map_err(|source| Error::Pin {
                doing: "take an entry out of the map",
                path: lock(&self.pins).folder().join("FLOWS"),
                source,
            })?;
            ended.extend(taken.map(|entry| (key, entry)));
        }
        Ok(ended)
    }

    /// Forgets the flows without a packet for so long that the next one is judged anew: the map
    /// then holds what is in use, and no more. `now` is `CLOCK_MONOTONIC`'s, in nanoseconds. Blocks.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn forget_idle_flows(&self, now: u64) -> Result<usize, Error> {
        let idle = |flow: &Flow| now.saturating_sub(flow.last_seen) >= FLOW_IDLE_NANOSECONDS;
        Ok(self.end_flows(|_, flow| idle(flow))?.len())
    }
}
