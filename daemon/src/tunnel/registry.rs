//! What a worker has open: values that can be walked through while they live.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    ops::Deref,
    rc::Rc,
};

/// Values of one worker. An entry lives as long as its [`Registered`].
#[derive(Debug)]
pub(super) struct Registry<T> {
    next: Cell<u64>,
    values: RefCell<HashMap<u64, Rc<T>>>,
}

/// A value that is in a [`Registry`] until this is dropped.
#[derive(Debug)]
pub(super) struct Registered<T> {
    registry: Rc<Registry<T>>,
    key: u64,
    value: Rc<T>,
}

// === impl Registry ===

impl<T> Registry<T> {
    pub(super) fn new() -> Rc<Self> {
        Rc::new(Self {
            next: Cell::new(0),
            values: RefCell::new(HashMap::new()),
        })
    }

    /// Adds a value.
    pub(super) fn insert(self: &Rc<Self>, value: T) -> Registered<T> {
        let (key, value) = (self.next.get(), Rc::new(value));
        self.next.set(key + 1);
        self.values.borrow_mut().insert(key, value.clone());
        Registered {
            registry: self.clone(),
            key,
            value,
        }
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.values.borrow().len()
    }

    /// Runs `visit` for every value. It must not add values to or drop values from this registry;
    /// telling a value to end does neither, since its own task takes note only later.
    pub(super) fn for_each(&self, mut visit: impl FnMut(&Rc<T>)) {
        self.values.borrow().values().for_each(&mut visit);
    }
}

// === impl Registered ===

impl<T> Registered<T> {
    /// The value itself.
    pub(super) fn value(&self) -> &Rc<T> {
        &self.value
    }
}

impl<T> Deref for Registered<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for Registered<T> {
    fn drop(&mut self) {
        self.registry.values.borrow_mut().remove(&self.key);
    }
}
