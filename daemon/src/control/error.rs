//! Why the daemon cannot run.

use std::{io, net::SocketAddr};

use crate::{
    admin::AdminError,
    cli::EXIT_USAGE,
    config::ConfigErrors,
    datapath,
    handover::TakeoverError,
    privileges::PrivilegeError,
    telemetry::LogError,
    tunnel::StartError,
    workload::{
        RegistryError,
        cgroup::{CgroupError, ViewError},
    },
};

use super::{certificates::CertificatesError, parents::ParentError};

/// What keeps the daemon from running, or ended it.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration or a policy is wrong.
    #[error("the configuration is wrong:\n{0}")]
    Config(ConfigErrors),
    /// Privileges.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// Logging.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The process that takes the daemon's place in its unit.
    #[error("no process can be made that stands in for the daemon while it drains")]
    StandIn(#[source] io::Error),
    /// The event loop of the control work.
    #[error("the event loop cannot be started")]
    Runtime(#[source] io::Error),
    /// The metrics endpoint.
    #[error(
        "`metrics.address` {address} cannot be served; choose an address that this host has and this daemon may listen on (a port below 1024 takes CAP_NET_BIND_SERVICE)"
    )]
    Http {
        /// Where it should listen.
        address: SocketAddr,
        /// From the kernel.
        source: io::Error,
    },
    /// Another reeve has the metrics endpoint.
    #[error(
        "another reeve (process {process}) has `metrics.address` {address}: stop it, or give this one another `metrics.address`, `admin.socket`, `node.bpffs` and `stateDir`, so that they do not write the same kernel maps"
    )]
    OtherReeve {
        /// Where it listens.
        address: SocketAddr,
        /// The other daemon.
        process: u32,
    },
    /// The admin socket.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The cgroup tree.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The host is not seen as it is.
    #[error(transparent)]
    View(#[from] ViewError),
    /// An enforced parent.
    #[error(transparent)]
    Parent(#[from] ParentError),
    /// The kernel programs.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The certificate source.
    #[error(transparent)]
    Certificates(#[from] CertificatesError),
    /// The tunnels' threads.
    #[error(transparent)]
    Tunnels(#[from] StartError),
    /// The registry of workloads.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Another daemon's place.
    #[error(transparent)]
    Takeover(#[from] TakeoverError),
    /// The socket for a daemon that takes over.
    #[error("the hand-over socket beside `admin.socket` cannot be made")]
    HandOver(#[source] io::Error),
    /// Signals.
    #[error("signals cannot be waited for")]
    Signals(#[source] io::Error),
    /// The registry's thread has ended.
    #[error("the thread that follows workloads has ended; what is enforced stays so")]
    RegistryEnded,
}

// Not by `#[from]`, which would make the mistakes a cause too, and have them told twice.
impl From<ConfigErrors> for RunError {
    fn from(mistakes: ConfigErrors) -> Self {
        Self::Config(mistakes)
    }
}

impl RunError {
    /// Exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => EXIT_USAGE,
            _ => 1,
        }
    }
}
