//! What is said over the admin socket.

use serde::{Deserialize, Serialize};

use super::{ReloadReport, Status};
use crate::{
    answers::{Enquiry, Explanation, PolicyRow},
    telemetry::{ObserveRequest, Observed},
};

/// Version of requests and answers. A field that is added does not raise it.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest request in bytes, line feed included.
pub(super) const MAX_REQUEST: usize = 4096;

/// One line to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Request {
    /// [`PROTOCOL_VERSION`] of whoever asks.
    pub version: u32,
    /// What is asked for.
    pub command: Command,
}

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Command {
    /// How the daemon is.
    Status,
    /// Read everything again.
    Reload,
    /// What happens to connections: the one command that is answered by many lines.
    Observe(Box<ObserveRequest>),
    /// What becomes of a connection, and why.
    Explain(Box<Enquiry>),
    /// The policies in force.
    Policies,
}

/// One line from the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// To [`Command::Status`].
    Status(Box<Status>),
    /// To [`Command::Reload`].
    Reloaded(ReloadReport),
    /// One of the answers to [`Command::Observe`].
    Observed(Box<Observed>),
    /// To [`Command::Explain`].
    Explanation(Box<Explanation>),
    /// To [`Command::Policies`].
    Policies(Vec<PolicyRow>),
    /// The request was refused, and why.
    Error(String),
}
