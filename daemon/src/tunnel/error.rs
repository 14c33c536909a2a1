//! What can go wrong in the data path, with the [`Reason`] that each is logged and counted under.

use std::{
    borrow::Cow,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use reeve_common::Reason;

use crate::{
    identity::SpiffeId,
    policy::Decision,
    privileges::PrivilegeError,
    telemetry::{HandshakeReason, Limit},
};

/// The data path could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A thread could not be made.
    #[error("cannot start tunnel worker {worker}: {source}; check the limit on threads")]
    Thread {
        /// Number of the worker, from 0.
        worker: usize,
        /// From the kernel.
        source: io::Error,
    },
    /// A worker's event loop could not be made.
    #[error("cannot make the event loop of a tunnel worker: {0}; check the limit on open files")]
    Runtime(io::Error),
    /// The thread that opens sockets could not be made.
    #[error("cannot start the thread that opens sockets: {0}; check the limit on threads")]
    Sockets(io::Error),
    /// A worker keeps privileges that it must not have.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
}

/// The listeners of a network namespace could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listener for redirected connections.
    #[error(
        "cannot listen for outbound connections on port {port} in network namespace {inode}: {source}"
    )]
    Outbound {
        /// The port.
        port: u16,
        /// The namespace.
        inode: u64,
        /// From the kernel.
        source: io::Error,
    },
    /// The listener for tunnels.
    #[error("cannot listen for tunnels on port {port} in network namespace {inode}: {source}")]
    Tunnel {
        /// The port.
        port: u16,
        /// The namespace.
        inode: u64,
        /// From the kernel.
        source: io::Error,
    },
}

/// Where a time limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stage {
    /// TCP connection.
    #[error("the TCP connection")]
    Connect,
    /// TLS handshake and HTTP/2 settings.
    #[error("the handshake")]
    Handshake,
    /// Answer to a CONNECT request.
    #[error("the answer to CONNECT")]
    Request,
    /// A free place in a tunnel.
    #[error("a free stream in a tunnel")]
    Stream,
}

/// Why a connection could not be made or was refused.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TunnelError {
    /// The kernel knows of no original destination for an accepted connection.
    #[error("the connection was not redirected by reeve")]
    NoOrigin,
    /// The client is bound to an address that the workload has no right to.
    #[error("{0} is not an address of the workload")]
    ForgedSource(IpAddr),
    /// The tunnel would come from an address that another workload of the identity declares.
    #[error(
        "{0} is an address that another workload of this identity declares; declare this one's in `workloads[].addresses` as well"
    )]
    DeclaredSource(IpAddr),
    /// The workload has none of the addresses that it declares in the destination's family.
    #[error("the workload declares no address from which {0} can be reached")]
    NoSource(SocketAddr),
    /// The workload or the peer is gone, or no longer what it was when the kernel let it through.
    #[error("{0} has changed since the kernel let the connection through")]
    Stale(&'static str),
    /// The policy refuses the connection.
    #[error("the policy refuses it")]
    Denied(Decision),
    /// The identity has no valid certificate.
    #[error("{0} has no valid certificate; see what the log says of its source")]
    NoCertificate(SpiffeId),
    /// A socket could not be made in the workload's network namespace.
    #[error("cannot open a socket for {to} in the workload's network namespace: {source}")]
    Socket {
        /// What it was to connect to.
        to: SocketAddr,
        /// From the kernel.
        source: Arc<io::Error>,
    },
    /// The tunnel cannot come from the address that its client speaks from.
    #[error(
        "cannot open a tunnel from {from}: {source}; is the address in the workload's namespace?"
    )]
    Bind {
        /// The address.
        from: IpAddr,
        /// From the kernel.
        source: Arc<io::Error>,
    },
    /// The peer's tunnel port cannot be reached.
    #[error(
        "cannot connect to the tunnel port {to}: {source}; {}",
        probable(source)
    )]
    Connect {
        /// The tunnel port.
        to: SocketAddr,
        /// From the kernel.
        source: Arc<io::Error>,
    },
    /// A time limit was reached.
    #[error("{stage} took longer than {limit:?} with {to}: {}", stage.known())]
    Timeout {
        /// What was waited for.
        stage: Stage,
        /// The far end.
        to: SocketAddr,
        /// The limit.
        limit: Duration,
    },
    /// The TLS handshake failed.
    #[error("the TLS handshake with {to} failed: {detail}")]
    Handshake {
        /// The far end.
        to: SocketAddr,
        /// Why, as it is counted.
        reason: HandshakeReason,
        /// Why, in full.
        detail: Arc<str>,
    },
    /// The tunnel broke while the CONNECT request was under way.
    #[error("the tunnel to {to} broke before it answered: {detail}")]
    Broken {
        /// The far end.
        to: SocketAddr,
        /// What broke it.
        detail: Arc<str>,
    },
    /// The tunnel was given up while the CONNECT request was under way: nobody answers there.
    #[error("the tunnel to {to} ended before it answered: the peer answers nothing any more")]
    Silent {
        /// The far end.
        to: SocketAddr,
    },
    /// The peer answered something other than 200.
    #[error("the peer {to} answered CONNECT with {status}{}", Said(.said))]
    Answer {
        /// The far end.
        to: SocketAddr,
        /// HTTP status.
        status: u16,
        /// Why, where it says so.
        said: Option<Arc<str>>,
    },
    /// The request is not a CONNECT to `ip:port`.
    #[error("the request is not a CONNECT to an address and a port")]
    BadRequest,
    /// The authority is not an address of the workload whose identity was presented.
    #[error("the authority is not an address of the workload that the tunnel reaches")]
    WrongAuthority,
    /// The authority's port is one of reeve's.
    #[error("the port is reeve's own")]
    ReservedPort,
    /// The application cannot be reached.
    #[error("cannot connect to the application: {0}")]
    Application(Arc<io::Error>),
    /// The application did not answer in time.
    #[error("the application did not accept the connection within {0:?}")]
    ApplicationTimeout(Duration),
    /// Somebody else listens at the application's port.
    #[error("the port is held by a listener that does not belong to the workload")]
    WrongListener,
    /// A limit was reached.
    #[error("{}", reached(*.0))]
    Limit(Limit),
    /// No longer allowed before it stood.
    #[error("it was revoked before it stood")]
    Revoked,
    /// The client went away before the connection stood.
    #[error("the client went away before the connection stood")]
    ClientGone,
    /// The daemon is shutting down.
    #[error("the daemon is shutting down")]
    Shutdown,
}

impl Stage {
    /// What is known where the limit is reached.
    const fn known(self) -> &'static str {
        match self {
            Self::Connect => {
                "nothing answers; the host is down, or something on the way drops TCP to this port"
            }
            Self::Handshake => {
                "TCP is open, and the TLS handshake gets no answer; large packets may be lost on the way \
                 (path MTU), the peer may be overloaded, or not be reeve"
            }
            Self::Request => {
                "the tunnel is open, and CONNECT gets no answer; packets may be lost on the way, or the \
                 application does not accept the connection"
            }
            Self::Stream => "all streams of all tunnels are in use",
        }
    }
}

/// What the peer said of why it refuses.
struct Said<'a>(&'a Option<Arc<str>>);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(said) => write!(f, ": {said}"),
            None => Ok(()),
        }
    }
}

/// Which limit is reached.
fn reached(limit: Limit) -> Cow<'static, str> {
    match limit {
        Limit::HandshakesPerWorkload => {
            "the workload has its share of `limits.handshakes`: as many \
             handshakes as there is room for wait for its peers to answer"
                .into()
        }
        _ => format!("the limit `limits.{}` is reached", limit.as_str()).into(),
    }
}

/// What is probable where a connection to a tunnel port fails.
fn probable(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            "the host answers and the port is closed: does reeve run there, and is the workload enrolled?"
        }
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            "there is no way to the host: is it up, and is there a route?"
        }
        _ => "does reeve run there?",
    }
}

impl TunnelError {
    /// What it is logged and counted under.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoOrigin => Reason::NoOrigin,
            Self::ForgedSource(_) | Self::DeclaredSource(_) | Self::NoSource(_) => {
                Reason::ForgedSource
            }
            Self::Stale(_) | Self::Revoked => Reason::Revoked,
            Self::Denied(decision) => decision.reason,
            Self::NoCertificate(_) => Reason::NoCertificate,
            Self::Socket { .. } | Self::Bind { .. } | Self::Connect { .. } => {
                Reason::PeerUnreachable
            }
            Self::Timeout { stage, .. } => match stage {
                Stage::Connect => Reason::PeerUnreachable,
                Stage::Handshake | Stage::Request => Reason::Timeout,
                Stage::Stream => Reason::Limit,
            },
            Self::Handshake { reason, .. } => of_handshake(*reason),
            Self::Silent { .. } => Reason::Timeout,
            Self::Broken { .. } | Self::ClientGone => Reason::Reset,
            Self::Answer { status: 401, .. } => Reason::PeerDenied,
            Self::Answer { status: 400, .. } | Self::BadRequest => Reason::BadRequest,
            Self::Answer { status: 421, .. } => Reason::WrongAuthority,
            Self::Answer { .. } => Reason::PeerFailed,
            Self::WrongAuthority => Reason::WrongAuthority,
            Self::ReservedPort => Reason::ReservedPort,
            Self::Application(_) => Reason::ApplicationUnreachable,
            Self::ApplicationTimeout(_) => Reason::Timeout,
            Self::WrongListener => Reason::WrongListener,
            Self::Limit(_) => Reason::Limit,
            Self::Shutdown => Reason::Shutdown,
        }
    }
}

pub(super) fn of_handshake(reason: HandshakeReason) -> Reason {
    match reason {
        HandshakeReason::Timeout => Reason::Timeout,
        HandshakeReason::Limit => Reason::Limit,
        HandshakeReason::WrongIdentity => Reason::PeerIdentity,
        HandshakeReason::NoOwnCertificate => Reason::NoCertificate,
        HandshakeReason::NoCertificate
        | HandshakeReason::Validity
        | HandshakeReason::UntrustedChain
        | HandshakeReason::UnknownTrustDomain
        | HandshakeReason::InvalidSvid
        | HandshakeReason::Revoked => Reason::PeerCertificate,
        HandshakeReason::Ok
        | HandshakeReason::Transport
        | HandshakeReason::Protocol
        | HandshakeReason::PeerNoCertificate
        | HandshakeReason::PeerAlert => Reason::HandshakeFailed,
    }
}
