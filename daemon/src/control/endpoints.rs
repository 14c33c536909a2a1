//! Where others ask: the metrics endpoint and the admin socket.

use std::{net::SocketAddr, os::fd::OwnedFd, sync::Arc};

use super::{Daemon, RunError};
use crate::{
    admin::{AdminServing, AdminSocket},
    config::Config,
    handover::Inherited,
    telemetry::{HttpServer, HttpServing, Metrics, Told},
};

/// Both, bound, and served once it is said who answers.
#[derive(Debug)]
pub struct Endpoints {
    http: Option<(SocketAddr, HttpServer)>,
    admin: Option<AdminSocket>,
    /// The same sockets, for a daemon that takes over.
    shared: Vec<OwnedFd>,
    http_serving: Option<HttpServing>,
    admin_serving: Option<AdminServing>,
}

// === impl Endpoints ===

impl Endpoints {
    /// Binds them, or takes over those of the daemon before. Called in the runtime in which
    /// metrics are to be gathered, and commands to be answered.
    ///
    /// # Errors
    /// When another daemon has them, or from the kernel.
    pub fn bind(
        config: &Config,
        inherited: &mut Inherited,
        metrics: Metrics,
        told: Told,
    ) -> Result<Self, RunError> {
        let mut shared = Vec::new();
        let mut http = None;
        if let Some(address) = config.metrics.address {
            let bound = match inherited.metrics.take() {
                Some(listener) => HttpServer::adopt(listener, metrics, told),
                None => HttpServer::bind(address, metrics, told),
            };
            let bound = bound.map_err(|source| RunError::Http { address, source })?;
            shared.extend(bound.share());
            http = Some((address, bound));
        }
        let path = &config.admin.socket;
        let admin = match inherited.admin.take() {
            Some(listener) => AdminSocket::adopt(listener, path)?,
            None => AdminSocket::bind(path)?,
        };
        shared.push(admin.share()?);
        Ok(Self {
            http,
            admin: Some(admin),
            shared,
            http_serving: None,
            admin_serving: None,
        })
    }

    /// Begins to answer.
    ///
    /// # Errors
    /// When one of them cannot be served.
    pub fn serve(&mut self, daemon: &Arc<Daemon>) -> Result<(), RunError> {
        let confinement = daemon.config.load().sandbox;
        if let Some((address, http)) = self.http.take() {
            let serving = http.start(confinement);
            let serving = serving.map_err(|source| RunError::Http { address, source })?;
            self.http_serving = Some(serving);
        }
        if let Some(admin) = self.admin.take() {
            self.admin_serving = Some(admin.start(daemon.clone(), confinement)?);
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
        self.http_serving = None;
        if let Some(serving) = self.admin_serving.take() {
            serving.leave();
        }
        self.shared.clear();
    }
}
