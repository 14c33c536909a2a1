//! What the programs tell: verdicts and ends of connections, and their debug log.

use std::time::Duration;

use aya::{
    Ebpf,
    maps::{MapData, RingBuf},
};
use aya_log::EbpfLogger;
use reeve_common::Event;
use tokio::io::unix::AsyncFd;

use super::Error;

/// Events in one batch at most, so that one reader does not keep its thread to itself.
const BATCH: usize = 1024;

/// How long events are left to gather. While some lie there, the kernel wakes nobody for the
/// next; at a thousand connections in a second, that spares both sides most of the work.
const GATHER: Duration = Duration::from_millis(10);

/// The one reader of the programs' events.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Events {
    pub(super) fn new(ring: RingBuf<MapData>) -> Result<Self, Error> {
        // SAFETY: the ring buffer owns its map's file descriptor, and never changes or closes it.
        let ring = unsafe { AsyncFd::register(ring) };
        Ok(Self {
            ring: ring.map_err(|error| wait("events")(error.into()))?,
        })
    }

    /// Waits for events and moves those that are there a moment later into `batch`, which is
    /// emptied first.
    /// What nobody reads in time is lost and counted, see [`super::Counters::lost_events`].
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// When the runtime can no longer poll: there will be no more events.
    pub async fn next(&mut self, batch: &mut Vec<Event>) -> Result<(), Error> {
        batch.clear();
        while batch.is_empty() {
            let mut ready = self.ring.readable_mut().await.map_err(wait("events"))?;
            tokio::time::sleep(GATHER).await;
            let ring = ready.get_inner_mut();
            while batch.len() < BATCH
                && let Some(record) = ring.next()
            {
                batch.extend(decode(&record));
            }
            if batch.len() < BATCH {
                ready.clear_ready();
            }
        }
        Ok(())
    }
}

fn decode(record: &[u8]) -> Option<Event> {
    let bytes = record.get(..size_of::<Event>())?;
    // SAFETY: as long as an `Event`, of which any bytes are a value (it is `Pod`).
    Some(unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}

/// Passes the programs' debug lines on to the daemon's log, for as long as it is polled.
pub(super) fn forward_log(
    ebpf: &mut Ebpf,
) -> Result<impl Future<Output = ()> + Send + use<>, Error> {
    let log = EbpfLogger::init(ebpf).map_err(|_| Error::Taken("log lines"))?;
    // SAFETY: as above.
    let log = unsafe { AsyncFd::register(log) };
    let mut log = log.map_err(|error| wait("log lines")(error.into()))?;
    Ok(async move {
        while let Ok(mut ready) = log.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    })
}

fn wait(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Wait { what, source }
}
