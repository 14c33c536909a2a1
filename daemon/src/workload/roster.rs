//! Whom policies can select, and who says so.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

use super::{Namespaces, Peer, Workload};

/// Pods and namespaces as policies select them, at one moment. Replaced as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roster {
    /// The workloads of this node, in the order of their declaration.
    pub workloads: Vec<Arc<Workload>>,
    /// Those who are elsewhere.
    pub peers: Vec<Arc<Peer>>,
    /// Labels of the namespaces.
    pub namespaces: Namespaces,
}

/// Where pods and namespaces come from: the configuration, or whatever else keeps a list of them.
///
/// What a source tells is whole and checked: names are unique, and so are the numbers of workloads
/// and peers, which stay with the names that they were given to.
pub trait RosterSource: fmt::Debug + Send + Sync {
    /// The newest, and word of each that is different. Who has not looked for a while gets the
    /// newest alone. The channel closes when there will be no other.
    fn rosters(&self) -> watch::Receiver<Arc<Roster>>;
}
