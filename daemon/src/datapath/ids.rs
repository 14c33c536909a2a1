//! Ids by which sockets and maps know workloads and peers.
//!
//! An id is given once in the life of the pinned maps: sockets, flows and waiting connections go on
//! bearing it when whom it was given to is gone, and must not come to be another's. The next id is in
//! `SETTINGS`, and who has which is in `IDS`, so that this holds across daemons.

use reeve_common::{NameDigest, Settings as KernelSettings, UNKNOWN_WORKLOAD};

use super::{Error, state::State};

impl State {
    /// The ids of these names: those that they have, or new ones. Names that are not among these are
    /// retired, and get another id when they return.
    ///
    /// # Errors
    ///
    /// [`Error::NoIds`] when every id has been given. Nothing is changed then.
    pub(super) fn ids(&mut self, names: &[NameDigest]) -> Result<Vec<u32>, Error> {
        let known = self.ids.content();
        let first = self.current.next_id;
        let mut next = first;
        let mut ids = Vec::with_capacity(names.len());
        for name in names {
            // Nobody has an id that was not given yet.
            let id = match known.get(name).filter(|id| **id < first) {
                Some(id) => *id,
                None if next < UNKNOWN_WORKLOAD => {
                    next += 1;
                    next - 1
                }
                None => return Err(Error::NoIds),
            };
            ids.push(id);
        }
        // Before anything bears them: after a crash they are not given again.
        if next != first {
            self.write(KernelSettings {
                next_id: next,
                ..self.current
            })?;
        }
        let declared = names.iter().copied().zip(ids.iter().copied()).collect();
        self.ids.prune(&declared)?;
        if let Err(error) = self.ids.put(&declared) {
            tracing::warn!(
                %error,
                "some workloads and peers get other ids from the next daemon: connections that \
                 wait then are refused"
            );
        }
        Ok(ids)
    }

    /// The ids that another daemon has given to these names; none for a name that has none.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub(super) fn ids_of_others(
        &mut self,
        names: &[NameDigest],
    ) -> Result<Vec<Option<u32>>, Error> {
        self.ids.reread()?;
        let known = self.ids.content();
        Ok(names.iter().map(|name| known.get(name).copied()).collect())
    }
}
