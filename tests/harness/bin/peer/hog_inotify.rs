//! `peer hog-inotify`: every inotify instance that this user may have.

use std::thread;

use anyhow::Result;
use nix::sys::inotify::{InitFlags, Inotify};

pub(crate) fn run() -> Result<()> {
    let mut held = Vec::new();
    let refused = loop {
        match Inotify::init(InitFlags::empty()) {
            Ok(instance) => held.push(instance),
            Err(error) => break error,
        }
    };
    println!("holding {} instances: {refused}", held.len());
    loop {
        thread::park();
    }
}
