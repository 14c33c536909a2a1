//! One map, and what is known to be in it: brought to a desired content by its differences.

use std::{collections::HashMap, hash::Hash, io};

use aya::{
    Pod,
    maps::{self, MapData, MapError, lpm_trie},
    sys::SyscallError,
};

use super::{Error, load::map_error};

/// A map that can be written and read as a whole.
pub(super) trait Table {
    /// What an entry is found by.
    type Key: Eq + Hash + Copy;
    /// What it holds.
    type Value: Eq + Copy;

    fn insert(&mut self, key: &Self::Key, value: &Self::Value) -> Result<(), MapError>;
    fn remove(&mut self, key: &Self::Key) -> Result<(), MapError>;
    fn entries(&self) -> Result<HashMap<Self::Key, Self::Value>, MapError>;
}

impl<K: Pod + Eq + Hash, V: Pod + Eq> Table for maps::HashMap<MapData, K, V> {
    type Key = K;
    type Value = V;

    fn insert(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        maps::HashMap::insert(self, key, value, 0)
    }

    fn remove(&mut self, key: &K) -> Result<(), MapError> {
        maps::HashMap::remove(self, key)
    }

    fn entries(&self) -> Result<HashMap<K, V>, MapError> {
        self.iter().collect()
    }
}

impl<K: Pod + Eq + Hash, V: Pod + Eq> Table for maps::LpmTrie<MapData, K, V> {
    /// Bits of the prefix, and the key that it is the beginning of.
    type Key = (u32, K);
    type Value = V;

    fn insert(&mut self, &(bits, key): &(u32, K), value: &V) -> Result<(), MapError> {
        maps::LpmTrie::insert(self, &lpm_trie::Key::new(bits, key), value, 0)
    }

    fn remove(&mut self, &(bits, key): &(u32, K)) -> Result<(), MapError> {
        maps::LpmTrie::remove(self, &lpm_trie::Key::new(bits, key))
    }

    fn entries(&self) -> Result<HashMap<(u32, K), V>, MapError> {
        self.iter()
            .map(|entry| entry.map(|(key, value)| ((key.prefix_len(), key.data()), value)))
            .collect()
    }
}

/// A map with its name, its capacity and its content.
pub(super) struct Tracked<T: Table> {
    name: &'static str,
    capacity: u32,
    table: T,
    content: HashMap<T::Key, T::Value>,
}

impl<T: Table> Tracked<T> {
    /// Reads what is in the map already.
    pub(super) fn adopt(name: &'static str, capacity: u32, table: T) -> Result<Self, Error> {
        let content = table
            .entries()
            .map_err(|source| map_error(name, "read", source))?;
        Ok(Self {
            name,
            capacity,
            table,
            content,
        })
    }

    /// Reads again what is in the map, where somebody else has written to it.
    pub(super) fn reread(&mut self) -> Result<(), Error> {
        self.content = self
            .table
            .entries()
            .map_err(|source| map_error(self.name, "read", source))?;
        Ok(())
    }

    /// The map itself, to see what is really in it.
    pub(super) fn table(&self) -> &T {
        &self.table
    }

    /// Name of the map.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Entries that the map has room for.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// What is in the map.
    pub(super) fn content(&self) -> &HashMap<T::Key, T::Value> {
        &self.content
    }

    /// Adds and changes entries, in the order given. True where anything was different. Ends at
    /// the first entry that the map does not take.
    pub(super) fn put<'a>(
        &mut self,
        entries: impl IntoIterator<Item = (&'a T::Key, &'a T::Value)>,
    ) -> Result<bool, Error>
    where
        T::Key: 'a,
        T::Value: 'a,
    {
        let mut changed = false;
        for (key, value) in entries {
            if self.content.get(key) == Some(value) {
                continue;
            }
            self.table
                .insert(key, value)
                .map_err(|source| self.insert_error(source))?;
            self.content.insert(*key, *value);
            changed = true;
        }
        Ok(changed)
    }

    /// The entries that are not in the map as they are in `desired`.
    pub(super) fn different<'a>(
        &self,
        desired: &'a HashMap<T::Key, T::Value>,
    ) -> impl Iterator<Item = (&'a T::Key, &'a T::Value)> {
        let content = &self.content;
        desired
            .iter()
            .filter(move |(key, value)| content.get(key) != Some(value))
    }

    /// Whether the map holds everything that is in `desired`.
    pub(super) fn holds(&self, desired: &HashMap<T::Key, T::Value>) -> bool {
        self.different(desired).next().is_none()
    }

    /// The entries that are in the map and not in `desired`.
    pub(super) fn surplus(&self, desired: &HashMap<T::Key, T::Value>) -> Vec<T::Key> {
        let keys = self.content.keys();
        keys.filter(|key| !desired.contains_key(key))
            .copied()
            .collect()
    }

    /// Removes the entries that are not in `desired`. True where there were any.
    pub(super) fn prune(&mut self, desired: &HashMap<T::Key, T::Value>) -> Result<bool, Error> {
        let surplus = self.surplus(desired);
        self.remove(&surplus)
    }

    /// Removes entries, in the order given. True where there were any.
    pub(super) fn remove(&mut self, surplus: &[T::Key]) -> Result<bool, Error> {
        for key in surplus {
            match self.table.remove(key) {
                // Somebody else removed it: that is what was wanted.
                Err(error) if !is_missing(&error) => {
                    return Err(map_error(self.name, "remove an entry of", error));
                }
                _ => {
                    self.content.remove(key);
                }
            }
        }
        Ok(!surplus.is_empty())
    }

    fn insert_error(&self, source: MapError) -> Error {
        // A hash says E2BIG, a trie ENOSPC, and either ENOMEM where the kernel itself has no room.
        let full = io_error(&source)
            .and_then(io::Error::raw_os_error)
            .is_some_and(|code| [libc::E2BIG, libc::ENOSPC, libc::ENOMEM].contains(&code));
        if full {
            Error::Full {
                map: self.name,
                capacity: self.capacity,
            }
        } else {
            map_error(self.name, "write", source)
        }
    }
}

fn io_error(error: &MapError) -> Option<&io::Error> {
    match error {
        MapError::SyscallError(SyscallError { io_error, .. }) => Some(io_error),
        _ => None,
    }
}

fn is_missing(error: &MapError) -> bool {
    matches!(error, MapError::KeyNotFound)
        || io_error(error).is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}
