//! What came of reading everything again.

use serde::{Deserialize, Serialize};

/// The answer to `reeve reload`: what was read, in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReloadReport {
    /// The parts.
    pub parts: Vec<ReloadPart>,
}

/// What is read, and refused, on its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReloadPart {
    /// What it is.
    pub what: String,
    /// How much is in force now; empty where all was refused.
    pub detail: String,
    /// What was refused and why; what was there before stays in force in its place.
    pub refused: Vec<String>,
}

// === impl ReloadReport ===

impl ReloadReport {
    /// Adds a part: what is in force now, or what was refused.
    pub fn push(&mut self, what: &str, result: Result<String, Vec<String>>) {
        let (detail, refused) = match result {
            Ok(detail) => (detail, Vec::new()),
            Err(refused) => (String::new(), refused),
        };
        self.parts.push(ReloadPart {
            what: what.to_owned(),
            detail,
            refused,
        });
    }

    /// Whether nothing was refused.
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        self.parts.iter().all(|part| part.refused.is_empty())
    }
}
