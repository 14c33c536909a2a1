//! Threads that read what others send, and can do little else.

use std::{io, sync::mpsc::sync_channel, thread};

use tokio::runtime::{Builder, Runtime};

use super::Confinement;

impl Confinement {
    /// Runs `work` on a thread of its own, which has only what [`Confinement::enter_exposed`] leaves
    /// it, and what `prepare` made there before. Returns when the work has begun.
    ///
    /// # Errors
    /// From `prepare`, when the thread cannot be made, or when it keeps what it must not have.
    pub fn start_exposed<T>(
        self,
        name: &str,
        prepare: impl FnOnce() -> io::Result<T> + Send + 'static,
        work: impl FnOnce(T) + Send + 'static,
    ) -> io::Result<()> {
        let (ready, started) = sync_channel(1);
        thread::Builder::new().name(name.into()).spawn(move || {
            let prepared = prepare().and_then(|prepared| {
                self.enter_exposed().map_err(io::Error::other)?;
                Ok(prepared)
            });
            // Nobody to tell means that starting was given up.
            match prepared {
                Ok(prepared) => {
                    let _ = ready.send(Ok(()));
                    work(prepared);
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        started.recv().map_err(io::Error::other)?
    }

    /// The same for work that waits for events: its thread has an event loop of its own.
    ///
    /// # Errors
    /// As [`Confinement::start_exposed`].
    pub fn serve_exposed<F: Future<Output = ()>>(
        self,
        name: &str,
        serve: impl FnOnce() -> F + Send + 'static,
    ) -> io::Result<()> {
        let event_loop = || Builder::new_current_thread().enable_all().build();
        self.start_exposed(name, event_loop, |event_loop: Runtime| {
            event_loop.block_on(async { serve().await });
        })
    }
}
