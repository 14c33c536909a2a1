//! A workload: where its processes run, and who they are.

use std::ops::Deref;

use serde_json::{Value, json};

use crate::{Addresses, Capture, Network, Place, Process, network::Joined};

/// A place for a workload's processes. Whether it is enrolled is for a daemon's settings to say.
#[derive(Debug)]
pub struct Workload {
    name: String,
    /// Does nothing, like a pod's first process: a namespace is found by its processes.
    _pause: Process,
    place: Place,
    joined: Joined,
}

impl Workload {
    pub(crate) fn new(name: &str, place: Place, joined: Joined) -> Self {
        Self {
            name: name.to_owned(),
            _pause: place.spawn(["sleep", "infinity"]),
            place,
            joined,
        }
    }

    /// Its name, which is also its service account and its label `app`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its addresses.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.joined.addresses
    }

    /// A URL of a server here, by IPv4.
    #[must_use]
    pub fn url(&self, port: u16, path: &str) -> String {
        format!("http://{}{path}", self.addresses().port4(port))
    }

    /// Its SPIFFE ID in a trust domain, where nothing else is set.
    #[must_use]
    pub fn spiffe_id(&self, trust_domain: &str) -> String {
        format!("spiffe://{trust_domain}/ns/default/sa/{}", self.name)
    }

    /// Ends it as a node does: its processes, its cgroup and its interface are gone.
    pub fn end(self, network: &Network) {
        self.place.cgroup().kill();
        network.leave(&self.joined);
    }

    /// Ends its processes and lets go of its cgroup and its namespace, as far as it is up to a node. The
    /// answer says whether the namespace is still there.
    pub fn let_go(self, network: &Network) -> impl Fn() -> bool {
        let (network, port) = (network.clone(), self.joined.port.clone());
        drop(self);
        move || network.has_port(&port)
    }

    /// Cuts its cable.
    pub fn cut(&self, network: &Network) {
        network.set_port(&self.joined.port, "down");
    }

    /// Mends its cable.
    pub fn mend(&self, network: &Network) {
        network.set_port(&self.joined.port, "up");
    }

    /// Captures what passes its port of the network.
    #[must_use]
    pub fn capture(&self, network: &Network) -> Capture {
        network.capture(&self.joined.port)
    }

    /// Who it is, as the daemon's configuration has it for workloads and for peers.
    pub(crate) fn attributes(&self) -> Value {
        json!({
            "name": self.name,
            "namespace": "default",
            "serviceAccount": self.name,
            "labels": {"app": self.name},
        })
    }
}

impl Deref for Workload {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}
