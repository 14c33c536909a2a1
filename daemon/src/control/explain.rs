//! What the running daemon says of a connection, held against the kernel's maps.

use std::{net::IpAddr, time::Duration};

use reeve_common::{Direction, Reason, WorkloadId};

use super::{Daemon, reconcile::describe};
use crate::{
    answers::{self, Enquiry, Explanation, Kernel, LastFailure},
    datapath::Datapath,
    policy::Snapshot,
    telemetry::{Facts, Happening},
};

/// A change reaches the kernel a moment before the tunnels: for as long as this, a difference is
/// none.
const SETTLE: Duration = Duration::from_millis(200);
/// Looks at a difference before it is believed.
const LOOKS: usize = 4;

struct ReadBack<'a> {
    datapath: &'a Datapath,
    snapshot: &'a Snapshot,
}

impl Daemon {
    /// The answer to `reeve explain`.
    pub(super) async fn explain(&self, enquiry: &Enquiry) -> Result<Explanation, String> {
        let mut explanation = self.explain_now(enquiry)?;
        for _ in 1..LOOKS {
            if !explanation.disagrees() {
                break;
            }
            tokio::time::sleep(SETTLE).await;
            explanation = self.explain_now(enquiry)?;
        }
        explanation.last_failure = self.last_failure(&explanation);
        Ok(explanation)
    }

    /// How the newest attempt at such a connection ended, where that is known and it failed.
    fn last_failure(&self, explanation: &Explanation) -> Option<LastFailure> {
        // That the kernel lets a connection go on says nothing of what the tunnel makes of it.
        let newest = self.observers.newest(|happening| match happening {
            Happening::Opened(facts) | Happening::Refused(facts) => is_about(explanation, facts),
            Happening::Allowed(facts) => {
                facts.transport == "plaintext" && is_about(explanation, facts)
            }
            _ => false,
        })?;
        let Happening::Refused(facts) = &newest.happening else {
            return None;
        };
        let mut reasons = Reason::ALL.iter();
        let reason = reasons.find(|reason| reason.as_str() == facts.reason);
        Some(LastFailure {
            time: humantime::format_rfc3339_seconds(newest.time).to_string(),
            direction: facts.direction.clone().into_owned(),
            reason: facts.reason.clone().into_owned(),
            because: reason.map_or("", |reason| reason.describe()).to_owned(),
            error: facts.error.clone(),
        })
    }

    fn explain_now(&self, enquiry: &Enquiry) -> Result<Explanation, String> {
        let snapshot = self.snapshot.load();
        let kernel = ReadBack {
            datapath: &self.datapath,
            snapshot: &snapshot,
        };
        let ports = self.config.load().ports;
        answers::explain(&snapshot, ports, enquiry, Some(&kernel))
    }
}

impl Kernel for ReadBack<'_> {
    fn verdict(
        &self,
        workload: WorkloadId,
        direction: Direction,
        address: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Result<(u32, u32), String> {
        self.datapath
            .verdict(workload, direction, address, protocol, port)
            .map(|entry| (entry.action, entry.rule))
            .map_err(|error| describe(&error))
    }

    fn is_enrolled(&self, workload: WorkloadId) -> Result<bool, String> {
        let Some(running) = self.snapshot.workload(workload) else {
            return Ok(false);
        };
        for (cgroup, _) in &running.cgroups {
            let enrolled = self.datapath.enrolled(*cgroup);
            if enrolled.map_err(|error| describe(&error))? != Some(workload) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Whether an event is of such a connection as was asked about.
fn is_about(explanation: &Explanation, facts: &Facts) -> bool {
    let destination = facts.destination_address;
    let port = destination.map_or(0, |address| address.port());
    let mut halves = explanation.halves.iter();
    facts.protocol == explanation.protocol
        && port == explanation.port
        && halves.any(|half| {
            let (here, there, address) = match half.direction.as_str() {
                "egress" => (&facts.source, &facts.destination, destination),
                _ => (&facts.destination, &facts.source, facts.source_address),
            };
            let same_address = address.map(|address| address.ip()) == half.address;
            half.direction == facts.direction
                && *here == half.workload
                && (*there == half.far_end || same_address)
        })
}
