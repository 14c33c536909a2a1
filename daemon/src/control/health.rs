//! Whether the daemon still works: asked of the parts that do the work, and told to systemd's
//! watchdog and to `/healthz`. A timer that nothing can stop would say that all is well for ever.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};

use super::{daemon::Daemon, process, reconcile::describe};
use crate::telemetry::Health;

/// Between two looks, unless systemd asks for more of them.
const LOOK: Duration = Duration::from_secs(5);
/// Looks in the time after which systemd gives the daemon up: one may fail for no good reason.
const LOOKS: u32 = 4;
/// A look that found all well counts for so many of them.
const VALID: u32 = 3;

/// Asks the control loop whether it goes round.
pub(super) type Asked = mpsc::Receiver<oneshot::Sender<()>>;

/// What looks, from its making to its end.
#[derive(Debug)]
pub(super) struct HealthLook {
    task: JoinHandle<()>,
}

impl HealthLook {
    /// Looks again and again. The control loop answers what it is asked through [`Asked`]. Needs a
    /// tokio runtime.
    pub(super) fn start(daemon: Arc<Daemon>, health: watch::Sender<Health>) -> (Self, Asked) {
        let (control, asked) = mpsc::channel(1);
        let every = process::watchdog().map_or(LOOK, |patience| LOOK.min(patience / LOOKS));
        let task = tokio::spawn(async move {
            let mut was_well = true;
            loop {
                let problem = look(&daemon, &control, every).await.err();
                match &problem {
                    // systemd listens to another one.
                    None if !daemon.is_service.load(Ordering::Relaxed) => {}
                    None => process::notify_watchdog(),
                    Some(problem) => {
                        tracing::error!("the daemon is not well: {problem}");
                    }
                }
                if was_well != problem.is_none() {
                    was_well = problem.is_none();
                    if was_well {
                        tracing::info!("the daemon is well again");
                    }
                }
                health.send_replace(Health {
                    problem,
                    at: Instant::now(),
                    valid: every * 2 * VALID,
                });
                sleep(every).await;
            }
        });
        (Self { task }, asked)
    }
}

impl Drop for HealthLook {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Answers what is asked for as long as the future is polled.
pub(super) async fn answer(asked: &mut Asked) {
    while let Some(answer) = asked.recv().await {
        // Whoever asked may have given up.
        let _ = answer.send(());
    }
    std::future::pending().await
}

/// Asks everyone. The error says who does not answer.
async fn look(
    daemon: &Arc<Daemon>,
    control: &mpsc::Sender<oneshot::Sender<()>>,
    patience: Duration,
) -> Result<(), String> {
    let loop_turns = async {
        let (answer, answered) = oneshot::channel();
        control.send(answer).await.ok()?;
        answered.await.ok()
    };
    let kernel = daemon.clone();
    let kernel = spawn_blocking(move || {
        // Of a daemon that is leaving, the next one has taken over the kernel's side.
        let leaving = kernel.view.load().draining.is_some()
            || kernel.kernel_is_anothers.load(Ordering::Relaxed);
        if leaving {
            Ok(())
        } else {
            kernel.datapath.check()
        }
    });
    let (control, workers, kernel) = tokio::join!(
        timeout(patience, loop_turns),
        daemon.tunnels.silent(patience),
        timeout(patience, kernel),
    );
    if !matches!(control, Ok(Some(()))) {
        return Err("the control loop does not answer".to_owned());
    }
    if let Some(worker) = workers {
        return Err(format!("tunnel worker {worker} does not answer"));
    }
    match kernel {
        Ok(Ok(checked)) => checked.map_err(|error| describe(&error)),
        Ok(Err(error)) => Err(format!("looking at the kernel's side ended: {error}")),
        Err(_) => Err("the kernel does not answer".to_owned()),
    }
}
