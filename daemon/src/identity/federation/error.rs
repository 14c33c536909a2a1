//! Why there is nothing new from a bundle endpoint.

use std::time::Duration;

use super::DocumentError;
use crate::identity::TrustDomain;

/// Why nothing came of an attempt at a bundle endpoint. What was in force before stays so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// No TCP connection.
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    /// It took too long, from the first step to the last.
    #[error("it has not given a whole answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// The authorities by which its certificate is to be judged cannot be read.
    #[error("the authorities to check its certificate with cannot be read: {0}")]
    Authorities(String),
    /// There is no bundle of its trust domain to check its certificate with.
    #[error(
        "there is no bundle of {0} to check its certificate with; give one as `bootstrap`, or see \
         why that trust domain's own endpoint gives none"
    )]
    NoBundle(TrustDomain),
    /// It is not who it should be, or speaks no TLS 1.3.
    #[error("the TLS handshake with it failed: {0}")]
    Handshake(String),
    /// It spoke, and not HTTP.
    #[error("the connection to it broke: {0}")]
    Broken(String),
    /// It answered with another status than 200.
    #[error("it answered with the HTTP status {0}; expected 200")]
    Status(u16),
    /// It is elsewhere.
    #[error("it says that the bundle is at `{0}`, and redirects are not followed: change `url`")]
    Redirect(String),
    /// The answer is larger than any bundle.
    #[error("its answer has more than {0} bytes")]
    TooLarge(usize),
    /// What it gives is no bundle.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// What it gives is older than what it gave before.
    #[error(
        "its bundle has the sequence number {new}, and one with {held} was there before: an old \
         bundle may trust keys that were withdrawn since"
    )]
    SequenceWentBack {
        /// What is held.
        held: u64,
        /// What it gives.
        new: u64,
    },
}

impl EndpointError {
    /// Name in metrics and status: one of a closed set.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Timeout(_) => "timeout",
            Self::Authorities(_) => "authorities",
            Self::NoBundle(_) => "no_bundle",
            Self::Handshake(_) => "handshake",
            Self::Broken(_) => "broken",
            Self::Status(_) => "status",
            Self::Redirect(_) => "redirect",
            Self::TooLarge(_) => "too_large",
            Self::Document(_) => "document",
            Self::SequenceWentBack { .. } => "sequence_went_back",
        }
    }
}
