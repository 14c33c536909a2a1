//! Sources that cannot be reached, so that the log has it once for each source and not for each attempt
//! of each identity.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::identity::SpiffeId;

/// What is so still is said again so long after.
pub(super) const SAY_AGAIN: Duration = Duration::from_secs(3600);
/// So many different reasons of one outage are said.
const MOST_REASONS: usize = 8;

/// Outages by the source's name.
#[derive(Debug, Default)]
pub(super) struct Outages(BTreeMap<String, Outage>);

#[derive(Debug)]
struct Outage {
    since: Instant,
    /// Those whose last attempt failed.
    identities: BTreeSet<SpiffeId>,
    /// Reasons, and when each was last said. Identities see different ones at the same time.
    said: BTreeMap<String, Instant>,
}

// === impl Outages ===

impl Outages {
    /// An identity's attempt did not reach its source. Returns whether to say so.
    pub(super) fn failed(&mut self, source: &str, id: &SpiffeId, why: &str, now: Instant) -> bool {
        let outage = self
            .0
            .entry(source.to_owned())
            .or_insert_with(|| Outage::new(now));
        outage.identities.insert(id.clone());
        let is_new = match outage.said.get(why) {
            Some(last) => now.duration_since(*last) >= SAY_AGAIN,
            None => outage.said.len() < MOST_REASONS,
        };
        if is_new {
            outage.said.insert(why.to_owned(), now);
        }
        is_new
    }

    /// An identity's attempt reached its source. Returns how long that had lasted when it is over: when
    /// it is so for none of the identities that there are.
    pub(super) fn reached(
        &mut self,
        source: &str,
        id: &SpiffeId,
        is_there: impl Fn(&SpiffeId) -> bool,
        now: Instant,
    ) -> Option<Duration> {
        let outage = self.0.get_mut(source)?;
        outage
            .identities
            .retain(|other| other != id && is_there(other));
        if !outage.identities.is_empty() {
            return None;
        }
        let outage = self.0.remove(source)?;
        Some(now.duration_since(outage.since))
    }
}

impl Outage {
    fn new(since: Instant) -> Self {
        Self {
            since,
            identities: BTreeSet::new(),
            said: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap()
    }

    #[test]
    fn an_outage_is_said_once_for_all_identities_and_again_when_it_changes_or_lasts() {
        let (mut outages, start) = (Outages::default(), Instant::now());
        let ids = [id("a"), id("b"), id("c")];
        let second = |n: u64| start + Duration::from_secs(n);
        assert!(outages.failed("agent", &ids[0], "no socket", start));
        for n in 0..100 {
            for id in &ids {
                assert!(!outages.failed("agent", id, "no socket", second(n)));
            }
        }
        assert!(outages.failed("agent", &ids[1], "nobody listens", second(1)));
        // No to and fro where identities see different reasons.
        assert!(!outages.failed("agent", &ids[2], "no socket", second(2)));
        assert!(outages.failed("agent", &ids[2], "no socket", start + SAY_AGAIN));
        assert!(outages.failed("other", &ids[2], "no socket", start));
    }

    #[test]
    fn it_is_over_once_when_all_identities_that_are_left_have_an_answer() {
        let (mut outages, start) = (Outages::default(), Instant::now());
        let ids = [id("a"), id("b"), id("c")];
        let end = start + Duration::from_secs(9);
        for id in &ids {
            outages.failed("agent", id, "no socket", start);
        }
        let mut reached = |id, is_there: bool| outages.reached("agent", id, |_| is_there, end);
        assert_eq!(reached(&ids[0], true), None);
        assert_eq!(reached(&ids[0], true), None);
        // The third is gone.
        assert_eq!(reached(&ids[1], false), Some(Duration::from_secs(9)));
        assert_eq!(reached(&ids[1], true), None);
        assert!(outages.failed("agent", &ids[0], "no socket", end));
    }

    #[test]
    fn the_reasons_of_one_outage_are_bounded() {
        let (mut outages, now) = (Outages::default(), Instant::now());
        let said = (0..100).filter(|n| outages.failed("agent", &id("a"), &n.to_string(), now));
        assert_eq!(said.count(), MOST_REASONS);
    }
}
