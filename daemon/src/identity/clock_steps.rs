//! Steps of the wall clock: set by hand or by NTP, or after the machine was suspended. Timers run on and
//! do not notice, while certificates expire, or are not valid yet, all at once.

use std::{io, os::fd::OwnedFd, time::Duration};

use nix::{
    errno::Errno,
    sys::{
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    unistd::read,
};
use tokio::io::{Interest, unix::AsyncFd};

/// When the timer that is cancelled by a step would go off: some two centuries after this was written.
const NEVER: Duration = Duration::from_secs(8_000_000_000);

/// Calls `stepped` after each step, for as long as the future is polled.
///
/// # Errors
/// When the kernel has no such timer.
pub(super) async fn follow(mut stepped: impl FnMut()) -> io::Result<()> {
    // SAFETY: the descriptor is owned by the `AsyncFd`, which alone closes it.
    let timer = unsafe { AsyncFd::register_with_interest(timer()?, Interest::READABLE)? };
    loop {
        let mut ready = timer.readable().await?;
        // The timer stays set, and so the next step is told as well.
        match read(timer.get_ref(), &mut [0; size_of::<u64>()]) {
            Err(Errno::ECANCELED) => stepped(),
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(Errno::EINTR) | Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn timer() -> io::Result<OwnedFd> {
    let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, flags)?;
    timer.set(
        Expiration::OneShot(TimeSpec::from_duration(NEVER)),
        TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET,
    )?;
    Ok(timer.into())
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, time::Duration};

    use nix::time::{ClockId, clock_gettime, clock_settime};
    use tokio::time::{sleep, timeout};

    use super::*;

    /// Sets the clock to what it says: a step of less than a microsecond.
    fn step() {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap();
        clock_settime(ClockId::CLOCK_REALTIME, now).unwrap();
    }

    #[tokio::test]
    async fn each_step_of_the_clock_is_told_at_once() {
        let steps = Cell::new(0);
        let following = follow(|| steps.set(steps.get() + 1));
        let test = async {
            sleep(Duration::from_millis(100)).await;
            let before = steps.get();
            for number in 1..=3 {
                step();
                let told = async {
                    while steps.get() < before + number {
                        sleep(Duration::from_millis(1)).await;
                    }
                };
                timeout(Duration::from_secs(1), told)
                    .await
                    .expect("not told");
            }
        };
        tokio::select! {
            result = following => panic!("{result:?}"),
            () = test => {}
        }
    }
}
