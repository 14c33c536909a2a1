//! What there is to say of a workload that keeps nothing from working: that it is not there, or what it
//! says of itself and is not believed.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use super::claims::MAX_ADDRESSES;
use crate::workload::CgroupSelector;

/// Between two lines in the log that say the same of the same workload: it may do so on purpose.
const LOG_AGAIN: Duration = Duration::from_secs(600);

/// By the names of workloads. At most one of each kind for a workload.
pub type Remarks = Arc<ArcSwap<BTreeMap<String, Vec<Remark>>>>;

/// What there is to say of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remark {
    /// It has had no cgroup for a while.
    Absent(CgroupSelector),
    /// Processes of it are in network namespaces that it made in a user namespace of its own.
    OwnNamespace,
    /// Its namespace has an address that is somebody else's.
    AddressTaken {
        /// The first of them.
        ip: IpAddr,
        /// Whose it is.
        owner: String,
        /// How many more.
        more: usize,
    },
    /// Its namespace has an address on its loopback device.
    LoopbackAddress {
        /// The first of them.
        ip: IpAddr,
        /// How many more.
        more: usize,
    },
    /// Its namespace has more addresses than are believed.
    TooManyAddresses {
        /// How many of those that were looked at.
        left_out: usize,
    },
}

// === impl Remark ===

impl Remark {
    /// Names of all, as in the metric.
    pub const NAMES: [&'static str; 5] = [
        "absent",
        "own_namespace",
        "address_taken",
        "loopback_address",
        "too_many_addresses",
    ];

    /// Its name in the metric.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Absent(_) => "absent",
            Self::OwnNamespace => "own_namespace",
            Self::AddressTaken { .. } => "address_taken",
            Self::LoopbackAddress { .. } => "loopback_address",
            Self::TooManyAddresses { .. } => "too_many_addresses",
        }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let and_more = |more: &usize| match more {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        match self {
            Self::Absent(selector) => {
                match selector {
                    CgroupSelector::Unit(unit) => write!(f, "no unit {unit} runs")?,
                    CgroupSelector::Cgroup(path) => write!(f, "there is no cgroup {path}")?,
                }
                f.write_str(
                    ": nothing is enforced for it until there is one, unless it lies below an enforced \
                     parent; if it should run, is the name right?",
                )
            }
            Self::OwnNamespace => f.write_str(
                "processes of it are in a network namespace that it made itself; that namespace and \
                 its addresses are not taken for the workload's",
            ),
            Self::AddressTaken { ip, owner, more } => write!(
                f,
                "its network namespace has the address {ip}, which is that of {owner}{}; it is not \
                 taken for the workload's",
                and_more(more)
            ),
            Self::LoopbackAddress { ip, more } => write!(
                f,
                "its network namespace has the address {ip} on the loopback device{}; it is not taken \
                 for the workload's unless its `addresses` say so",
                and_more(more)
            ),
            Self::TooManyAddresses { left_out } => write!(
                f,
                "its network namespace has {left_out} addresses or more beyond the {MAX_ADDRESSES} that \
                 are taken for a workload's"
            ),
        }
    }
}

/// Tells each remark once.
#[derive(Debug, Default)]
pub(super) struct Told {
    at: HashMap<(String, &'static str), Instant>,
}

impl Told {
    /// Logs what was not logged for a while.
    pub(super) fn tell(&mut self, remarks: &BTreeMap<String, Vec<Remark>>, now: Instant) {
        self.at
            .retain(|_, at| now.saturating_duration_since(*at) < LOG_AGAIN);
        for (workload, remarks) in remarks {
            for remark in remarks {
                self.at
                    .entry((workload.clone(), remark.name()))
                    .or_insert_with(|| {
                        tracing::warn!(
                            workload,
                            remark = remark.name(),
                            "workload {workload}: {remark}"
                        );
                        now
                    });
            }
        }
    }
}
