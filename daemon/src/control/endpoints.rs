//! Where others ask: the metrics endpoint and the admin socket.
//!
//! Any process may take a port above 1023, also while reeve is restarted. So a metrics endpoint whose
//! address is taken, or not there yet, keeps the daemon from being ready and from nothing else: it is
//! tried again until it is there.

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Daemon, RunError,
    port_holder::{self, Holder, Search},
};
use crate::{
    admin::{AdminServing, AdminSocket},
    config::Config,
    handover::Inherited,
    telemetry::{HttpServer, HttpServing, Metrics, Told},
};

/// Between two attempts to listen at the metrics endpoint's address.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// Between two searches for who has that address, which read all of `/proc`.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Both, bound, and served once it is said who answers.
#[derive(Debug)]
pub struct Endpoints {
    http: Option<(SocketAddr, HttpServer)>,
    /// The metrics endpoint, while its address cannot be listened on.
    waiting: Option<Waiting>,
    admin: Option<AdminSocket>,
    /// The same sockets, for a daemon that takes over.
    shared: Vec<OwnedFd>,
    http_serving: Option<HttpServing>,
    admin_serving: Option<AdminServing>,
}

/// A metrics endpoint whose address is taken, or not there yet.
#[derive(Debug)]
struct Waiting {
    address: SocketAddr,
    metrics: Metrics,
    told: Told,
    /// When to try again.
    next: Instant,
    /// When to search again for who has the address.
    next_search: Instant,
    search: Option<Search>,
    holder: Option<Holder>,
    /// Why it cannot be listened on, in a sentence for readiness.
    why: Arc<String>,
}

// === impl Endpoints ===

impl Endpoints {
    /// Binds them, or takes over those of the daemon before. Called in the runtime in which
    /// metrics are to be gathered, and commands to be answered. A metrics endpoint whose address
    /// another process has is [tried again](Self::try_again).
    ///
    /// # Errors
    /// When another daemon has them, or from the kernel.
    pub fn bind(
        config: &Config,
        inherited: &mut Inherited,
        metrics: Metrics,
        told: Told,
    ) -> Result<Self, RunError> {
        // By the admin socket a second daemon is told first.
        let path = &config.admin.socket;
        let admin = match inherited.admin.take() {
            Some(listener) => AdminSocket::adopt(listener, path)?,
            None => AdminSocket::bind(path)?,
        };
        let mut endpoints = Self {
            http: None,
            waiting: None,
            shared: vec![admin.share()?],
            admin: Some(admin),
            http_serving: None,
            admin_serving: None,
        };
        let Some(address) = config.metrics.address else {
            return Ok(endpoints);
        };
        let bound = match inherited.metrics.take() {
            Some(listener) => HttpServer::adopt(listener, metrics.clone(), told.clone()),
            None => HttpServer::bind(address, metrics.clone(), told.clone()),
        };
        match bound {
            Ok(http) => endpoints.keep(address, http),
            Err(source) if passes(&source) => {
                if let Some(process) = port_holder::other_reeve(address) {
                    return Err(RunError::OtherReeve { address, process });
                }
                let why = Arc::new(explain(address, &source, None));
                tracing::error!("{why}");
                let now = Instant::now();
                endpoints.waiting = Some(Waiting {
                    address,
                    metrics,
                    told,
                    next: now + TRY_AGAIN,
                    next_search: now + LOOK_AGAIN,
                    search: Some(Search::start(address)),
                    holder: None,
                    why,
                });
            }
            Err(source) => return Err(RunError::Http { address, source }),
        }
        Ok(endpoints)
    }

    fn keep(&mut self, address: SocketAddr, http: HttpServer) {
        self.shared.extend(http.share());
        self.http = Some((address, http));
    }

    /// Begins to answer.
    ///
    /// # Errors
    /// When one of them cannot be served.
    pub fn serve(&mut self, daemon: &Arc<Daemon>) -> Result<(), RunError> {
        self.serve_http(daemon)?;
        let confinement = daemon.config.load().sandbox;
        if let Some(admin) = self.admin.take() {
            self.admin_serving = Some(admin.start(daemon.clone(), confinement)?);
        }
        Ok(())
    }

    fn serve_http(&mut self, daemon: &Daemon) -> Result<(), RunError> {
        if let Some((address, http)) = self.http.take() {
            let serving = http.start(daemon.config.load().sandbox);
            let serving = serving.map_err(|source| RunError::Http { address, source })?;
            self.http_serving = Some(serving);
        }
        Ok(())
    }

    /// When to [try again](Self::try_again), where the metrics endpoint's address cannot be listened on.
    pub(super) fn tries_at(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|waiting| waiting.next)
    }

    /// Why the metrics endpoint does not answer.
    pub(super) fn missing(&self) -> Option<Arc<String>> {
        self.waiting.as_ref().map(|waiting| waiting.why.clone())
    }

    /// Tries again to listen at the metrics endpoint's address, and answers there where the admin
    /// socket is answered already. Called in the runtime in which metrics are to be gathered. Blocks.
    ///
    /// # Errors
    /// When it listens and cannot be served.
    pub(super) fn try_again(&mut self, daemon: &Daemon) -> Result<(), RunError> {
        let Some(mut waiting) = self.waiting.take() else {
            return Ok(());
        };
        let (address, now) = (waiting.address, Instant::now());
        match HttpServer::bind(address, waiting.metrics.clone(), waiting.told.clone()) {
            Ok(http) => {
                tracing::info!(%address, "`metrics.address` is listened on now");
                self.keep(address, http);
                if self.admin_serving.is_some() {
                    self.serve_http(daemon)?;
                }
            }
            Err(error) => {
                waiting.next = now + TRY_AGAIN;
                if let Some(Ok(found)) = waiting.search.as_ref().map(Search::result) {
                    waiting.search = None;
                    waiting.holder = found;
                }
                if waiting.search.is_none() && now >= waiting.next_search {
                    waiting.next_search = now + LOOK_AGAIN;
                    waiting.search = Some(Search::start(address));
                }
                let why = explain(address, &error, waiting.holder.as_ref());
                if *waiting.why != why {
                    tracing::error!("{why}");
                    waiting.why = Arc::new(why);
                }
                self.waiting = Some(waiting);
            }
        }
        Ok(())
    }

    /// The sockets.
    pub(super) fn sockets(&self) -> Vec<OwnedFd> {
        self.shared
            .iter()
            .filter_map(|socket| socket.try_clone().ok())
            .collect()
    }

    /// Leaves them to the daemon that has taken over.
    pub(super) fn leave(&mut self) {
        self.waiting = None;
        self.http_serving = None;
        if let Some(serving) = self.admin_serving.take() {
            serving.leave();
        }
        self.shared.clear();
    }
}

/// Whether an address may be listened on later, for nothing but what others do: another process has
/// it, or no device has it yet. Whatever else the kernel says is about the configuration or the
/// daemon's rights, and is as it is until somebody changes these.
fn passes(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
    )
}

fn explain(address: SocketAddr, error: &io::Error, holder: Option<&Holder>) -> String {
    let advice = match (error.kind(), holder) {
        (io::ErrorKind::AddrInUse, Some(holder)) => format!(
            "{holder} has it, and answers there in reeve's place; end that process, or choose another \
             address and restart reeve"
        ),
        (io::ErrorKind::AddrInUse, None) => {
            "another process has it, and may answer there in reeve's place; end that process, or choose \
             another address and restart reeve"
                .to_owned()
        }
        (io::ErrorKind::AddrNotAvailable, _) => {
            "no device of the host has this address; give it to \
             one, or choose another address and restart reeve"
                .to_owned()
        }
        _ => error.to_string(),
    };
    format!(
        "`metrics.address` {address} cannot be listened on, and is tried every {} s: {advice}",
        TRY_AGAIN.as_secs()
    )
}
