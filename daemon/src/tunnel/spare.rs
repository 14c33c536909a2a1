//! Buffers that a thread's tunnels need now and then, lent to one after the other.

use std::{cell::RefCell, mem, thread::LocalKey};

/// Buffers kept by a thread for the next tunnel that needs one.
const KEPT: usize = 4;

/// Buffers that no tunnel of the thread needs now.
pub(super) struct Spare<T>(RefCell<Vec<T>>);

impl<T> Spare<T> {
    pub(super) const fn new() -> Self {
        Self(RefCell::new(Vec::new()))
    }
}

/// Lending what a thread has to spare.
pub(super) trait Lend<T> {
    /// A spare buffer, or one that `make` makes.
    fn lend(&'static self, make: impl FnOnce() -> T) -> T;
    /// Takes `buffer` back for the next user and leaves nothing in its place.
    fn give_back(&'static self, buffer: &mut T);
}

impl<T: Default> Lend<T> for LocalKey<Spare<T>> {
    fn lend(&'static self, make: impl FnOnce() -> T) -> T {
        self.with(|spare| spare.0.borrow_mut().pop())
            .unwrap_or_else(make)
    }

    fn give_back(&'static self, buffer: &mut T) {
        let buffer = mem::take(buffer);
        self.with(|spare| {
            let mut kept = spare.0.borrow_mut();
            if kept.len() < KEPT {
                kept.push(buffer);
            }
        });
    }
}
