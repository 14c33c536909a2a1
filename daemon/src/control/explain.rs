//! What the running daemon says of a connection, held against the kernel's maps.

use std::{net::IpAddr, time::Duration};

use reeve_common::{Direction, WorkloadId};

use super::{Daemon, reconcile::describe};
use crate::{
    answers::{self, Enquiry, Explanation, Kernel},
    datapath::Datapath,
    policy::Snapshot,
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
        Ok(explanation)
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
