//! How much of the maps is used, and what the programs counted.

use aya::maps::{self, Map, MapData, MapError, PerCpuArray};
use reeve_common::{
    COUNTER_LOST_EVENTS, COUNTER_REASONS, COUNTER_SLOTS, Direction, Reason, counter_slot,
    dry_run_slot,
};

use super::{Error, load::map_error};

/// Entries and capacity of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapUsage {
    /// Name of the map.
    pub name: &'static str,
    /// Entries in it.
    pub entries: u64,
    /// Entries that it has room for. Those that hold connections push the oldest out instead of
    /// being full.
    pub capacity: u64,
    /// Entries that it has no room for: whatever they could be about is refused.
    pub missing: u64,
}

/// What the programs have counted since the maps were made, which outlives the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    slots: Vec<u64>,
}

impl Counters {
    /// Verdicts of one kind.
    #[must_use]
    pub fn verdicts(&self, direction: Direction, allowed: bool, reason: Reason) -> u64 {
        self.slot(counter_slot(direction as u8, allowed, reason))
    }

    /// Every kind of verdict, those that never happened included.
    pub fn iter(&self) -> impl Iterator<Item = (Direction, bool, Reason, u64)> + '_ {
        [Direction::Egress, Direction::Ingress]
            .into_iter()
            .flat_map(|direction| [(direction, false), (direction, true)])
            .flat_map(|(direction, allowed)| {
                Reason::ALL
                    .iter()
                    .map(move |reason| (direction, allowed, *reason))
            })
            .filter(|(_, _, reason)| (*reason as u32) < COUNTER_REASONS)
            .map(|(direction, allowed, reason)| {
                let count = self.verdicts(direction, allowed, reason);
                (direction, allowed, reason, count)
            })
    }

    /// Verdicts that policies in dry run would change: to allow, or to deny.
    #[must_use]
    pub fn dry_runs(&self, direction: Direction, would_allow: bool) -> u64 {
        self.slot(dry_run_slot(direction as u8, would_allow))
    }

    /// Events that found the ring buffer full.
    #[must_use]
    pub fn lost_events(&self) -> u64 {
        self.slot(COUNTER_LOST_EVENTS)
    }

    fn slot(&self, slot: u32) -> u64 {
        self.slots.get(slot as usize).copied().unwrap_or(0)
    }
}

/// Sums what each processor counted.
pub(super) fn counters(map: &PerCpuArray<MapData, u64>) -> Result<Counters, Error> {
    let slots = (0..COUNTER_SLOTS)
        .map(|slot| map.get(&slot, 0).map(|values| values.iter().sum()))
        .collect::<Result<_, _>>()
        .map_err(|source| map_error("COUNTERS", "read", source))?;
    Ok(Counters { slots })
}

/// The one counter of events that were lost.
pub(super) fn lost_events(map: &PerCpuArray<MapData, u64>) -> Result<u64, Error> {
    let values = map
        .get(&COUNTER_LOST_EVENTS, 0)
        .map_err(|source| map_error("COUNTERS", "read", source))?;
    Ok(values.iter().sum())
}

/// Entries that a map has room for.
pub(super) fn capacity(map: &Map) -> Result<u32, MapError> {
    let data = match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data) => data,
        _ => return Ok(0),
    };
    data.info().map(|info| info.max_entries())
}

/// Counts the entries of a map that only the programs fill.
pub(super) fn count<K: aya::Pod, V: aya::Pod>(
    name: &'static str,
    capacity: u32,
    map: &maps::HashMap<MapData, K, V>,
) -> MapUsage {
    MapUsage {
        name,
        // One that is removed meanwhile may end the walk early: an estimate is enough.
        entries: map.keys().take_while(Result::is_ok).count() as u64,
        capacity: u64::from(capacity),
        missing: 0,
    }
}
