//! Sets of selectors, each kept once.

use std::{collections::HashMap, sync::Arc};

/// Number of a selector: its place in the compiler's list.
pub(super) type SelectorId = u32;

/// A set of selectors. Equal numbers are equal sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SetId(u32);

/// All sets; the first is the empty one.
#[derive(Clone, Debug)]
pub(super) struct Sets {
    sets: Vec<Arc<[SelectorId]>>,
    ids: HashMap<Arc<[SelectorId]>, SetId>,
}

// === impl SetId ===

impl SetId {
    /// The empty set.
    pub(super) const EMPTY: Self = Self(0);
}

// === impl Sets ===

impl Default for Sets {
    fn default() -> Self {
        let empty: Arc<[SelectorId]> = Arc::new([]);
        Self {
            sets: vec![Arc::clone(&empty)],
            ids: HashMap::from([(empty, SetId::EMPTY)]),
        }
    }
}

impl Sets {
    pub(super) fn intern(&mut self, selectors: impl IntoIterator<Item = SelectorId>) -> SetId {
        let mut selectors: Vec<_> = selectors.into_iter().collect();
        selectors.sort_unstable();
        selectors.dedup();
        if let Some(id) = self.ids.get(selectors.as_slice()) {
            return *id;
        }
        // A set is at least one selector, and those are bounded by the files' sizes.
        let id = SetId(u32::try_from(self.sets.len()).unwrap_or(u32::MAX));
        let set: Arc<[SelectorId]> = selectors.into();
        self.sets.push(Arc::clone(&set));
        self.ids.insert(set, id);
        id
    }

    /// The selectors of a set, sorted.
    pub(super) fn get(&self, id: SetId) -> &[SelectorId] {
        self.sets.get(id.0 as usize).map_or(&[], |set| set)
    }
}
